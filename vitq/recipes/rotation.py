"""Rotation: channels mixed by random orthogonal matrices, so that none stands out. A modifier.

Source: QuaRot, Ashkboos et al., NeurIPS 2024, arXiv 2404.00456, whose matrices inside of heads and of the residual
stream these are; the stream's go back to SliceGPT, Ashkboos et al., ICLR 2024, arXiv 2401.15024

Differs from QuaRot in that nothing is computed at inference: its Hadamard products before the second linear of an MLP
and of cached keys are left out, so that the model stays what it was, with other weights. Differs from both in that
LayerNorm stays LayerNorm: the stream's matrix keeps the mean of the channels, and no mean has to be taken out of the
weights before. So it works per stage where tokens are merged before a norm (Swin), and for streams that are found by
data flow. Queries and keys are mixed by the weights that make them (no rotary embedding between), per head.
"""

from __future__ import annotations

from vitq.core.recipe import Modifier, PassSpec, modifier


@modifier
def rotation(
    weight_bits: int, act_bits: int, streams: bool = True, scores: bool = True, values: bool = True
) -> Modifier:
    """Random orthogonal bases for the residual stream and the heads, merged into the weights."""
    step = PassSpec.of("rotate", streams=streams, scores=scores, values=values)
    return Modifier("rotation", "arXiv 2404.00456", "rewrite", (step,))
