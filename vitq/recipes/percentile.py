"""Percentile: activation ranges leave out the most extreme values.

Source: McKinstry et al., arXiv 1809.04191; Wu et al., arXiv 2004.09602, section 4.2

As `minmax`, but activations are clipped to their [1 - p, p] quantiles. Differs from both papers in the
default p = 0.9999 for ViTs, which have rare, meaningful outliers.
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe


@recipe
def percentile(weight_bits: int, act_bits: int, p: float = 0.9999) -> Recipe:
    """Ranges between the 0.01 % and 99.99 % quantiles: clips what is rare."""
    return Recipe(
        name="percentile",
        paper="arXiv 2004.09602",
        formats=(
            Rule(Format("uniform", act_bits)),
            Rule(Format("uniform", 8), roles=(roles.PATCH_IN,)),
            Rule(Format("uniform", weight_bits, "channel"), roles=(roles.WEIGHT,)),
        ),
        passes=(PassSpec.of("fit", method="percentile", percentile=p),),
    )
