"""Number formats by name; a new file in this folder (or a recipe's own class) registers itself."""

from __future__ import annotations

from vitq.core.format import Format
from vitq.core.registry import Registry
from vitq.quantizers.base import Quantizer
from vitq.quantizers.layout import Layout

QUANTIZERS: Registry[type[Quantizer]] = Registry("format", "vitq.quantizers")


def build_quantizer(fmt: Format, axes: tuple[str, ...], shape: tuple[int, ...]) -> Quantizer:
    """An unfitted quantizer of this format for a site with these axes and sizes.

    Raises:
        UnknownNameError: no such format.
        InputError: the site lacks the axis that the format's granularity needs.
    """
    return QUANTIZERS[fmt.kind](fmt.bits, Layout.for_site(fmt, axes, shape), **dict(fmt.options))
