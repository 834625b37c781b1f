"""A recipe without a paper, and small modules, for tests of the graph floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitq.core import roles
from vitq.core.format import Format
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.pipeline import quantize


class Small(nn.Module):
    """Projections of 32 channels in 4 heads, spare parameters, and a forward given from outside."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.p = nn.Parameter(torch.randn(32, 8) / 6)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)

    def heads(self, x: Tensor) -> list[Tensor]:
        """Query, key, value as (B, H, N, D)."""
        return [m(x).unflatten(-1, (4, 8)).transpose(1, 2) for m in (self.q, self.k, self.v)]


def _plain(bits: int, flow: str) -> Recipe:
    rules = (Rule(Format("uniform", bits)), Rule(Format("uniform", bits, "channel"), (roles.WEIGHT,)))
    return Recipe(f"plain{bits}", "none", rules, (PassSpec.of("fit", flow=flow),))


@pytest.fixture
def plain() -> Callable[..., QuantModel]:
    """Quantize everything uniformly: plain(model, data, bits=16, **quantize's own)."""

    def make(model: nn.Module, data: Any, bits: int = 16, flow: str = "parallel", **kwargs: Any) -> QuantModel:
        return quantize(model, _plain(bits, flow), "w4a4", data, **{"freeze": False, **kwargs})

    return make


@pytest.fixture
def small() -> Callable[[Callable[..., Any]], Small]:
    """Build a Small in eval mode."""
    return lambda run: Small(run).eval()


@pytest.fixture
def tokens() -> Tensor:
    """(2 images, 16 tokens, 32 channels)"""
    return torch.randn(2, 16, 32)


@pytest.fixture
def images() -> Tensor:
    """(3 images, 3, 32, 32)"""
    return torch.randn(3, 3, 32, 32)


def _awake(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.fixture
def vit() -> nn.Module:
    """A timm ViT of two blocks."""
    return _awake(VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10))


@pytest.fixture
def swin() -> nn.Module:
    """A timm Swin of two stages, with shifted and masked windows and a relative position bias."""
    return _awake(
        SwinTransformer(
            img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=10
        )
    )


@pytest.fixture
def sqnr() -> Callable[[Tensor, Tensor], float]:
    """Signal to quantization noise in dB."""

    def ratio(exact: Tensor, other: Tensor) -> float:
        noise = (exact - other).double().square().sum().clamp_min(1e-30)
        return float(10 * torch.log10(exact.double().square().sum() / noise))

    return ratio
