"""GPLQ: train the scales of activations first, with weights in float, then quantize the weights. A reconstruction.

Source: Liang et al., NeurIPS 2025, arXiv 2506.11784; no code was published

Stage 1 trains scales, and float weights at a tiny rate, so that the features before the head stay those of the float
model along their main directions (60 % of the variance). Stage 2 gives weights a scale per output channel, and every
block a linear map for what that changed (QwT).

Differs from the paper in that channels have scales of their own only behind LayerNorms, where they can be folded
exactly (the paper has them everywhere, and does not say how they are deployed), in that ranges are not symmetric, and
in that scales have a rate of their own, in parts of their size, as the paper's rate alone would hardly move them in few
steps. Where examples have labels the cross-entropy is added with a weight of one, which the paper does not give.
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe


@recipe
def gplq(
    weight_bits: int,
    act_bits: int,
    rate: float = 5e-6,
    scale_rate: float = 1e-3,
    features: float = 1.0,
    labels: float = 1.0,
    logits: float = 0.0,
    variance: float = 0.6,
    softmax: str = "logsqrt2",
    method: str = "percentile_mse",
    weight_method: str = "percentile_mse",
) -> Recipe:
    """Activations are trained first, weights quantized later. Reconstruction.

    Args:
        rate: of the float weights.
        scale_rate: of activation scales, in parts of their size.
        features, labels, logits: weights of the parts of the loss (passes/train/stage.py).
        variance: share of the features' variance that is compared.
        softmax: format of attention probabilities.
        method: how activation ranges are chosen to begin with.
        weight_method: how weight ranges are chosen.
    """
    fit = PassSpec.of("fit", method=method, weight_method=weight_method)
    train = PassSpec.of(
        "train", rate=rate, scale_rate=scale_rate, features=features, labels=labels, logits=logits, variance=variance
    )
    folded = (roles.QKV_IN, roles.FC1_IN, roles.MERGE_IN)
    return Recipe(
        name="gplq",
        paper="arXiv 2506.11784",
        formats=(
            Rule(Format("uniform", act_bits)),
            Rule(Format("uniform", act_bits, "channel"), roles=folded, after_norm=True),
            Rule(Format(softmax, act_bits), roles=(roles.SOFTMAX_OUT,)),
            Rule(Format("uniform", 8), roles=(roles.PATCH_IN, roles.CONV_IN)),
            Rule(Format("uniform", weight_bits, "channel"), roles=(roles.WEIGHT,)),
        ),
        passes=(fit, train, PassSpec.of("fold_norm_scale"), fit, PassSpec.of("compensate_blocks")),
        note="a reconstruction: no code was published",
    )
