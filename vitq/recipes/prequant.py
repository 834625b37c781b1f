"""PreQuant: all weights are quantized first, and then a few outliers are tuned. A reconstruction.

Source: Gong et al., PreQuant: A Task-agnostic Quantization Approach for Pre-trained Language Models, Findings of ACL
2023, arXiv 2306.00014; no results on vision models were published

Differs from the paper in that outliers are the largest weights of each matrix, half a percent of them; in that they
stay on the grid of their matrix while they are tuned, so that the artifact is packed as any other; in that activations
are quantized, too, by ranges that stay as they were fitted; and in that the float model's class probabilities are
learned, so that it works without labels.
"""

from __future__ import annotations

from vitq.core.recipe import PassSpec, Recipe, recipe
from vitq.core.rules import uniform_but


@recipe
def prequant(
    weight_bits: int,
    act_bits: int,
    rate: float = 1e-4,
    outliers: float = 0.005,
    labels: float = 1.0,
    logits: float = 1.0,
) -> Recipe:
    """Weights quantized first, then their outliers tuned. Reconstruction, baseline.

    Args:
        rate: of the outliers.
        outliers: share of the entries of each weight.
        labels, logits: weights of the cross-entropy and of the divergence from the float model.
    """
    return Recipe(
        name="prequant",
        paper="arXiv 2306.00014",
        formats=uniform_but(weight_bits, act_bits),
        passes=(
            PassSpec.of("fit", method="percentile_mse", weight_method="percentile_mse"),
            PassSpec.of(
                "train", weights="outliers", outliers=outliers, rate=rate, scale_rate=0.0,
                features=0.0, labels=labels, logits=logits,
            ),
        ),
        note="a reconstruction; baseline",
    )  # fmt: skip
