"""Models of Hugging Face transformers: image classifiers from the hub or a folder, any class from a stored record."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitq.core.errors import CheckpointError, InputError, MissingExtraError
from vitq.data.checkpoint import some
from vitq.data.families import Built, check_published_classes
from vitq.data.hub import fail_fast, not_fetched
from vitq.data.preprocess import Preprocess

LOADS_CODE = frozenset({"auto_map", "attn_implementation", "experts_implementation", "custom_pipelines"})


def from_hf(name: str, fetch: bool, num_classes: int | None) -> Built:
    """A Hugging Face image classifier by hub name or local folder; no code of the repository is run."""
    transformers = _transformers(name)
    if name.startswith((".", "/", "~")):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise InputError(f"hf:{name} looks like a folder, and there is none. Check the path.")
        name = str(folder)
    with nullcontext() if Path(name).is_dir() else fail_fast(), quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # not found, no network, not a configuration
            raise _not_read(name, "configuration", error) from error
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(
                f"the model hf:{name} is quantized already; give the float model. The folder of an artifact is given "
                f"by its path alone, to commands that take one (evaluate, inspect, export)"
            )
        processor = _hf_processor_dict(name)
        if fetch:
            check_published_classes(name, config.num_labels, num_classes)
            model = _fetch_hf(transformers, name)
        else:
            if num_classes is not None:
                config.num_labels = num_classes
            model = _hf_model(transformers, config)
    return _hf_built(name, model, processor)


def from_hf_config(name: str, config: Mapping[str, Any], architecture: str | None = None) -> Built:
    """The architecture that a stored configuration describes; needs no hub.

    Args:
        architecture: name of a class of transformers; without, it is an image classifier.
    """
    transformers = _transformers(name)
    # The record may come from an artifact: what makes transformers load code is dropped from it.
    safe = {k: v for k, v in config.items() if k not in LOADS_CODE and not k.startswith("_")}
    with quiet(transformers):
        found = transformers.AutoConfig.for_model(**safe)
        if architecture is None:
            return _hf_built(name, _hf_model(transformers, found), None)
        return _hf_built(name, _class_of(transformers, architecture, found)(found), None)


def is_hf_model(model: nn.Module) -> bool:
    """Whether a model is one that transformers itself defines, so that it can be built from its configuration."""
    if "transformers" not in sys.modules:  # its models cannot be there without it
        return False
    import transformers

    known = getattr(transformers, type(model).__name__, None)
    return isinstance(known, type) and issubclass(known, transformers.PreTrainedModel) and isinstance(model, known)


def hf_source(model: Any, source: Mapping[str, Any] | None) -> dict[str, Any]:
    """The record (LoadedModel.source) from which `build_model` makes a model of transformers again, class and all.

    Args:
        source: the record there is; None for a model that was given as a module.
    """
    if source is None or source.get("kind") != "hf":
        name = type(model).__name__
        source = {
            "kind": "hf",
            "spec": f"hf:{name}",
            "name": name,
            "num_classes": getattr(model.config, "num_labels", 0),
        }
        source |= {"config": _record(model.config), "pretrained": False}
    return {**source, "architecture": type(model).__name__}


def _class_of(transformers: Any, name: str, config: Any) -> Any:
    """A class by its name, of those that transformers itself has for this configuration."""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise InputError(
            f"transformers {transformers.__version__} has no model class {name!r}; install the version that the model "
            f"was saved with."
        )
    taken = getattr(found, "config_class", None)
    if taken is None or not isinstance(config, taken):
        raise InputError(f"{name} does not take a configuration of the type {config.model_type!r}.")
    return found


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", f"the model hf:{name}") from error
    return transformers


class quiet:  # noqa: N801 - reads as a statement: with quiet(transformers)
    """Keeps the library's progress bars and load reports away; its errors still come as exceptions."""

    def __init__(self, transformers: Any) -> None:
        self.logging = transformers.utils.logging

    def __enter__(self) -> None:
        self.verbosity = self.logging.get_verbosity()
        self.bars = self.logging.is_progress_bar_enabled()
        self.logging.set_verbosity(50)
        self.logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self.logging.set_verbosity(self.verbosity)
        if self.bars:
            self.logging.enable_progress_bar()


def _hf_model(transformers: Any, config: Any) -> nn.Module:
    try:
        model: nn.Module = transformers.AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise InputError(
            f"the Hugging Face model type {config.model_type!r} has no image classifier. "
            "Load the model yourself and pass the nn.Module."
        ) from error
    return model


def _fetch_hf(transformers: Any, name: str) -> nn.Module:
    try:
        model: nn.Module
        model, info = transformers.AutoModelForImageClassification.from_pretrained(
            name, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # not found, no network, damaged file, foreign model type
        raise _not_read(name, "weights", error) from error
    if left := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise CheckpointError(
            f"the weights of hf:{name} lack {len(left)} tensor(s) of the classifier: {some(left)}. "
            "The repository holds no trained image classifier; name one that does."
        )
    return model


def _not_read(name: str, what: str, error: Exception) -> InputError:
    if not Path(name).is_dir():
        return not_fetched(f"hf:{name}", what, error)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(
        f"the {what} in the folder {name!r} cannot be read: {reason} "
        "A folder needs config.json and model.safetensors as save_pretrained writes them."
    )


def _hf_processor_dict(name: str) -> dict[str, Any] | None:
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        config, _ = BaseImageProcessor.get_image_processor_dict(name)
    except Exception:  # no such file in the repository, or no network: both mean there is none to read
        return None
    return dict(config)


def _hf_built(name: str, model: nn.Module, processor: dict[str, Any] | None) -> Built:
    config: Any = model.config
    count = int(config.num_labels)
    preprocess: Preprocess | None = None
    if processor is not None:
        # Not every processor is a resize and a crop; such a model still takes tensors.
        with suppress(InputError):
            preprocess = Preprocess.from_hf(processor)
    else:
        size = getattr(config, "image_size", None) or 224
        preprocess = Preprocess.from_image_size(size if isinstance(size, int) else tuple(size))
    label = Path(name).name if Path(name).is_dir() else name
    source = {"name": label, "num_classes": count, "config": _record(config)}
    return Built(model, f"hf:{label}", source, preprocess, count)


def _record(config: Any) -> dict[str, Any]:
    """All values of a configuration, but those of this machine or of a quantization."""
    record: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in record.items() if key not in ("_name_or_path", "quantization_config")}
