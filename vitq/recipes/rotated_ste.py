"""Rotated STE: channels are mixed by random orthogonal matrices, and then weights and activations trained together.

Source: the idea is RoSTE's, Wei et al., ICML 2025, arXiv 2502.09003, which trains language models so

Differs from RoSTE in that matrices are drawn once and used wherever the channels are free (`rotation`), where the paper
chooses between a random Hadamard matrix and none for each layer, again every few hundred steps; in that all of them are
merged into the weights, so that nothing is computed for them at inference; and as `lsq` differs from its paper.
"""

from __future__ import annotations

from vitq.core.recipe import PassSpec, Recipe, recipe
from vitq.core.rules import uniform_but


@recipe
def rotated_ste(
    weight_bits: int,
    act_bits: int,
    rate: float = 1e-5,
    scale_rate: float = 1e-3,
    labels: float = 1.0,
    logits: float = 1.0,
) -> Recipe:
    """Rotated channels, then weights, activations and scales trained together. Baseline.

    Args:
        rate: of the parameters.
        scale_rate: of scales, in parts of their size.
        labels, logits: weights of the cross-entropy and of the divergence from the float model.
    """
    return Recipe(
        name="rotated_ste",
        paper="arXiv 2502.09003",
        formats=uniform_but(weight_bits, act_bits),
        passes=(
            PassSpec.of("rotate", needed=False),
            PassSpec.of("fit", method="percentile_mse", weight_method="percentile_mse"),
            PassSpec.of(
                "train", weights="learn", rate=rate, scale_rate=scale_rate, features=0.0, labels=labels, logits=logits
            ),
        ),
        note="a reconstruction; baseline",
    )
