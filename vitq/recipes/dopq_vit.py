"""DopQ-ViT: a tangent format after softmax (TanQ), the median as the scale that a LayerNorm takes up (MOSF).

Source: Yang et al., arXiv 2408.03291 (v1 August 2024, v3 June 2025). No code is public.

**A reconstruction.** The abstracts give the two ideas, not the formulas. TanQ is `quantizers/tan.py`; its center, slope
and top are chosen per attention map by the error of the product with the values (`passes/fit_attention.py`), on the
quantized model. MOSF: the scale that minimises the mean absolute deviation from the channels' scales is their median.
It differs from the paper further in that the block-wise optimisation is not part of it; the rest is that of RepQ-ViT.

With exact folding the choice of the median has no effect: any positive merged scale and whole zero-point give the same
codes (docs/decisions/rewrites.md). It has one in the arithmetic of the official RepQ-ViT code, which keeps the mean of
the zero-points with its fraction; a median of whole numbers is whole. docs/methods/dopq_vit.md
has accuracy with each of the two switched off.
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe
from vitq.core.rules import channels_behind_norms, uniform_but


@recipe
def dopq_vit(weight_bits: int, act_bits: int, softmax: str = "tan", aggregate: str = "median") -> Recipe:
    """Tangent levels after softmax chosen by the error of A V; median scales folded into LayerNorm. Reconstruction."""
    fit = PassSpec.of("fit", method="percentile_mse", weight_method="percentile_mse", flow="prefix")
    return Recipe(
        name="dopq_vit",
        paper="arXiv 2408.03291",
        formats=uniform_but(
            weight_bits,
            act_bits,
            channels_behind_norms(act_bits),
            Rule(Format(softmax, act_bits), roles=(roles.SOFTMAX_OUT,)),
        ),
        passes=(fit, PassSpec.of("fold_norm_scale", aggregate=aggregate), fit, PassSpec.of("fit_attention")),
        note="a reconstruction: the paper's formulas are not public",
    )
