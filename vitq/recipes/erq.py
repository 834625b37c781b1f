"""ERQ: weights that make up for quantized inputs (Aqer), then codes half by half that make up for one another (Wqer).

Source: Zhong et al., ICML 2024, and as "Towards Accurate Post-Training Quantization of Vision Transformers via Error
Reduction", TPAMI 2025, arXiv 2407.06794; official code zysxmu/ERQ at 2f5b4ce

Formats and folding are those of RepQ-ViT (arXiv 2212.08254), with log base sqrt(2) after softmax. The formulas are in
`passes/round/halves.py`. As in the official code, inputs are those of the folded float model, quantized at the linear
itself only; `flow="prefix"` takes those of the quantized prefix.

Differs from the official code:

- The strengths of the ridges are in parts of the mean variance of the inputs (1 for Aqer, 0.3 for Wqer). The code adds
  1,000 to sums of squares over all tokens, which is between 0.1 and 13 of the mean for DeiT-Tiny on 32 images, and less
  with more images, and 0.1 for the head.
- The bias is not damped: it takes up the whole difference of means. Linears without a bias get one; on the official
  code's way through Wqer such a linear (Swin's merging) stops in a debugger.
- A code is flipped where that lowers the error most, after what the columns left will make up for. The code flips where
  the gradient is largest, in a metric that does not know of them, and stops at the first flip that fails.
- A linear with fewer than two tokens per input (the head, with 32 images) keeps nearest codes: a regression on so few
  makes it worse on other images. The patch embedding takes part in both (in the code, in Wqer only).
- Weights have one scale per output channel, chosen among 100 shrunken ranges. The code has ten percentiles, and for qkv
  and fc1 two scales per channel, the second for 15 to 20 % of the inputs, chosen by their outliers ("dual uniform"):
  groups of inputs that do not lie side by side, which no layout of ours has, nor an integer kernel.
- Codes fit their bits, zero-points are whole, constant channels have no scale (the code divides 0 by 0), and the input
  of the patch embedding is quantized (to 8 bits); activations are calibrated with quantized weights. As in `repq_vit`.
"""

from __future__ import annotations

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule, recipe
from vitq.core.rules import channels_behind_norms, uniform_but

ABSORB = 1.0
FLIPS = 100


@recipe
def erq(
    weight_bits: int,
    act_bits: int,
    aqer: bool = True,
    refine: bool = True,
    compensate: bool = True,
    flow: str = "parallel",
) -> Recipe:
    """Weights that make up for quantized inputs, rounded in halves that make up for one another."""
    fit = PassSpec.of("fit", method="percentile_mse", weight_method="mse", flow="prefix")
    halves = PassSpec.of(
        "round_halves", absorb=ABSORB if aqer else 0.0, flips=FLIPS if refine else 0, compensate=compensate, flow=flow
    )
    return Recipe(
        name="erq",
        paper="arXiv 2407.06794",
        formats=uniform_but(
            weight_bits,
            act_bits,
            channels_behind_norms(act_bits),
            Rule(Format("logsqrt2", act_bits), roles=(roles.SOFTMAX_OUT,)),
        ),
        passes=(fit, PassSpec.of("fold_norm_scale"), fit, halves),
    )
