"""RepQ-ViT: channel scales where a LayerNorm can absorb them, log base sqrt(2) after softmax.

Source: Li et al., ICCV 2023, arXiv 2212.08254; official code zkkli/RepQ-ViT at a160561

Post-LayerNorm activations are calibrated per channel and then folded into the LayerNorm and the next weight, so
that one scale serves at inference; attention probabilities use a log-sqrt(2) format. Calibration is one forward
on the quantized prefix.

Differs from the official code in four ways, all of which `parity=True` undoes: codes fit their bits (the code
keeps an extra zero level after softmax); the merged zero-point is a whole number; channels that are constant
after the norm are left out of the mean and move into the bias (the code divides 0 by 0 there; in parity mode
they get the neutral step of `quantizers/uniform.py`); candidates are scored on exact tails and a sample of the
body instead of every value.
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe
from vitq.core.rules import channels_behind_norms, uniform_but


@recipe
def repq_vit(weight_bits: int, act_bits: int, parity: bool = False) -> Recipe:
    """Channel scales folded into LayerNorm, log base sqrt(2) after softmax."""
    fit = PassSpec.of("fit", method="percentile_mse", weight_method="percentile_mse", flow="prefix", exact=parity)
    softmax = Format.of("logsqrt2", act_bits, extra_zero_level=True) if parity else Format("logsqrt2", act_bits)
    return Recipe(
        name="repq_vit",
        paper="arXiv 2212.08254",
        formats=uniform_but(
            weight_bits,
            act_bits,
            channels_behind_norms(act_bits),
            Rule(softmax, roles=(roles.SOFTMAX_OUT,)),
        ),
        passes=(fit, PassSpec.of("fold_norm_scale", parity=parity), fit),
        note="parity mode: official arithmetic, not exportable" if parity else "",
    )
