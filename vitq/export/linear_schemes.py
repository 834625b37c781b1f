"""Sites as compressed-tensors has them: per linear layer, one scheme for its weight and one for its input.

A code of that package is a signed number; ours is the same number plus 2**(bits - 1). Values are the same bits:
scale * (code - zero_point) in float32, where the difference is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitq.core.errors import InputError
from vitq.core.qmodel import QuantModel
from vitq.core.roles import WEIGHT
from vitq.core.site import Site
from vitq.quantizers.base import Quantizer

BYTE = 8
NAMED = 4  # sites of a role that a message names
PACKED, WHOLE_BYTES = "pack-quantized", "int-quantized"


@dataclass(frozen=True)
class Numbers:
    """A uniform format with what belongs to it.

    Attributes:
        args: keywords of the package's QuantizationArgs.
        scale: float32 of the shape that the package wants.
        zero_point: int8 of that shape, None where all of them are zero (symmetric).
    """

    args: dict[str, Any]
    scale: Tensor
    zero_point: Tensor | None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As the package names them: `weight_scale`, `input_zero_point` …"""
        found = {f"{name}_scale": self.scale}
        return found if self.zero_point is None else found | {f"{name}_zero_point": self.zero_point}


@dataclass(frozen=True)
class LinearScheme:
    """A linear layer whose weight is stored as codes, and whose input may be quantized."""

    weight: Numbers
    input: Numbers | None

    @property
    def format(self) -> str:
        """Bytes where both are bytes, for kernels that multiply those; else codes packed into int32.

        Bytes, too, where zero-points would be packed: of those, transformers expects the shape before (0.20, 5.23).
        """
        both = self.input is not None and self.weight.args["num_bits"] == BYTE
        return WHOLE_BYTES if both or self.weight.zero_point is not None else PACKED

    @property
    def widened(self) -> bool:
        """Whether codes take more bits than they have."""
        return self.format == WHOLE_BYTES and self.weight.args["num_bits"] < BYTE

    @property
    def key(self) -> tuple[str, str, str]:
        """Equal for layers that belong to one group of the configuration."""
        return self.format, str(self.weight.args), str(self.input and self.input.args)


def linear_schemes(qmodel: QuantModel) -> tuple[dict[str, LinearScheme], list[str]]:
    """Module name -> scheme, and the names of parameters whose decoded values must be stored instead of codes.

    Raises:
        InputError: sites whose formats the package cannot express, by name, and what to do.
    """
    modules = dict(qmodel.model.named_modules())
    weights: dict[str, Numbers] = {}
    inputs: dict[str, tuple[Site, Numbers]] = {}
    decoded: list[str] = []
    refused: list[tuple[Site, str]] = []

    def take(site: Site, keep: Callable[[Numbers], None]) -> None:
        why = _not_expressible(site, qmodel.quantizers[site])
        if why:
            refused.append((site, why))
        else:
            keep(_numbers(qmodel.quantizers[site], site))

    for site in qmodel.sites():
        linear = isinstance(modules.get(site.owner), nn.Linear)
        if site.role == WEIGHT and linear and site.param == f"{site.owner}.weight":
            take(site, lambda found, site=site: weights.update({site.owner: found}))  # type: ignore[misc]
        elif site.role == WEIGHT and site.param is not None:
            decoded.append(site.param)
        elif linear:
            take(site, lambda found, site=site: inputs.update({site.owner: (site, found)}))  # type: ignore[misc]
        else:
            refused.append((site, "not the input of a linear layer"))
    refused += [
        (site, "its layer's weight is left in float") for name, (site, _) in inputs.items() if name not in weights
    ]
    if refused:
        raise _cannot(refused)
    schemes = {
        name: LinearScheme(found, inputs[name][1] if name in inputs else None) for name, found in weights.items()
    }
    if not schemes:
        raise InputError("no linear layer of this model has a quantized weight; there is nothing to compress")
    return schemes, decoded


def _not_expressible(site: Site, quantizer: object) -> str:
    """Why the package has no such format, "" if it has."""
    if not isinstance(quantizer, Quantizer):
        return "a dynamic format"
    if not quantizer.affine:
        return "levels that are not equally spaced"
    if quantizer.bits > BYTE:
        return f"{quantizer.bits} bits, more than a byte"
    zero_point, layout = quantizer.params()["zero_point"], quantizer.layout
    if bool((zero_point < 0).any() or (zero_point >= 2**quantizer.bits).any()):
        return "a zero-point that is none of its codes"
    weight = site.role == WEIGHT
    if layout.keep and not (weight and (layout.group or layout.keep == (-2,))):
        return "several scales for one tensor"
    return ""


def _numbers(quantizer: Any, site: Site) -> Numbers:
    params, layout = quantizer.params(), quantizer.layout
    half = 2 ** (quantizer.bits - 1)
    shape = (site.shape[0], -1) if layout.keep else (1,)
    zero_point = (params["zero_point"].detach().cpu() - half).to(torch.int8).reshape(shape)
    symmetric = not bool(zero_point.any())
    strategy = "group" if layout.group else "channel" if layout.keep else "tensor"
    args = {"num_bits": quantizer.bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False}
    args |= {"group_size": layout.group} if layout.group else {}
    scale = params["scale"].detach().cpu().float().reshape(shape).clone()
    return Numbers(args, scale, None if symmetric else zero_point.contiguous())


def _cannot(refused: list[tuple[Site, str]]) -> InputError:
    by_role: dict[str, list[tuple[Site, str]]] = {}
    for site, why in refused:
        by_role.setdefault(site.role, []).append((site, why))
    told = []
    for role, found in by_role.items():
        reasons = " or ".join(sorted({why for _, why in found}))
        names = ", ".join(site.id for site, _ in found[:NAMED]) + (" …" if len(found) > NAMED else "")
        told.append(f"{role} ({reasons}): {names}")
    activations = [role for role in by_role if role != WEIGHT]
    remedy = " ".join(f"--exclude role={role}" for role in activations)
    return InputError(
        f"compressed-tensors has uniform formats for the weights and inputs of linear layers, and none for "
        f"{len(refused)} sites of this model: {'; '.join(told)}. Quantize again "
        + (
            f"with {remedy}, or with float activations (--bits w4a16)"
            if activations
            else "with a uniform weight format"
        )
        + "; `vitq export --to hf` and `--to onnx` keep all sites"
    )
