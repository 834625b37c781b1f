"""Liu et al. 2021: ranges by the correlation of outputs, attention scores by their ranking, biases corrected.

Source: Liu et al., Post-Training Quantization for Vision Transformer, NeurIPS 2021, arXiv 2106.14156. No public code.

Symmetric uniform formats. Linears: the Pearson correlation of the output; attention scores: that, and a hinge on the
order of the scores in a row. Operands are searched in turn until nothing changes, for at most 20 rounds, in 0.5 to 1.2
of the largest magnitude.

It differs from the paper in that 100 factors are tried (their number is not given; 100 in the code of PTQ4ViT's
baseline, which cites it), that the hinge is a mean over six offsets of pairs (a sum over all pairs in the paper, whose
weight would depend on the number of tokens), that outputs are judged on a sample of rows (passes/fit_products.py), that
biases are corrected once, after the search (after every round in the paper), that weights have a scale per output
channel, and that mixed precision is not part of it.
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe


@recipe
def liu2021(
    weight_bits: int, act_bits: int, objective: str = "ranking", rounds: int = 20, correct: bool = True
) -> Recipe:
    """Ranges by the correlation of outputs and the ranking of attention scores, then biases."""
    search = PassSpec.of("fit_products", objective=objective, low=0.5, high=1.2, rounds=rounds)
    return Recipe(
        name="liu2021",
        paper="arXiv 2106.14156",
        formats=(
            Rule(Format.of("uniform", act_bits, symmetric=True)),
            Rule(Format.of("uniform", 8, symmetric=True), roles=(roles.PATCH_IN,)),
            Rule(Format.of("uniform", weight_bits, "channel", symmetric=True), roles=(roles.WEIGHT,)),
        ),
        passes=(PassSpec.of("fit"), search, *([PassSpec.of("correct_bias")] if correct else [])),
    )
