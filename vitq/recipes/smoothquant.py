"""SmoothQuant: outlier channels of activations are made smaller, and the weights behind them larger. A modifier.

Source: Xiao et al., ICML 2023, arXiv 2211.10438

Differs from the official code in that the values of an attention and its queries and keys are smoothed as well, where
that is exact, and that the factors of a layer have a geometric mean of 1, so that channels that are always zero stay
beside the others. On a recipe that gives every channel behind a LayerNorm a scale of its own the factors behind norms
cancel, up to rounding.
"""

from __future__ import annotations

from vitq.core.recipe import Modifier, PassSpec, modifier


@modifier
def smoothquant(
    weight_bits: int,
    act_bits: int,
    alpha: float = 0.5,
    norms: bool = True,
    values: bool = True,
    scores: bool = True,
) -> Modifier:
    """Half of the differences between channels (in logarithms) from activations into weights."""
    step = PassSpec.of("smooth_channels", alpha=alpha, norms=norms, values=values, scores=scores)
    return Modifier("smoothquant", "arXiv 2211.10438", "rewrite", (step,))
