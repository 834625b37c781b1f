"""Runs the official RepQ-ViT script, unchanged, from a checkout of it, and lets others watch.

Its own `main()` does the work: what it calls for data, model and validation is replaced in its module from
outside, so its calibration, its reparameterization and its order of steps are the ones that run. Adapted only
where it would not run here:

- images and weights are given, not read from /dataset and downloaded; the device is the CPU;
- today's timm passes keywords to attention, and has identity modules named norm inside attention and MLP,
  which the script would take for LayerNorms: the keywords are dropped, the identities are no modules here;
- a constant channel (0/0 in the scale search) gets the neutral step of peer_predictions/README.md.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

FILES = ("test_quant.py", "quant/quantizer.py", "quant/quant_model.py", "utils/build_model.py")
CHECKOUT = "git clone https://github.com/zkkli/RepQ-ViT && git -C RepQ-ViT checkout a160561"
# (stage, quantizer's module name, quantizer, its input, its output)
Watch = Callable[[str, str, nn.Module, Tensor, Tensor], None]


class OfficialError(Exception):
    """There is no official code that could be run."""


@dataclass
class Side:
    """Parameters and codes of one site as one implementation has them."""

    scale: Tensor
    zero_point: Tensor | None
    codes: Tensor
    values: Tensor


class Official:
    """The official package, imported from the classification folder of a checkout.

    Raises:
        OfficialError: the folder is not that, or its files cannot be imported.
    """

    def __init__(self, path: Path) -> None:
        missing = [name for name in FILES if not (path / name).is_file()]
        if missing:
            raise OfficialError(
                f"{path} is not the classification folder of RepQ-ViT: it lacks {', '.join(missing)}. "
                f"Get it with: {CHECKOUT}; then give RepQ-ViT/classification"
            )
        sys.path.insert(0, str(path.resolve()))
        try:
            self.script = importlib.import_module("test_quant")
            self.building: Any = importlib.import_module("utils.build_model")
            quantizer = importlib.import_module("quant.quantizer")
        except ImportError as error:
            raise OfficialError(f"the official code in {path} cannot be imported: {error}") from error
        foreign = [m.__name__ for m in (self.script, self.building, quantizer) if not _is_from(m, path)]
        if foreign:
            raise OfficialError(f"{', '.join(foreign)} came from somewhere else than {path}; run from a clean folder")
        self.quantizers = (quantizer.UniformQuantizer, quantizer.LogSqrt2Quantizer)
        _neutral_step_for_constants(quantizer.UniformQuantizer)
        _accept_keywords(self.building)

    def run(
        self,
        model: nn.Module,
        images: Tensor,
        weight_bits: int,
        act_bits: int,
        seed: int,
        watch: Watch,
        folded: Callable[[nn.Module], None],
    ) -> nn.Module:
        """Quantize the model in place, as the official script does.

        Args:
            model: float timm ViT or DeiT.
            images: the calibration images, one batch.
            watch: sees every use of a quantizer, in order; stage "calibrate" before the reparameterization,
                "final" after it.
            folded: sees the model right after the reparameterization.

        Returns:
            The official quantized model, calibrated.
        """
        script: Any = self.script
        result: list[nn.Module] = []
        calls: list[str] = []
        original_set_state = script.set_quant_state

        def set_state(q_model: nn.Module, **state: bool) -> None:
            # The script calls this twice: before the first forward, and between reparameterization and the second.
            original_set_state(q_model, **state)
            calls.append("calibrate" if not calls else "final")
            if calls[-1] == "calibrate":
                self._hook(q_model, lambda *seen: watch(calls[-1], *seen))
            else:
                folded(q_model)

        def validate(args: Any, loader: Any, q_model: nn.Module, criterion: Any, device: Any) -> tuple[float, ...]:
            for module in q_model.modules():
                module._forward_hooks.clear()
            result.append(q_model)
            return 0.0, 0.0, 0.0

        asked = {"model": "deit_tiny", "device": "cpu", "seed": seed, "w_bits": weight_bits, "a_bits": act_bits}
        words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
        self.building.timm = SimpleNamespace(create_model=lambda name, pretrained: _without_identity_norms(model))
        replaced = {
            "args": script.get_args_parser().parse_args(words),
            "build_dataset": lambda args: ([(images, None)], None),
            "set_quant_state": set_state,
            "validate": validate,
        }
        try:
            vars(script).update(replaced)
            with contextlib.redirect_stdout(sys.stderr):
                script.main()
        finally:
            script.set_quant_state = original_set_state
        return result[0]

    def _hook(self, q_model: nn.Module, seen: Callable[[str, nn.Module, Tensor, Tensor], None]) -> None:
        for name, module in q_model.named_modules():
            if isinstance(module, self.quantizers):

                def hook(module: nn.Module, args: tuple[Tensor], out: Tensor, name: str = name) -> None:
                    seen(name, module, args[0].detach(), out.detach())

                module.register_forward_hook(hook)


def official_side(quantizer: Any, out: Tensor) -> Side:
    """The official code keeps no codes: undo its last step, which is value = delta * level."""
    delta, zero_point = quantizer.delta, getattr(quantizer, "zero_point", None)
    if zero_point is None:
        steps = (-2 * (out / delta).log2()).round()
        codes = torch.where(out == 0, float(quantizer.n_levels), steps)
        return Side(delta.reshape(-1), None, codes, out)
    return Side(delta.reshape(-1), zero_point.reshape(-1), out / delta + zero_point, out)


def _neutral_step_for_constants(cls: Any) -> None:
    original = cls.init_quantization_scale

    def search(self: Any, x: Tensor, channel_wise: bool = False) -> tuple[Tensor, Tensor]:
        if channel_wise or x.min() != x.max():
            found: tuple[Tensor, Tensor] = original(self, x, channel_wise)
            return found
        constant, top = x.max(), float(2**self.n_bits - 1)
        return constant.abs().clamp(min=1e-5) / top, torch.tensor(top if constant < 0 else 0.0)

    cls.init_quantization_scale = search


def _accept_keywords(building: Any) -> None:
    original = building.attention_forward

    def forward(self: nn.Module, x: Tensor, **ignored: Any) -> Tensor:
        if any(value is not None and value is not False for value in ignored.values()):
            raise OfficialError(f"attention was called with {ignored}, which the official forward cannot take")
        out: Tensor = original(self, x)
        return out

    building.attention_forward = forward


def _without_identity_norms(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if "norm" in name and isinstance(child, nn.Identity):
                delattr(module, name)
                setattr(module, name, _same)
    return model


def _same(x: Tensor) -> Tensor:
    return x


def _is_from(module: ModuleType, path: Path) -> bool:
    return Path(module.__file__ or "").resolve().is_relative_to(path.resolve())
