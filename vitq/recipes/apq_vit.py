"""APQ-ViT: scales judged at the end of their block (BBC), the large end of attention probabilities kept (MPQ).

Source: Ding et al., ACM MM 2022, arXiv 2303.14341. The one public port, PaddlePaddle/PaddleSlim example/APQ_ViT, holds
neither method whole: its "gradient" is the output itself, and linear inputs stay in float.

**A reconstruction.** What is public are the two ideas, the port's formats and grids, and that the smallest tenth of the
errors is left out. BBC here: the error that a candidate leaves at the end of its block, weighed there by squared
gradients of the divergence, is taken to first order, by pulling that metric back to the site with one backward
(calibrate/sensitivity.py); the smallest tenth of a candidate's errors is left out. MPQ here: affine uniform codes for
probabilities instead of logarithmic ones. GELU's output keeps the twin format of PTQ4ViT, as in the port.

It differs from the port in that weights have a scale per output channel (there one per linear, three for query, key
and value), that the patch embedding's input has 8 bits (there float), that the tenth is taken for each candidate (there
for all that are scored together), that candidates are judged on a sample of rows (passes/fit_products.py), and in the
grids. Those of linears, queries, keys and values go down to 0.1 of the range (there 0.7 and 0.9: with those almost
nothing is left at 4 bits once their inputs are quantized), and that of probabilities to 0.02 (there 0.9, as if nothing
of the large end was to be clipped; `softmax_low=0.9` is measured on the method's page). Half of all weight goes to
errors alike, instead of all by gradients (docs/decisions/products.md).
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe
from vitq.core.rules import behind_gelu, uniform_but


@recipe
def apq_vit(
    weight_bits: int,
    act_bits: int,
    softmax: str = "uniform",
    gelu: str = "twin_gelu",
    objective: str = "blockwise",
    rounds: int = 3,
    softmax_low: float = 0.02,
) -> Recipe:
    """Scales by the error at the end of the block, its smallest tenth left out. Reconstruction.

    Args:
        softmax: format of attention probabilities; log2 is what the paper compares with.
        gelu: format behind GELU.
        objective: how scales are judged (calibrate/objective.py).
        rounds: over the operands of each product.
        softmax_low: where the grid for probabilities begins, in parts of their range; 0.9 is the port's.
    """
    heads = (roles.QUERY, roles.KEY, roles.VALUE)
    return Recipe(
        name="apq_vit",
        paper="arXiv 2303.14341",
        formats=uniform_but(
            weight_bits,
            act_bits,
            Rule(Format("uniform", act_bits, "head"), roles=heads),
            Rule(Format(softmax, act_bits, "head"), roles=(roles.SOFTMAX_OUT,)),
            *behind_gelu(Format(gelu, act_bits)),
        ),
        passes=(
            PassSpec.of("fit"),
            PassSpec.of("fit_products", objective=objective, rounds=rounds, low=0.1, high=1.2, softmax_low=softmax_low),
        ),
        note="a reconstruction: the paper's formulas are not public",
    )
