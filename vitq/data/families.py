"""One constructor per place that models come from: timm, torchvision, our zoo, a file of Python or ONNX.

Hugging Face has families_hf.py.

Each imports its library when called, and gives a Built. What fetch means: with the published weights.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vitq.core.errors import (
    CheckpointError,
    InputError,
    UnknownNameError,
    VitqError,
)
from vitq.data.checkpoint import sha256_file
from vitq.data.hub import fail_fast, not_fetched
from vitq.data.onnx_in import read_onnx
from vitq.data.preprocess import Preprocess
from vitq.data.zoo import build_zoo, zoo_preprocess

PREFIXED = ("hf", "torchvision", "zoo", "timm")
FILE_SPEC = re.compile(r"(?P<path>.+\.py):(?P<function>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class Built:
    """A model as its library built it, and the part of its record that is particular to the library."""

    model: nn.Module
    spec: str
    source: dict[str, Any]
    preprocess: Preprocess | None
    num_classes: int | None


def parse(spec: str) -> tuple[str, str]:
    """Split a spec into (kind, name).

    Raises:
        UnknownNameError: a prefix that is none of ours.
    """
    if FILE_SPEC.fullmatch(spec):
        return "file", spec
    if spec.endswith(".onnx"):
        return "onnx", spec
    prefix, colon, name = spec.partition(":")
    if not colon:
        if spec.endswith(".py"):
            raise InputError(f"{spec!r} names a file and no function. Write {spec}:function.")
        return "timm", spec
    if prefix not in PREFIXED:
        raise UnknownNameError("model source", prefix, PREFIXED, "Or write file.py:function.")
    return prefix, name


def _unknown(kind: str, name: str, known: Iterable[str], examples: Iterable[str]) -> UnknownNameError:
    # With no near miss the error would list everything, which for timm is 1300 names.
    # Names are compared over the length typed: deit_tny means deit_tiny_patch16_224, not davit_tiny.
    known = list(known)
    heads: dict[str, list[str]] = {}
    for one in known:
        heads.setdefault(one[: len(name) + 1], []).append(one)
    close = difflib.get_close_matches(name, heads, n=3, cutoff=0.6)
    near = [min(heads[head], key=len) for head in close]
    near = near or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    advice = "A prefix says where a model comes from: hf:, torchvision:, zoo:, or write file.py:function."
    return UnknownNameError(kind, name, near or examples, advice)


SAFE_KWARGS = frozenset({"num_classes", "img_size", "in_chans", "global_pool", "drop_rate", "drop_path_rate"})


def from_timm(name: str, fetch: bool, num_classes: int | None, kwargs: Mapping[str, Any] | None = None) -> Built:
    """A timm model by name or name.tag; num_classes None keeps its own."""
    import timm

    kwargs = dict(kwargs or {})
    if foreign := sorted(set(kwargs) - SAFE_KWARGS):
        # The record may come from an artifact: nothing in it may name a file or a place to load from.
        raise InputError(f"the record of timm model {name!r} has arguments that are not allowed there: {foreign}.")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise _unknown("timm model", name, known, ["deit_tiny_patch16_224", "vit_base_patch16_224"])
    if tag and name not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise UnknownNameError("timm model", name, tagged or [architecture])
    published = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if fetch and published is not None:
        check_published_classes(name, published.num_classes, num_classes)
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    try:
        if fetch:
            with fail_fast():
                model = timm.create_model(name, pretrained=True, **kwargs)
        else:
            model = timm.create_model(name, pretrained=False, **kwargs)
    except Exception as error:  # the download has many ways to fail
        if not fetch:
            raise
        raise not_fetched(name, "weights", error) from error
    kwargs.pop("num_classes", None)
    count = int(getattr(model, "num_classes", 0))
    source = {"name": name, "num_classes": count, "kwargs": kwargs}
    return Built(model, name, source, Preprocess.from_timm(model), count or None)


def from_torchvision(name: str, fetch: bool, num_classes: int | None) -> Built:
    """A torchvision classification model; its preprocessing is that of its default weights."""
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise _unknown("torchvision model", name, known, ["swin_t", "vit_b_16"])
    weights = torchvision.models.get_model_weights(name).DEFAULT
    published = len(weights.meta["categories"])
    if fetch:
        check_published_classes(name, published, num_classes)
    count = num_classes or published
    try:
        if fetch:
            model = torchvision.models.get_model(name, weights=weights)
        else:
            model = torchvision.models.get_model(name, weights=None, num_classes=count)
    except Exception as error:  # the download has many ways to fail
        if not fetch:
            raise
        raise not_fetched(f"torchvision:{name}", "weights", error) from error
    source = {"name": name, "num_classes": count}
    return Built(model, f"torchvision:{name}", source, Preprocess.from_torchvision(weights), count)


def from_zoo(name: str) -> Built:
    """A model that comes with vitq."""
    model: Any = build_zoo(name)
    count = getattr(model, "num_classes", None)
    source = {"name": name, "num_classes": count}
    return Built(model, f"zoo:{name}", source, zoo_preprocess(name), count)


def from_file(spec: str, sha256: str | None = None) -> Built:
    """What the function of a Python file returns; the file is run, so whoever calls this trusts it.

    Args:
        sha256: hash that the file must have, as hex; None accepts any.
    """
    match = FILE_SPEC.fullmatch(spec)
    if match is None:
        raise InputError(f"{spec!r} is not of the form file.py:function.")
    path, function = Path(match["path"]), match["function"]
    if not path.is_file():
        raise InputError(f"no file {match['path']!r} for the model {spec!r}. Check the path.")
    check_hash(path, digest := sha256_file(path), sha256)
    module_spec = importlib.util.spec_from_file_location(f"_vitq_source_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"{path.name} cannot be imported.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and torch look their module up by name
    try:
        module_spec.loader.exec_module(module)
        build = getattr(module, function, None)
        if not callable(build):
            names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise UnknownNameError(f"function in {path.name}", function, names)
        model = build()
    except VitqError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"{spec}: {type(error).__name__}: {error}. Correct the file and try again.") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} returned a {type(model).__name__}, expected an nn.Module.")
    count = getattr(model, "num_classes", None)
    count = count if isinstance(count, int) and count > 0 else None
    preprocess = Preprocess.from_timm(model) if isinstance(_pretrained_cfg(model), dict) else None
    source = {"path": _portable(path), "function": function, "sha256": digest, "num_classes": count}
    return Built(model, f"{path.name}:{function}", source, preprocess, count)


def from_onnx(spec: str, sha256: str | None = None) -> Built:
    """What an ONNX file computes.

    Args:
        sha256: hash that the file must have, as hex; None accepts any.
    """
    path = Path(spec)
    model, shape = read_onnx(path)
    check_hash(path, digest := sha256_file(path), sha256)
    # The whole picture, with ImageNet's mean and deviation: the file tells no more than the size.
    preprocess = (
        Preprocess((3, shape[1], shape[2]), crop_pct=1.0, crop_mode="squash") if shape and shape[0] == 3 else None
    )
    return Built(model, path.name, {"path": _portable(path), "sha256": digest}, preprocess, None)


def check_hash(path: Path, digest: str, wanted: str | None) -> None:
    """Refuse a file that has changed.

    Raises:
        InputError: it has.
    """
    if wanted is not None and digest != wanted:
        raise InputError(f"{path.name} is not the file it was (sha256 {digest[:12]}, was {wanted[:12]}).")


def _portable(path: Path) -> str:
    """Relative to the current folder where it lies below it, else as given."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.as_posix()


def _pretrained_cfg(model: nn.Module) -> object:
    return getattr(model, "pretrained_cfg", None)


def check_published_classes(name: str, published: int | None, asked: int | None) -> None:
    if asked is not None and published is not None and asked != published:
        raise CheckpointError(
            f"the published weights of {name} have {published} classes, asked for {asked}. "
            f"Give a checkpoint with {asked} classes (--checkpoint), or leave num_classes out."
        )
