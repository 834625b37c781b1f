"""Min-max: every range covers all that was seen. The baseline that general toolkits start from.

Source: Jacob et al., CVPR 2018, arXiv 1712.05877

Weights have one affine scale per output channel, activations one per tensor; the network input has 8 bits, as
in all ViT papers since RepQ-ViT. Every site sees the float model's values. With `symmetric`, what runtimes multiply
fastest without zero-points has none: weights, and the operands of attention's products.
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe

OPERANDS = (roles.QUERY, roles.KEY, roles.VALUE)


@recipe
def minmax(weight_bits: int, act_bits: int, symmetric: bool = False) -> Recipe:
    """Ranges from minimum to maximum: simple, fast, and broken by outliers at 4 bits."""
    zero = {"symmetric": True} if symmetric else {}
    return Recipe(
        name="minmax",
        paper="arXiv 1712.05877",
        formats=(
            Rule(Format("uniform", act_bits)),
            Rule(Format("uniform", 8), roles=(roles.PATCH_IN,)),
            *((Rule(Format.of("uniform", act_bits, symmetric=True), roles=OPERANDS),) if symmetric else ()),
            Rule(Format.of("uniform", weight_bits, "channel", **zero), roles=(roles.WEIGHT,)),
        ),
        passes=(PassSpec.of("fit", method="minmax"),),
    )
