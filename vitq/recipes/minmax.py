"""Min-max: every range covers all that was seen. The baseline that general toolkits start from.

Source: Jacob et al., CVPR 2018, arXiv 1712.05877

Weights have one affine scale per output channel, activations one per tensor; the network input has 8 bits, as
in all ViT papers since RepQ-ViT. Every site sees the float model's values.
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe


@recipe
def minmax(weight_bits: int, act_bits: int) -> Recipe:
    """Ranges from minimum to maximum: simple, fast, and broken by outliers at 4 bits."""
    return Recipe(
        name="minmax",
        paper="arXiv 1712.05877",
        formats=(
            Rule(Format("uniform", act_bits)),
            Rule(Format("uniform", 8), roles=(roles.PATCH_IN,)),
            Rule(Format("uniform", weight_bits, "channel"), roles=(roles.WEIGHT,)),
        ),
        passes=(PassSpec.of("fit", method="minmax"),),
    )
