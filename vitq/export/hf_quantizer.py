"""What transformers calls to load an artifact; imported when transformers is (export/transformers_hook.py).

transformers builds the model without weights, finds nothing in the file that it knows, and hands the model over: from
then on everything is `vitq.load`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from vitq.artifact import schema, wrapped
from vitq.artifact.load import load_onto
from vitq.core.errors import ArtifactError, InputError
from vitq.core.qmodel import QuantModel
from vitq.export.hf import save_pretrained

logger = logging.get_logger(__name__)

QUANTIZERS = "vitq_quantizers"  # the submodule that moves them along with the model
REPORTED = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


class VitqConfig(QuantizationConfigMixin):
    """The `quantization_config` of an artifact (artifact/wrapped.py)."""

    def __init__(self, **entry: Any) -> None:
        self.quant_method: Any = wrapped.METHOD  # theirs is an Enum of text, compared as text
        self.artifact = schema.parse(wrapped.document_in(entry), Path(schema.CONFIG))
        self.entry = {name: value for name, value in entry.items() if isinstance(value, str)}

    def to_dict(self) -> dict[str, Any]:
        """As in config.json."""
        return dict(self.entry)

    def __repr__(self) -> str:
        return f"VitqConfig({self.artifact.plan['recipe']['name']}, {self.artifact.plan['bits']})"


class VitqHfQuantizer(HfQuantizer):
    """Loads artifacts.

    Attributes:
        qmodel: the model as vitq has it, for `vitq.save` and `vitq.export_to`.
        metrics: what was measured with it.
    """

    requires_calibration = True  # from_pretrained cannot quantize: there are no images
    quantization_config: VitqConfig

    def __init__(self, quantization_config: VitqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.artifact = quantization_config.artifact
        self.metrics = self.artifact.metrics
        self.qmodel: QuantModel
        self._guards: dict[str, nn.Parameter] = {}
        self._reported: dict[str, Any] = {}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type that the artifact was made in: scales are for that."""
        found = {getattr(torch, packed.dtype) for packed in self.artifact.packed.values()}
        if len(found) != 1 or dtype in found:
            return dtype
        (own,) = found
        logger.warning(
            f"dtype={dtype} is not used: the artifact was made in {own}; call model.to({dtype}) after loading"
        )
        return own  # type: ignore[no-any-return]

    def update_device_map(self, device_map: Any) -> Any:
        """One device only: the model runs once on it to be traced."""
        if isinstance(device_map, str) and device_map in SPREAD:
            return {"": torch.device("cuda" if torch.cuda.is_available() else "cpu")}
        if isinstance(device_map, dict) and (len(set(device_map.values())) > 1 or "disk" in device_map.values()):
            raise InputError("a quantized model is loaded onto one device; leave device_map out, or name one device")
        return device_map

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        wanted = (self.artifact.source or {}).get("architecture")
        if wanted != type(model).__name__:
            raise InputError(
                f"this artifact is of {wanted}, and cannot be loaded as {type(model).__name__}, whose matrix products "
                f"are others: use {wanted}.from_pretrained, or an Auto class that gives it"
            )
        if checkpoint_files is None or len(checkpoint_files) != 1:
            raise ArtifactError(
                f"an artifact has all of its tensors in one {schema.TENSORS}, here are "
                f"{'none' if checkpoint_files is None else len(checkpoint_files)}: save or export the model again"
            )
        self._file = Path(checkpoint_files[0])
        self._drawn = torch.get_rng_state()
        for name in _names_without_slash(self._file):
            owner, last = name.rpartition(".")[::2]
            if name in dict(model.named_parameters()):
                self._guards[name] = model.get_parameter(name)
                stand_in = torch.empty([1] * self._guards[name].ndim, dtype=self._guards[name].dtype, device="meta")
                setattr(model.get_submodule(owner), last, nn.Parameter(stand_in, requires_grad=False))
        # All of its tensors come later. What is not in the file as a buffer gets the numbers of a new model before.
        for kind in REPORTED:
            self._reported[kind] = getattr(model, kind)
            setattr(model, kind, _Patterns([""]))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for kind, patterns in self._reported.items():
            setattr(model, kind, patterns)
        torch.set_rng_state(self._drawn)
        for name, parameter in self._guards.items():
            owner, last = name.rpartition(".")[::2]
            whole = torch.zeros_like(parameter, device=model.get_parameter(name).device)
            setattr(model.get_submodule(owner), last, nn.Parameter(whole))
        self._guards.clear()
        self.qmodel = load_onto(model, self.artifact, self._file)
        model.add_module(QUANTIZERS, self.qmodel.quantizers)
        model.config.dtype = model.dtype
        model.save_pretrained = partial(save_pretrained, model)
        return model

    def get_state_dict_and_metadata(self, model: Any, *_: Any, **__: Any) -> Any:
        """Only asked for by a `save_pretrained` that is not ours."""
        raise ArtifactError("transformers cannot write codes; call model.save_pretrained(folder) of the loaded model")

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Yes: `save_pretrained` writes the codes again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: weights are codes. Recipes that train are run by `vitq train`."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True


class _Patterns(set[str]):
    """Patterns of names ("" is all of them), which transformers 5.0 adds to a list, and 5.23 unites with a set."""

    def __add__(self, other: list[str]) -> list[str]:
        return [*self, *other]


def _names_without_slash(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return [name for name in opened.keys() if "/" not in name]  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error
