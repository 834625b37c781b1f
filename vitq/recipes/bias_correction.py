"""Bias correction: every linear gets back the mean that quantization took off its output. A modifier.

Source: Nagel et al., ICCV 2019, arXiv 1906.04721, section 4.2 and appendix D; for transformers Liu et al., NeurIPS
2021, arXiv 2106.14156, section 3.3

Differs from Liu et al. in that it is done once, after all scales are chosen, and not after every round of their search.
"""

from __future__ import annotations

from vitq.core.recipe import Modifier, PassSpec, modifier


@modifier
def bias_correction(weight_bits: int, act_bits: int) -> Modifier:
    """Mean outputs of the float model, by the biases."""
    return Modifier("bias_correction", "arXiv 1906.04721", "compensate", (PassSpec.of("correct_bias"),))
