"""QwT: a linear map beside every block makes up for what quantization changed, in closed form. A modifier.

Source: Fu et al., Quantization without Tears, CVPR 2025, arXiv 2411.13918; official code wujx2001/QwT

Differs from the official code in that the strength of the ridge is chosen for each block by two folds over the
calibration images (the code has none), in that a map is left out where it gains nothing on images it was not fitted on
(the code asks for a positive R² on those it was), and in that maps are fitted on the recipe's own calibration images
(the code takes 512 augmented ones).
"""

from __future__ import annotations

from vitq.core.recipe import Modifier, PassSpec, modifier


@modifier
def qwt(weight_bits: int, act_bits: int) -> Modifier:
    """A linear map in 16 bits beside every block, fitted to what quantization changed."""
    return Modifier("qwt", "arXiv 2411.13918", "compensate", (PassSpec.of("compensate_blocks"),))
