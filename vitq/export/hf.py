"""An artifact as a Hugging Face folder: config.json and model.safetensors that both transformers and vitq load.

docs/decisions/hf_folder.md has the reasons.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitq.artifact import wrapped
from vitq.artifact.save import Form, save_as
from vitq.artifact.schema import CARD, CONFIG, TENSORS
from vitq.core.errors import ArtifactError, InputError
from vitq.core.qmodel import QuantModel
from vitq.data.families_hf import hf_source, is_hf_model
from vitq.data.preprocess import PROCESSOR, Preprocess


def form_of(qmodel: QuantModel, check: Callable[[Path], object] = lambda folder: None) -> Form:
    """What transformers wants of the folder.

    Args:
        check: as Form.check.
    """
    name = type(qmodel.model).__name__
    config = config_of(qmodel.model)

    def wrap(document: str) -> str:
        return json.dumps(config | {wrapped.ENTRY: wrapped.entry_of(document)}, indent=2, sort_keys=True) + "\n"

    how = f'import vitq\nfrom transformers import {name}\n\nmodel = {name}.from_pretrained("path/to/this/folder")'
    return Form(wrap, _guards(qmodel.model), processor_files(qmodel), how, check)


def named(qmodel: QuantModel) -> QuantModel:
    """The same model, whose record of where it comes from names its class.

    Raises:
        InputError: no model of transformers.
    """
    if not is_hf_model(qmodel.model):
        raise InputError(
            f"{type(qmodel.model).__name__} is no model of transformers, which has no class to load it with; "
            f"vitq.save and vitq.load keep any model, and `vitq export --to onnx` or `--to torch` take it elsewhere"
        )
    twin = copy.copy(qmodel)
    twin.source = hf_source(qmodel.model, qmodel.source)
    return twin


def config_of(model: Any) -> dict[str, Any]:
    """config.json of a model of transformers, without a quantization."""
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return {key: value for key, value in data.items() if key != wrapped.ENTRY and not key.startswith("_")}


def processor_files(qmodel: QuantModel) -> dict[str, str]:
    """preprocessor_config.json, where it is known how images are prepared and an image processor can do that."""
    stored = qmodel.preprocess
    found = None if not stored or "form" in stored else Preprocess.from_dict(stored).to_hf()
    return {} if found is None else {PROCESSOR: json.dumps(found, indent=2, sort_keys=True) + "\n"}


def save_pretrained(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    variant: str | None = None,
    **_: Any,
) -> None:
    """`save_pretrained` of a model that was loaded from such a folder; a folder that is there keeps its other files.

    Args:
        state_dict, push_to_hub, variant: cannot be given.

    Raises:
        InputError: one of them is.
        ArtifactError: weights were changed, or nothing can be written there.
    """
    given = {"state_dict": state_dict is not None, "push_to_hub": push_to_hub, "variant": variant is not None}
    if refused := [name for name, is_given in given.items() if is_given]:
        raise InputError(
            f"save_pretrained of a model that vitq quantized does not take {', '.join(refused)}: it writes codes as "
            f"they are; model.push_to_hub(...) uploads them"
        )
    if not is_main_process:
        return
    quantizer, out = model.hf_quantizer, Path(save_directory)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".vitq.", dir=out) as folder:
            made = Path(folder) / "made"
            save_as(named(quantizer.qmodel), made, form_of(quantizer.qmodel), metrics=quantizer.metrics)
            kept = {CARD} if (out / CARD).exists() else set()  # somebody may have written more into it
            # Each file is replaced in one step. In between, the digests tell that they do not belong together.
            written = {file.name for file in made.iterdir()} - kept
            for name in [*sorted(written - {TENSORS, CONFIG}), TENSORS, CONFIG]:
                os.replace(made / name, out / name)
    except OSError as error:
        raise ArtifactError(f"{out} could not be written: {error}") from error


def _guards(model: Any) -> dict[str, Tensor]:
    """Tensors under parameters' own names, of another shape: without vitq, transformers stops at them.

    It would fill the model with random numbers otherwise, and warn. The name of one more says what to do.
    """
    large = [(name, value) for name, value in model.named_parameters() if value.ndim > 1 and value.numel() > 1]
    if not large:
        raise InputError(f"{type(model).__name__} has no weights; there is nothing to save")
    # The first is in the model without its head, the last in the head.
    ends = {name: torch.zeros([1] * value.ndim, dtype=value.dtype) for name, value in (large[0], large[-1])}
    return ends | {wrapped.NOTICE: torch.zeros(1)}
