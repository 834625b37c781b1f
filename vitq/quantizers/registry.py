"""Number formats by name; a new file in this folder (or a recipe's own class) registers itself."""

from __future__ import annotations

from vitq.core.errors import InputError
from vitq.core.format import PER_ROW, Format
from vitq.core.registry import Registry
from vitq.core.roles import WEIGHT
from vitq.core.site import Site
from vitq.quantizers.base import Quantizer
from vitq.quantizers.common import AnyQuantizer
from vitq.quantizers.dynamic import DynamicQuantizer
from vitq.quantizers.layout import Layout

QUANTIZERS: Registry[type[Quantizer]] = Registry("format", "vitq.quantizers")
DYNAMIC: Registry[type[DynamicQuantizer]] = Registry("dynamic format", "vitq.quantizers")


def build_quantizer(fmt: Format, axes: tuple[str, ...], shape: tuple[int, ...]) -> Quantizer:
    """An unfitted quantizer of this static format for a site with these axes and sizes.

    Raises:
        UnknownNameError: no such format.
        InputError: the site lacks the axis that the format's granularity needs.
    """
    return QUANTIZERS[fmt.kind](fmt.bits, Layout.for_site(fmt, axes, shape), **dict(fmt.options))


def quantizer_at(site: Site, fmt: Format) -> AnyQuantizer:
    """An unfitted quantizer of any format for a site.

    Raises:
        UnknownNameError: no such format.
        InputError: the site does not suit the format.
    """
    if fmt.kind not in DYNAMIC:
        return build_quantizer(fmt, site.axes, site.shape)
    if site.role == WEIGHT or fmt.per != PER_ROW:
        raise InputError(
            f"{site.id}: format {fmt} cannot be used; a dynamic format is for activations, and has one scale per "
            f"{PER_ROW!r}"
        )
    return DYNAMIC[fmt.kind](fmt.bits, site.summed, **dict(fmt.options))
