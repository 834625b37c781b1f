"""How close a quantized model is to its float model, without labels.

Units: SQNR in dB, KL in nats per image, agreement in percent
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitq.core.logits import logits_of
from vitq.core.progress import Progress, Silent
from vitq.core.qmodel import QuantModel, SiteQuantizer
from vitq.evaluate.metrics import logit_kl, rounded, rounded_small


@dataclass(frozen=True)
class SiteFidelity:
    """What quantization does to one site's tensor, as it arrives there in the quantized model."""

    site: str
    role: str
    format: str
    sqnr: float


@dataclass(frozen=True)
class Fidelity:
    """Label-free comparison of a quantized model with its float model.

    Attributes:
        images: how many.
        agreement: share of images with the same top-1 class, percent.
        logit_kl: mean KL(float || quantized) over images, nats.
        logit_sqnr: signal-to-noise ratio of the logits, dB.
        sites: activation sites in execution order; weights too if the quantized model still has its float
            weights.
    """

    images: int
    agreement: float
    logit_kl: float
    logit_sqnr: float
    sites: list[SiteFidelity]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "images": self.images,
            "agreement": rounded(self.agreement),
            "logit_kl": rounded_small(self.logit_kl),
            "logit_sqnr": rounded(self.logit_sqnr),
            "sites": [asdict(s) | {"sqnr": rounded(s.sqnr)} for s in self.sites],
        }


class Power:
    """Sums of squares of a signal and of its quantization error."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0

    def add(self, signal: Tensor, approximation: Tensor) -> None:
        wide = signal.double()
        self.signal += float(wide.square().sum())
        self.noise += float((approximation.double() - wide).square().sum())

    @property
    def sqnr(self) -> float:
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


@torch.no_grad()
def fidelity(
    float_model: nn.Module, qmodel: QuantModel, batches: Iterable[Tensor], progress: Progress | None = None
) -> Fidelity:
    """Compare a quantized classifier with its float model on unlabelled images.

    Args:
        batches: image tensors (B, C, H, W).

    Raises:
        InputError: an output in which no logits are found.
    """
    powers = {site.id: Power() for site in qmodel.sites()}
    logits = Power()
    agree, kl, images = 0, 0.0, 0

    def look(name: str, quantizer: SiteQuantizer, x: Tensor) -> None:
        powers[name].add(x, quantizer.quantized(x))

    for site in qmodel.sites():
        if not qmodel.quantizers[site].baked:
            qmodel.quantizers[site].observer = partial(look, site.id)
    try:
        with (progress or Silent()).task("fidelity", 0) as task:
            for batch in batches:
                expected, found = logits_of(float_model(batch)), logits_of(qmodel(batch))
                logits.add(expected, found)
                agree += int((expected.argmax(1) == found.argmax(1)).sum())
                kl += float(logit_kl(expected, found).sum())
                images += batch.shape[0]
                task.advance()
    finally:
        for site in qmodel.sites():
            qmodel.quantizers[site].observer = None
    sites = [
        SiteFidelity(site.id, site.role, str(qmodel.formats[site.id]), powers[site.id].sqnr)
        for site in qmodel.sites()
        if powers[site.id].signal or powers[site.id].noise
    ]
    return Fidelity(images, 100.0 * agree / images, kl / images, logits.sqnr, sites)
