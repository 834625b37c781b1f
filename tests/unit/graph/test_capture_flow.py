"""Sites that the graph floor finds are finished block by block on the quantized prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitq.core.qmodel import QuantModel

Plain = Callable[..., QuantModel]


def _hf_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize("which", ["swin", "hf_vit", "vit"])
def test_three_micro_batches_finish_every_site(
    which: str, plain: Plain, request: pytest.FixtureRequest, sqnr: Callable[[Tensor, Tensor], float]
) -> None:
    model = _hf_vit().eval() if which == "hf_vit" else request.getfixturevalue(which)
    batches = list(torch.randn(3, 2, 3, 32, 32))
    streamed = plain(model, batches, flow="prefix")
    assert all(streamed.quantizers[s].fitted and streamed.quantizers[s].state == "on" for s in streamed.sites())
    at_once = plain(model, torch.cat(batches), flow="prefix")

    def logits(m: Any) -> Tensor:
        with torch.no_grad():
            out = m(batches[0])
        return out if isinstance(out, Tensor) else out.logits

    assert sqnr(logits(model), logits(streamed)) > 60
    # The same images, streamed or in one go, give the same ranges (up to the order of sums).
    for site in streamed.sites():
        mine, theirs = streamed.quantizers[site], at_once.quantizers[site]
        torch.testing.assert_close(mine.state_dict()["scale"], theirs.state_dict()["scale"], atol=1e-4, rtol=1e-3)
