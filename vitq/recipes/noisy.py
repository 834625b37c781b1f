"""Noisy bias: a fixed vector in front of each linear's quantizer, which its bias takes off again. A modifier.

Source: NoisyQuant, Liu et al., CVPR 2023, arXiv 2211.16056; official code kriskrisliu/NoisyQuant at ba544d1 and
kriskrisliu/PTQ4ViT_noisy at 61dd8b7

Differs from both codes as the recipe noisyquant does.
"""

from __future__ import annotations

from vitq.core.recipe import Modifier, PassSpec, modifier


@modifier
def noisy(weight_bits: int, act_bits: int) -> Modifier:
    """Fixed uniform noise on the inputs of linears, as strong as lowers the error of the output most."""
    return Modifier("noisy", "arXiv 2211.16056", "fit", (PassSpec.of("add_noise"),))
