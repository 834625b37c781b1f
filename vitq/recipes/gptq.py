"""GPTQ: weight codes chosen column by column, each making up for the errors of those before it. A modifier.

Source: Frantar et al., ICLR 2023, arXiv 2210.17323

Differs from the official code in that scales are those of the recipe and not chosen again on the way, that the inputs
are the quantized ones, that damping is stronger (0.3 of the mean diagonal instead of 0.01), and that nearest rounding
stays for rows that come out worse, and for weights with more inputs than there are tokens.
"""

from __future__ import annotations

from vitq.core.recipe import Modifier, PassSpec, modifier


@modifier
def gptq(weight_bits: int, act_bits: int) -> Modifier:
    """Weight codes by the error of the outputs, column by column."""
    return Modifier("gptq", "arXiv 2210.17323", "round", (PassSpec.of("round_columns"),))
