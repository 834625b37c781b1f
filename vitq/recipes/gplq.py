"""GPLQ: train the scales of activations first, with weights in float, then quantize the weights. A reconstruction.

Source: Liang et al., NeurIPS 2025, arXiv 2506.11784; no code was published

Stage 1 trains scales, and float weights at a tiny rate, so that the features before the head stay those of the float
model along their main directions (60 % of the variance). Stage 2 quantizes the weights, with a scale per output
channel.

Differs from the paper in what, taken together, did better with 100 photos (one draw, results/training.csv). With 600
photos the divergence from the float model is 0.04 to 0.09 nats below that of `vitq_calib` (three draws).
Channel scales behind LayerNorms are folded before training, exactly: norms and weights are trained, so that channels
can still move (the paper has channel scales everywhere, and does not say how they are deployed). Attention
probabilities and what comes behind GELU have adaptive logarithms (AdaLog), and ranges are searched by the error of
products before training. In stage 2 codes are chosen column by column (GPTQ), and biases stay as they were trained:
corrected towards what the weights give without quantizers, they would undo what was learned. With `columns=false` codes
are the nearest ones, and every block gets a linear map (QwT), as in the paper. Ranges are not symmetric. Scales
have a rate of their own, in parts of their size, as the paper's rate alone would hardly move them in few steps. Where
examples have labels the cross-entropy is added with a weight of one, which the paper does not give.
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe
from vitq.core.rules import behind_gelu, channels_behind_norms, uniform_but

SEARCHED = "adaptive_log"


@recipe
def gplq(
    weight_bits: int,
    act_bits: int,
    rate: float = 1e-5,
    scale_rate: float = 2e-3,
    features: float = 1.0,
    labels: float = 1.0,
    logits: float = 0.0,
    variance: float = 0.6,
    softmax: str = SEARCHED,
    gelu: str = SEARCHED,
    search: bool = True,
    columns: bool = True,
) -> Recipe:
    """Activations are trained first, weights quantized later. Reconstruction.

    Args:
        rate: of the float weights; the paper's is 5e-6 for batches of 128.
        scale_rate: of activation scales, in parts of their size.
        features, labels, logits: weights of the parts of the loss (passes/train/stage.py).
        variance: share of the features' variance that is compared.
        softmax: format of attention probabilities.
        gelu: format behind GELU.
        search: ranges of activations by the error of products, before training.
        columns: codes of weights column by column; else the nearest, and a map beside each block.
    """
    fit = PassSpec.of("fit", method="percentile_mse", weight_method="percentile_mse", flow="prefix")
    train = PassSpec.of(
        "train", rate=rate, scale_rate=scale_rate, features=features, labels=labels, logits=logits, variance=variance
    )
    by_products = PassSpec.of("fit_products", objective="mse", rounds=1, steps=16, weights=False)
    rounded = PassSpec.of("round_columns", weighted=True)
    after_gelu = Format.of(gelu, act_bits, shifted=True) if gelu == SEARCHED else Format(gelu, act_bits)
    return Recipe(
        name="gplq",
        paper="arXiv 2506.11784",
        formats=uniform_but(
            weight_bits,
            act_bits,
            channels_behind_norms(act_bits),
            *behind_gelu(after_gelu),
            Rule(Format(softmax, act_bits), roles=(roles.SOFTMAX_OUT,)),
        ),
        passes=(
            fit,
            PassSpec.of("fold_norm_scale"),
            fit,
            *((by_products,) if search else ()),
            train,
            fit,
            rounded if columns else PassSpec.of("compensate_blocks", weights_only=True),
            *((PassSpec.of("fold_input_shift"),) if gelu == SEARCHED else ()),
        ),
        note="a reconstruction: no code was published",
    )
