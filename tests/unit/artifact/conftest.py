"""What tests of artifacts share: zoo models, and quantized ones that are made once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import vitq
from vitq.artifact import schema
from vitq.core.errors import ArtifactError
from vitq.core.qmodel import QuantModel
from vitq.data.source import load_model
from vitq.data.zoo import seeded_images

CALIB, UNSEEN = seeded_images(8, seed=0), seeded_images(6, seed=1)


@cache
def zoo(name: str) -> nn.Module:
    """A zoo model; nobody may change it."""
    return load_model(f"zoo:{name}").model


def source_of(name: str) -> dict[str, Any]:
    return {"kind": "zoo", "spec": f"zoo:{name}", "name": name, "num_classes": 10}


class Tiny(nn.Module):
    """A norm whose linear has no bias (a rewrite adds one): small enough to damage it hundreds of times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.fc1, self.fc2 = nn.Linear(6, 7, bias=False), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(self.norm(self.stem(x)))))  # type: ignore[no-any-return]


def tiny() -> nn.Module:
    torch.manual_seed(3)
    return Tiny().eval()


TINY_IN = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(0))


def tiny_qmodel(bits: str = "w4a4", recipe: str = "repq_vit") -> QuantModel:
    return vitq.quantize(tiny(), recipe, bits, TINY_IN)


def quantized(name: str, recipe: str = "repq_vit", bits: str = "w4a4", **options: Any) -> QuantModel:
    """A zoo model, quantized and named."""
    qmodel = vitq.quantize(zoo(name), recipe, bits, CALIB, **options)
    qmodel.source = source_of(name)
    return qmodel


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor = UNSEEN) -> Tensor:
    result = model(x)
    assert isinstance(result, Tensor)
    return result


def fresh(name: str) -> nn.Module:
    return copy.deepcopy(zoo(name))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any], *, sign: bool = True) -> None:
    """Change config.json; with sign its own digest is made right again."""
    path = folder / schema.CONFIG
    data = json.loads(path.read_text(encoding="utf-8"))
    digest = data.pop("digest")
    change(data)
    path.write_text(json.dumps(data | {"digest": schema._digest(data) if sign else digest}), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change model.safetensors, and make every digest right again."""
    path = folder / schema.TENSORS
    with safe_open(path, framework="pt") as file:
        metadata: Mapping[str, str] = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    change(tensors)
    save_file(tensors, path, metadata=dict(metadata))
    edit_config(folder, lambda data: data.update(tensors_sha256=schema.sha256_of(path)))


def refusal(path: Path, **options: Any) -> str:
    """The one ArtifactError that loading gives."""
    with pytest.raises(ArtifactError) as caught:
        vitq.load(path, **options)
    message = str(caught.value)
    assert "\n" not in message.strip()
    return message
