"""Small models of transformers with random weights, and what they are quantized on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

import vitq
from vitq.core.qmodel import QuantModel

BASE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
DINO = {k: v for k, v in BASE.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "num_labels": 10,
}  # fmt: skip
SEGFORMER = {
    "depths": [1, 1], "num_encoder_blocks": 2, "hidden_sizes": [16, 32], "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16,
}  # fmt: skip

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", BASE | {"num_labels": 10}),
    "swin": ("SwinForImageClassification", "SwinConfig", SWIN),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", SEGFORMER),
    "backbone": ("Dinov2Backbone", "Dinov2Config", DINO | {"out_features": ["stage1", "stage2"]}),
}


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


CALIB, UNSEEN = images(8), images(5, seed=1)


@cache
def float_model(name: str) -> Any:
    """Nobody may change it."""
    model, config, settings = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


@cache
def quantized(name: str, recipe: str = "minmax", bits: str = "w4a4", **settings: Any) -> QuantModel:
    """Nobody may change it."""
    return vitq.quantize(float_model(name), recipe, bits, CALIB, **settings)


def outputs(model: Callable[[Tensor], Any], x: Tensor = UNSEEN) -> list[Tensor]:
    """All tensors of an output."""
    with torch.no_grad():
        found = model(x)
    values = found.values() if isinstance(found, dict) else found
    return [leaf for value in values for leaf in (value if isinstance(value, tuple) else (value,))]


def same(one: Callable[[Tensor], Any], other: Callable[[Tensor], Any]) -> bool:
    mine, theirs = outputs(one), outputs(other)
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))
