"""NoisyQuant: fixed noise in front of each linear's quantizer, which the bias takes off again.

Source: Liu et al., CVPR 2023, arXiv 2211.16056; official code kriskrisliu/NoisyQuant at ba544d1 and
kriskrisliu/PTQ4ViT_noisy at 61dd8b7

The paper's "NoisyQuant-Linear": symmetric uniform formats, weights per channel without clipping, activations per
tensor, clipped where the error of the product is least; then noise, as strong as lowers the error of the output most.
On other recipes, as the paper has it on PTQ4ViT, the modifier `noisy` adds it.

Differs from both codes in that 20 amplitudes up to two steps are tried (2,000 and 201 there: the curve is flat), on
2,048 inputs of a linear instead of all; that a linear has no noise where two folds over these do not gain by it, or
where there are fewer of them than channels; that noise is stored in 16 bits, and folded into the LayerNorm before a
linear where there is one; that the patch embedding has none, and an 8-bit input; and that the range [-m, m] reaches
half a step beyond the largest code, as in the second code. A static shift of up to a step precedes the noise, as in the
simple code (one and a half steps in the other); the paper does not describe it, and `shift=False` leaves it out. Noise
is uniform in (-1, 1) as in the paper and the second code; the simple code draws `randn * 2 - 1`, Gaussian around -1,
which is a slip. Its clip search sees the quantized prefix, ours the float model's values.
benchmarks/parity_noisyquant.py compares the parts on the same tensors.
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe


@recipe
def noisyquant(weight_bits: int, act_bits: int, clip: bool = True, noise: bool = True, shift: bool = True) -> Recipe:
    """Symmetric formats clipped by the error of products; fixed noise on the inputs of linears."""
    passes = [PassSpec.of("fit")]
    passes += [PassSpec.of("fit_products", low=0.1, high=1.0, weights=False)] if clip else []
    passes += [PassSpec.of("add_noise", shift=shift)] if noise else []
    return Recipe(
        name="noisyquant",
        paper="arXiv 2211.16056",
        formats=(
            Rule(Format.of("uniform", act_bits, symmetric=True)),
            Rule(Format.of("uniform", 8, symmetric=True), roles=(roles.PATCH_IN,)),
            Rule(Format.of("uniform", weight_bits, "channel", symmetric=True), roles=(roles.WEIGHT,)),
        ),
        passes=tuple(passes),
    )
