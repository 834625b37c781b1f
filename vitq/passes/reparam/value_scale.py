"""Move a scale of each channel from attention values to the linear behind the attention.

Shapes:  C input channels of that linear
"""

from __future__ import annotations

from typing import final

from torch import nn

from vitq.calibrate.values import ValuePath
from vitq.core.rewrite import REWRITES, Rewrite


@REWRITES.register("fold_value_scale")
@final
class FoldValueScaleRewrite(Rewrite):
    """The values are divided by ratio, and the linear behind the attention undoes it. The float output is unchanged.

    args: names of parameters: `weight` of the linear, `value` and `bias` (or None) of the projection that makes the
    values; tensors: rows (C,) of that projection, ratio (C,) float32.
    """

    name = "fold_value_scale"

    def apply(self, model: nn.Module) -> None:
        """Change weights and bias in place."""
        ValuePath(**self.args, rows=self.tensors["rows"]).divide(model, self.tensors["ratio"])
