"""AdaLog: logarithms to a base that is searched for, after softmax and after GELU, and scales searched coarse to fine.

Source: Wu et al., ECCV 2024, arXiv 2407.12951; official code GoatWu/AdaLog at 75a57d2, without its `--optimize`

Attention probabilities and GELU's output have logarithms to a base 2**(q / 37) whose q is searched; GELU's output is
shifted by its minimum first, and the shift moves into the next bias. Inputs of linears behind a LayerNorm get channel
scales, which the norm takes up. Operands are searched by their own error first, then in turn by that of the product.

Differs from the official code in that candidates are judged on a sample of rows (passes/fit_products.py), that codes
fit their bits (the code keeps an extra zero level; `parity=True` has it), that merged zero-points are whole numbers
in code range, that the folding is done at any pair of widths (in the code where both are the same), and that the
input of the patch embedding has 8 bits (there float, as nothing is quantized from 8 bits on).
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe
from vitq.core.rules import behind_gelu, channels_behind_norms, uniform_but

SQRT_TWO = 18.5  # q of base sqrt(2)
CHANNEL_ROWS = 8192  # 32 images of 197 tokens have 6304: what a sample leaves out is clipped, which 8 bits show


@recipe
def adalog(
    weight_bits: int,
    act_bits: int,
    adaptive: bool = True,
    progressive: bool = True,
    gelu: str = "adaptive_log",
    fold: bool = True,
    fold_shift: bool = True,
    heads: bool = True,
    parity: bool = False,
    rounds: int = 3,
    rows: int = 1536,
    steps: int = 128,
) -> Recipe:
    """Searched logarithm bases after softmax and GELU, scales by the error of the products, found coarse to fine."""
    base = 0.0 if adaptive else SQRT_TWO
    softmax = Format.of("adaptive_log", act_bits, unit=True, fixed=base, extra_zero_level=parity)
    shifted = Format.of("adaptive_log", act_bits, shifted=True, fixed=base, extra_zero_level=parity)
    search = "progressive" if progressive else "grid"
    channels = PassSpec.of("fit_products", search=search, mixed=True, rows=CHANNEL_ROWS, steps=steps)
    fit = PassSpec.of("fit_products", search=search, alone=True, rounds=rounds, rows=rows, steps=steps)
    return Recipe(
        name="adalog",
        paper="arXiv 2407.12951",
        formats=uniform_but(
            weight_bits,
            act_bits,
            *(
                (Rule(Format("uniform", act_bits, "head"), (roles.QUERY, roles.KEY, roles.VALUE), axis="head"),)
                if heads
                else ()
            ),
            *((channels_behind_norms(act_bits),) if fold else ()),
            *(behind_gelu(shifted) if gelu == "adaptive_log" else ()),
            Rule(softmax, (roles.SOFTMAX_OUT,)),
        ),
        passes=(
            PassSpec.of("fit"),
            *((channels, PassSpec.of("fold_norm_scale"), PassSpec.of("fit")) if fold else ()),
            fit,
            *((PassSpec.of("fold_input_shift"),) if fold_shift else ()),
        ),
    )
