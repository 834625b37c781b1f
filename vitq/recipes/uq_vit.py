"""UQ-ViT: uniform codes everywhere. After softmax the largest probability of each row is kept apart (DeMax); at the
inputs of linears, channels are balanced between activations and weights, so that one scale serves them all (NormQuant).

Source: UQ-ViT, AAAI 2026 (it has no arXiv number); formulas from the official code, jiujiuwei/UQ-ViT at 3d7d4bb

Differs from the official code in four ways. Alphas are chosen by the error of the linear's own output on 256 rows, not
by that of the whole block on all images; with the code's model at w4a4 the divergence from the float model is 0.62 to
0.71 nats on three draws, with ours 0.01 to 0.06 more (results/parity_uq_vit.csv). Behind attention the ratio moves into
the value projection; the code divides at run time. Behind the activation function, where only that is possible,
`fc2=True` does it, and counts it; the default is off, as it is in the code with fewer than 256 calibration images.
Channels that are constant after a norm move into the bias (the code takes the range of GELU's dip for them). As in the
code, the probabilities that are kept apart and the steps of the rows are floats: products with probabilities are
integer products per row, scaled, plus one value row.
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe
from vitq.core.rules import uniform_but


@recipe
def uq_vit(
    weight_bits: int, act_bits: int, demax: bool = True, norm_quant: bool = True, proj: bool = True, fc2: bool = False
) -> Recipe:
    """Each row's largest probability kept apart; channels balanced between activations and weights.

    Args:
        demax: False for one uniform scale after softmax.
        norm_quant: False for one scale per tensor as it is, at the inputs of linears.
        proj: balance behind attention, too.
        fc2: balance behind the activation function, too, by a division at run time.
    """
    fit = PassSpec.of("fit", method="percentile_mse", weight_method="percentile_mse", flow="prefix")
    per_channel = Format("uniform", act_bits, "channel")
    elsewhere = (roles.PROJ_IN,) * proj + (roles.FC2_IN,) * fc2
    balanced: tuple[Rule, ...] = (
        Rule(per_channel, roles=(roles.QKV_IN, roles.FC1_IN, roles.MERGE_IN), after_norm=True),
    )
    balanced += (Rule(per_channel, roles=elsewhere),) if elsewhere else ()
    return Recipe(
        name="uq_vit",
        paper="AAAI 2026",
        formats=uniform_but(
            weight_bits,
            act_bits,
            *(balanced if norm_quant else ()),
            Rule(
                Format("demax", act_bits, "row") if demax else Format("uniform", act_bits), roles=(roles.SOFTMAX_OUT,)
            ),
        ),
        passes=(fit, PassSpec.of("balance_channels"), fit) if norm_quant else (fit,),
    )
