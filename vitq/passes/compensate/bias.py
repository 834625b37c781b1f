"""Give back to each linear's bias what quantization took off its mean output.

Shapes:  W (out, in) float weights, Q quantized ones    x, q (in,) mean inputs of the float and the quantized model
Formula: bias += W x - Q q
Source:  bias correction: Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.2, with means from calibration images as
         in appendix D; for transformers Liu et al., NeurIPS 2021, arXiv 2106.14156, section 3.3
"""

from __future__ import annotations

from typing import final

import torch

from vitq.calibrate.capture import watch_prefix
from vitq.calibrate.importance import row_weights
from vitq.calibrate.linears import linears, watchable
from vitq.core.batches import Batches
from vitq.core.errors import DataError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES, Pass
from vitq.passes.biases import Biases


@PASSES.register("correct_bias")
@final
class CorrectBias(Pass):
    """Make the mean output of every linear that of the float model, each on what the ones before it give.

    Args:
        weighted: of means over tokens that count by their gradients (calibrate/importance.py), which takes a backward.

    A module called several times in one forward has one bias for all of them, and is left as it is, as are weights that
    are tied, computed or used by something else than an nn.Linear or nn.Conv2d; the log says how many.
    """

    name = "correct_bias"
    slot = "compensate"
    needs = frozenset({WEIGHT_SCALES, ACT_SCALES})
    keeps_float_output = False
    cost = "two forwards of the calibration images; about four with more than 32"

    def __init__(self, weighted: bool = False) -> None:
        self.weighted = weighted

    def check(self, qmodel: QuantModel, data: Batches | None) -> None:
        """Refuse to work without images."""
        if data is None or data.count == 0:
            raise DataError("correcting biases needs calibration images; give data= (or --calib)")

    @torch.no_grad()
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Correct every bias."""
        assert data is not None
        every = linears(qmodel)
        weights = row_weights(qmodel, data, every, progress) if self.weighted else {}
        with watchable(qmodel, [linear.input for linear in every]):
            biases = Biases(qmodel, every, weights, data, progress)
            watch_prefix(qmodel, [linear.input for linear in biases.linears.values()], biases.watcher, data, progress)
            biases.keep()
