"""ERQ

Source: arXiv 2407.06794
Differs
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe

ABSORB = 1.0
FLIPS = 100


@recipe
def erq(
    weight_bits: int,
    act_bits: int,
    aqer: bool = True,
    refine: bool = True,
    compensate: bool = True,
    flow: str = "parallel",
) -> Recipe:
    """Weights that make up for quantized inputs (Aqer), rounded in halves that make up for one another (Wqer)."""
    fit = PassSpec.of("fit", method="percentile_mse", weight_method="mse", flow="prefix")
    halves = PassSpec.of(
        "round_halves", absorb=ABSORB if aqer else 0.0, flips=FLIPS if refine else 0, compensate=compensate, flow=flow
    )
    folded = (roles.QKV_IN, roles.FC1_IN, roles.MERGE_IN)
    return Recipe(
        name="erq",
        paper="arXiv 2407.06794",
        formats=(
            Rule(Format("uniform", act_bits)),
            Rule(Format("uniform", act_bits, "channel"), roles=folded, after_norm=True),
            Rule(Format("logsqrt2", act_bits), roles=(roles.SOFTMAX_OUT,)),
            Rule(Format("uniform", 8), roles=(roles.PATCH_IN, roles.CONV_IN)),
            Rule(Format("uniform", weight_bits, "channel"), roles=(roles.WEIGHT,)),
        ),
        passes=(fit, PassSpec.of("fold_norm_scale"), fit, halves),
    )
