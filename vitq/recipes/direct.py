"""Direct: what gplq does, but weights and activations trained together, in one stage. A baseline.

Source: the comparison that GPLQ, Liang et al., NeurIPS 2025, arXiv 2506.11784, makes with one epoch of training at the
final widths

Differs from `gplq` (vitq/recipes/gplq.py) in that alone: formats, ranges to begin with, and the loss are the same.
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe
from vitq.core.rules import behind_gelu, channels_behind_norms, uniform_but

LOG = "adaptive_log"


@recipe
def direct(
    weight_bits: int,
    act_bits: int,
    rate: float = 1e-5,
    scale_rate: float = 2e-3,
    features: float = 1.0,
    labels: float = 1.0,
    logits: float = 0.0,
    variance: float = 0.6,
) -> Recipe:
    """Weights and activations trained together by the features of the float model. Baseline.

    Args:
        rate: of the weights.
        scale_rate: of scales, in parts of their size.
        features, labels, logits: weights of the parts of the loss (passes/train/stage.py).
        variance: share of the features' variance that is compared.
    """
    fit = PassSpec.of("fit", method="percentile_mse", weight_method="percentile_mse", flow="prefix")
    after_gelu = Format.of(LOG, act_bits, shifted=True)
    return Recipe(
        name="direct",
        paper="arXiv 2506.11784",
        formats=uniform_but(
            weight_bits,
            act_bits,
            channels_behind_norms(act_bits),
            *behind_gelu(after_gelu),
            Rule(Format(LOG, act_bits), roles=(roles.SOFTMAX_OUT,)),
        ),
        passes=(
            fit,
            PassSpec.of("fold_norm_scale"),
            fit,
            PassSpec.of("fit_products", objective="mse", rounds=1, steps=16, weights=False),
            PassSpec.of(
                "train", weights="learn", rate=rate, scale_rate=scale_rate, features=features, labels=labels,
                logits=logits, variance=variance,
            ),
            PassSpec.of("fold_input_shift"),
        ),
        note="baseline",
    )  # fmt: skip
