"""NoisyQuant.

Source: Liu et al., CVPR 2023, arXiv 2211.16056; official code kriskrisliu/NoisyQuant at ba544d1 and
kriskrisliu/PTQ4ViT_noisy at 61dd8b7

Differs
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe


@recipe
def noisyquant(weight_bits: int, act_bits: int, noise: bool = True, shift: bool = False) -> Recipe:
    """Symmetric uniform formats, and fixed noise in front of each linear's quantizer that its bias takes off again."""
    fit = PassSpec.of("fit", method="mse", flow="prefix")
    return Recipe(
        name="noisyquant",
        paper="arXiv 2211.16056",
        formats=(
            Rule(Format.of("uniform", act_bits, symmetric=True)),
            Rule(Format("uniform", 8), roles=(roles.PATCH_IN,)),
            Rule(Format.of("uniform", weight_bits, "channel", symmetric=True), roles=(roles.WEIGHT,)),
        ),
        passes=(fit, PassSpec.of("add_noise", shift=shift)) if noise else (fit,),
    )
