"""LSQ: weights, activations and their scales trained together, the plain baseline of quantization-aware training.

Source: Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv 1902.08153

Differs from the paper in that the float model's class probabilities are learned, too, so that it works without labels;
in that activations have zero-points, which stay as the first fit chose them; in that scales begin where that fit put
them (the paper: twice the mean magnitude over the root of the largest code); in that gradients of scales are not
divided by how many values share them, which AdamW does not see; and in that the first layer's input alone has 8 bits
(the paper: weights and inputs of the first and the last layer).
"""

from __future__ import annotations

from vitq.core.recipe import PassSpec, Recipe, recipe
from vitq.core.rules import uniform_but


@recipe
def lsq(
    weight_bits: int,
    act_bits: int,
    rate: float = 1e-5,
    scale_rate: float = 1e-3,
    labels: float = 1.0,
    logits: float = 1.0,
) -> Recipe:
    """Weights, activations and scales trained together. Baseline.

    Args:
        rate: of the parameters.
        scale_rate: of scales, in parts of their size.
        labels, logits: weights of the cross-entropy and of the divergence from the float model.
    """
    return Recipe(
        name="lsq",
        paper="arXiv 1902.08153",
        formats=uniform_but(weight_bits, act_bits),
        passes=(
            PassSpec.of("fit", method="percentile_mse", weight_method="percentile_mse"),
            PassSpec.of(
                "train",
                weights="learn",
                rate=rate,
                scale_rate=scale_rate,
                features=0.0,
                labels=labels,
                logits=logits,
            ),
        ),
        note="baseline",
    )
