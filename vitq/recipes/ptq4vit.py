"""PTQ4ViT: twin uniform formats after softmax and GELU, scales by the Hessian-weighted error of every product.

Source: Yuan et al., ECCV 2022, arXiv 2111.12293; official code hahnyuan/PTQ4ViT at b42c790

Symmetric uniform formats elsewhere; 100 factors of the largest magnitude, 0.01 to 1.2, three rounds, as in the code.

Differs from the official code in that gradients are those of a defined probe (the code takes the gradient of the
divergence of the model from itself, which is float noise), that half of all weight goes to errors alike instead of by
gradients (docs/decisions/products.md), that candidates are judged on a sample of rows (passes/fit_products.py), that
weights have a scale per output channel (`weights="tensor"` for one per linear; the code has three for query, key and
value), that the split of a softmax format is not added to the values above it (quantizers/twin_uniform.py), and that
the input of the patch embedding has 8 bits (there float).
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe


@recipe
def ptq4vit(
    weight_bits: int,
    act_bits: int,
    softmax: str = "twin_softmax",
    gelu: str = "twin_gelu",
    objective: str = "hessian",
    rounds: int = 3,
    weights: str = "channel",
) -> Recipe:
    """Two ranges after softmax and GELU; every scale by what it does to the output, weighted with gradients."""

    def uniform(bits: int, per: str = "tensor") -> Format:
        return Format.of("uniform", bits, per, symmetric=True)

    after_softmax = Format.of(softmax, act_bits, unit=True) if softmax == "twin_softmax" else uniform(act_bits)
    after_gelu = Format.of(gelu, act_bits) if gelu == "twin_gelu" else uniform(act_bits)
    passes: tuple[PassSpec, ...] = (PassSpec.of("fit"),)
    if rounds:
        passes += (PassSpec.of("fit_products", objective=objective, low=0.01, high=1.2, rounds=rounds),)
    return Recipe(
        name="ptq4vit",
        paper="arXiv 2111.12293",
        formats=(
            Rule(uniform(act_bits)),
            Rule(uniform(act_bits, "head"), roles=(roles.QUERY, roles.KEY, roles.VALUE)),
            Rule(after_softmax, roles=(roles.SOFTMAX_OUT,)),
            *(Rule(after_gelu, (roles.FC2_IN,), producer=name) for name in ("gelu", "quick_gelu")),
            Rule(uniform(8), roles=(roles.PATCH_IN, roles.CONV_IN)),
            Rule(uniform(weight_bits, weights), roles=(roles.WEIGHT,)),
        ),
        passes=passes,
    )
