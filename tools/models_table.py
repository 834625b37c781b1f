"""Write docs/models.md: what a trace finds in every model family of the conformance suite.

    python tools/models_table.py

tests/conformance/test_families.py fails when the page is not what this script gives.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "conformance"))
import detectors
import families_hf
import families_timm
from families import Family
from families_unseen import UNSEEN, UNSUPPORTED

from vitq.core import roles
from vitq.core.site import REASON_CONSTANT, Graph
from vitq.graph.trace import trace

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
HEADER = """\
# Models

Written by `python tools/models_table.py`; a test compares. Each row is a small configuration with random weights. No
family has code of its own: places are found by data flow (`docs/decisions/tracing.md`).

- *sites*: tensors that get a quantizer, weights included.
- *MACs quantized*: share of the matrix multiply-accumulates that depend on the input. What does not (position biases
  made by a small network, texts that are the same for every image) folds into a constant before deployment.
- *attentions*: products of attention probabilities with values. A model without any is quantized as linears and
  convolutions.
- *pairs*: LayerNorms whose output goes to linears alone, channel for channel, so that channel scales can be folded.
  A norm behind the linear (SwinV2), one that also feeds the residual (post-norm), RMSNorm and a bias that is put
  together at every call (BEiT, EVA-02) give none.
- *other*: sites of no special role (`OTHER_IN`); they get the recipe's plain format.

## Families that keep the whole contract

At least 99 % of the multiply-accumulates quantized, counts equal to an independent one, the same output with
quantizers off, 60 dB at 16 bits, every site live, identical outputs after `repq_vit` at w4a4, save and load.
"""
DETECTORS = """
## Detectors with images of several sizes

`tests/conformance/test_detectors.py`: torchvision's detectors with a Swin and with a plain vision transformer behind a
simple feature pyramid, and a padded batch of transformers. The share, the same output with quantizers off, identical
outputs after save and load; all recipes run on the first one but those that train.
"""
UNPREPARED = """
## Models that nobody prepared for

Not among the promised families. They keep the numeric part of the contract: share, the same output with quantizers
off, 60 dB at 16 bits. Where the trace called something by a wrong name (ConViT, MViTv2, SAM, AIMv2, GLPN, VitDet), the
mechanism was mended; none of them crashed. Attention without softmax over scores (EfficientViT, SwiftFormer, CoaT in
part, Mask2Former's deformable one) has no role of its own: its products are `OTHER_IN`.
"""
BELOW = """
## Models that stay below 99 %

A large part of their work is in calls that are not taken apart. They run, and `vitq inspect` names what is left in
float.
"""
COLUMNS = "| model | sites | MACs quantized | blocks | attentions | pairs | other | left float, and why |"


def row(family: Family) -> str:
    """One line of a table."""
    graph = trace(family.build(), family.batch(), family.forward_fn)
    constant = sum(c.macs for c in graph.calls if c.reason == REASON_CONSTANT)
    quantized = sum(c.macs for c in graph.calls if c.sites)
    cells = (
        f"`{family.name}`",
        len(graph.sites),
        f"{100 * quantized / (graph.macs - constant):.2f} %",
        len(graph.blocks),
        len(graph.with_roles(roles.VALUE)),
        len(graph.pairs),
        len(graph.with_roles(roles.OTHER_IN)),
        left_float(graph),
    )
    return f"| {' | '.join(map(str, cells))} |"


def left_float(graph: Graph) -> str:
    """What has no sites, by reason."""
    kinds = Counter(f"{c.detail or c.op}: {c.reason}" for c in graph.calls if c.reason)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing"


def table(families: list[Family]) -> str:
    """The rows of some families under their heading."""
    rule = "|---|" + "---:|" * 6 + "---|"
    return "\n".join(["", COLUMNS, rule, *map(row, families), ""])


def page() -> str:
    """All of docs/models.md."""
    promised = [*families_timm.PINNED, *families_hf.PINNED, *families_timm.FURTHER, *families_hf.FURTHER]
    parts = (
        HEADER,
        table(promised),
        DETECTORS,
        table(detectors.DETECTORS),
        UNPREPARED,
        table(UNSEEN),
        BELOW,
        table(UNSUPPORTED),
    )
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
