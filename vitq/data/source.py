"""Models by name, and the record from which an artifact builds the same architecture again.

Names: a timm name; hf:name-or-folder; torchvision:name; zoo:name; file.py:function; file.onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitq.core.errors import ArtifactError, InputError
from vitq.data import families, families_hf
from vitq.data.checkpoint import check_finite, load_checkpoint, read_checkpoint
from vitq.data.families import Built
from vitq.data.preprocess import Preprocess

__all__ = ["LoadedModel", "build_model", "check_finite", "load_model", "read_checkpoint"]

KINDS = ("timm", "hf", "torchvision", "zoo", "file", "onnx")


@dataclass(frozen=True)
class LoadedModel:
    """A float model and where it comes from.

    Attributes:
        model: in eval mode, float32, on the CPU.
        source: JSON values; build_model(source) gives the same architecture again.
        preprocess: None where the model does not say, or says what Preprocess cannot express.
        num_classes: None where it could not be found out.
    """

    model: nn.Module
    source: dict[str, Any]
    preprocess: Preprocess | None
    num_classes: int | None


def load_model(
    spec: str,
    checkpoint: str | Path | None = None,
    *,
    pretrained: bool | None = None,
    num_classes: int | None = None,
    trust_code: bool = False,
) -> LoadedModel:
    """The model that spec names, with the weights of checkpoint, or else the published ones.

    Args:
        spec: a timm name, hf:..., torchvision:..., zoo:..., file.py:function or file.onnx. A function of a file is
            run: who gives its name trusts it.
        checkpoint: a weight file; nothing is then downloaded.
        pretrained: False gives random weights where there is no checkpoint; None means True.
        num_classes: classes of the head; None means those of the name.
        trust_code: no effect here, so that callers can pass one flag to this and to build_model.

    Raises:
        UnknownNameError: no such model; the message has near misses.
        InputError: the published weights could not be fetched, or contradicting arguments.
        CheckpointError: unreadable file, names, shapes or class count that do not fit, NaN or Inf.
        MissingExtraError: hf: without transformers.
    """
    if checkpoint is not None and pretrained:
        raise InputError("both a checkpoint and pretrained=True are given. Give one of them.")
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes is {num_classes}, expected at least 1.")
    fetch = checkpoint is None and pretrained is not False
    kind, name = families.parse(spec)
    if kind == "timm":
        built = families.from_timm(name, fetch, num_classes)
    elif kind == "hf":
        built = families_hf.from_hf(name, fetch, num_classes)
    elif kind == "torchvision":
        built = families.from_torchvision(name, fetch, num_classes)
    elif kind == "zoo":
        built = families.from_zoo(name)
    elif kind == "onnx":
        built = families.from_onnx(name)
    else:
        built = families.from_file(name)

    source: dict[str, Any] = {"kind": kind, "spec": built.spec, **built.source}
    model = built.model.eval().float()
    count = built.num_classes
    if num_classes is not None and count is not None and num_classes != count:
        raise InputError(f"{spec!r} has {count} classes, asked for {num_classes}. Leave num_classes out.")
    if checkpoint is not None:
        source["checkpoint"] = load_checkpoint(model, checkpoint, num_classes=count)
    else:
        check_finite(model.state_dict(), spec)
        source["pretrained"] = fetch and kind not in ("zoo", "file", "onnx")
    return LoadedModel(model, source, built.preprocess, count)


def build_model(source: Mapping[str, Any], *, trust_code: bool = False) -> nn.Module:
    """The architecture that a LoadedModel.source records, in eval mode, with random weights.

    Nothing is downloaded, and the global random state is left as it was.

    Args:
        trust_code: allow a source that runs the function of a Python file.

    Raises:
        ArtifactError: the record cannot be used, or runs code that is not trusted or has changed.
    """
    kind = source.get("kind")
    if kind not in KINDS:
        raise ArtifactError(
            f"the source model's kind is {kind!r}, known are {', '.join(KINDS)}. "
            "Build the model yourself and pass it as model=."
        )
    if kind == "file":
        return _build_file(source, trust_code)
    try:
        with torch.random.fork_rng(devices=[]):
            return _build_named(kind, source).model.eval().float()
    except KeyError as error:
        raise ArtifactError(f"the source model's record lacks {error}. Pass model= instead.") from error
    except (InputError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"the source model {source.get('spec')!r} cannot be built here: {error} Pass model= instead."
        ) from error


def _build_named(kind: str, source: Mapping[str, Any]) -> Built:
    if kind == "timm":
        return families.from_timm(source["name"], False, source["num_classes"], source.get("kwargs") or {})
    if kind == "hf":
        return families_hf.from_hf_config(source["name"], source["config"], source.get("architecture"))
    if kind == "torchvision":
        return families.from_torchvision(source["name"], False, source["num_classes"])
    if kind == "onnx":
        return families.from_onnx(source["path"], source["sha256"])
    return families.from_zoo(source["name"])


def _build_file(source: Mapping[str, Any], trust_code: bool) -> nn.Module:
    name = f"{source.get('path')}:{source.get('function')}"
    if not trust_code:
        raise ArtifactError(
            f"the source model is the function {name}, and loading does not run code named in a file. "
            "Pass the model itself as model=, or allow it with --trust-code (trust_code=True)."
        )
    try:
        with torch.random.fork_rng(devices=[]):
            return families.from_file(name, sha256=source.get("sha256")).model.eval().float()
    except InputError as error:
        raise ArtifactError(f"{error} Or pass the model itself as model=.") from error
