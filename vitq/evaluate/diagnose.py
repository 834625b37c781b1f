"""Where the loss comes from: quantize one group of sites at a time, rank by the KL it causes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vitq.core.errors import InputError
from vitq.core.logits import logits_of
from vitq.core.progress import Progress, Silent
from vitq.core.qmodel import QuantModel
from vitq.core.site import Site
from vitq.evaluate.metrics import logit_kl, rounded, rounded_small

GROUPINGS = ("site", "role", "block")
ALL = "(all)"


@dataclass(frozen=True)
class Suspect:
    """One group of sites, quantized alone.

    Attributes:
        name: site id, role or block.
        sites: how many it holds.
        kl: mean KL(float || quantized) over images, nats.
        agreement: share of images that keep their top-1 class, percent.
    """

    name: str
    sites: int
    kl: float
    agreement: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"kl": rounded_small(self.kl), "agreement": rounded(self.agreement)}


@torch.no_grad()
def diagnose(
    qmodel: QuantModel, images: Sequence[Tensor], by: str = "site", progress: Progress | None = None
) -> list[Suspect]:
    """Quantize each group alone and rank the groups, worst first. Ends with all of them, as "(all)".

    Args:
        qmodel: fitted, with its float weights: `quantize(..., freeze=False)` or `load(..., float_model=)`.
        images: batches (B, C, H, W). The cost is one forward of them per group.
        by: "site", "role" or "block".

    Raises:
        InputError: unknown grouping.
        VitqError: the float weights are gone.
    """
    groups = groups_of(qmodel, by)
    qmodel.set_state("off")
    try:
        expected = [logits_of(qmodel(x)) for x in images]
        found = []
        with (progress or Silent()).task(f"quantizing one {by} at a time", len(groups)) as task:
            for name, sites in groups.items():
                qmodel.set_state("on", sites)
                found.append(_suspect(name, len(sites), expected, [logits_of(qmodel(x)) for x in images]))
                qmodel.set_state("off", sites)
                task.advance()
    finally:
        qmodel.set_state("on")
    ranked = sorted(found[:-1], key=lambda s: -s.kl if not math.isnan(s.kl) else -math.inf)
    return [*ranked, found[-1]]


def groups_of(qmodel: QuantModel, by: str) -> dict[str, list[Site]]:
    """Sites by the name of their group; all of them come last, as ALL.

    Raises:
        InputError: unknown grouping.
    """
    if by not in GROUPINGS:
        raise InputError(f"cannot diagnose by {by!r}; use one of {', '.join(GROUPINGS)}")
    groups: dict[str, list[Site]] = {}
    for site in qmodel.sites():
        key = {"site": site.id, "role": site.role, "block": site.block or "(outside of blocks)"}[by]
        groups.setdefault(key, []).append(site)
    return groups | {ALL: qmodel.sites()}


def _suspect(name: str, sites: int, expected: list[Tensor], found: list[Tensor]) -> Suspect:
    before, after = torch.cat(expected), torch.cat(found)
    agreement = (before.argmax(1) == after.argmax(1)).double().mean()
    return Suspect(name, sites, float(logit_kl(before, after).mean()), 100 * float(agreement))
