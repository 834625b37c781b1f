"""Rows that padding left at the input of a linear.

Swin pads its feature maps behind the norm to whole windows, with zeros. A row that is zero in every channel is kept
exactly by every format (real zero has a code) and gives the bias, whatever the scale. So it says nothing about the
scale, and counting it would only move percentiles towards zero: how far would depend on the sizes of the calibration
images. Keys and values that follow from such rows do take part in the attention of these models, and stay.
"""

from __future__ import annotations

from torch import Tensor

from vitq.core.site import Site


def without_zero_rows(site: Site, x: Tensor) -> Tensor:
    """The input of a linear as (n, channels) without its rows of zeros; any other tensor as it is."""
    if (site.op, site.operand) != ("linear", "input") or x.ndim < 2:
        return x
    rows = x.reshape(-1, x.shape[-1])
    kept = rows[:, 0] != 0  # most rows are settled by their first channel
    unsure = ~kept
    if not bool(unsure.any()):
        return x
    kept[unsure] = (rows[unsure] != 0).any(1)
    return rows[kept] if bool(kept.any()) and not bool(kept.all()) else x
