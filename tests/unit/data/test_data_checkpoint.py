"""Weight files: wrappers, damage and what does not fit."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vitq.core.errors import CheckpointError
from vitq.data.checkpoint import load_checkpoint, read_checkpoint


def net(classes: int = 3) -> nn.Module:
    """A body and a head, so that names have dots."""
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, classes))


def loads(path: Path, reference: nn.Module) -> bool:
    model = net()
    load_checkpoint(model, path, num_classes=3)
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, wrapper: str, prefix: str) -> None:
    reference = net()
    state = {prefix + name: value for name, value in reference.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    assert loads(tmp_path / "w.pth", reference)
    save_file(state, tmp_path / "w.safetensors")
    assert loads(tmp_path / "w.safetensors", reference)


def test_a_prefix_that_belongs_to_the_model_stays(tmp_path: Path) -> None:
    model = nn.ModuleDict({"model": nn.Linear(2, 2)})
    torch.save(model.state_dict(), tmp_path / "w.bin")
    load_checkpoint(model, tmp_path / "w.bin")


def test_tables_that_the_model_computes_itself_may_be_in_the_file(tmp_path: Path) -> None:
    model = net()
    model[0].register_buffer("index", torch.arange(3), persistent=False)
    torch.save({**model.state_dict(), "0.index": torch.arange(3)}, tmp_path / "w.pt")
    load_checkpoint(model, tmp_path / "w.pt")


def test_what_does_not_fit_is_counted_and_named_and_nothing_is_changed(tmp_path: Path) -> None:
    state = net().state_dict()
    del state["0.weight"]
    state["1.weight"] = torch.zeros(5)
    state |= {f"extra.{i}": torch.zeros(1) for i in range(7)}
    torch.save(state, tmp_path / "w.pth")
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, tmp_path / "w.pth")
    message = str(caught.value)
    assert "1 missing: 0.weight" in message
    assert "7 unexpected: extra.0" in message
    assert "and 2 more" in message
    assert "1.weight (5,) for (8,)" in message
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_class_count_is_said_to_be_that(tmp_path: Path) -> None:
    torch.save(net(classes=5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"head of 5 classes .*built for 3.*num_classes=5"):
        load_checkpoint(net(), tmp_path / "w.pth", num_classes=3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_are_named(tmp_path: Path, value: float) -> None:
    state = net().state_dict()
    state["1.bias"] = torch.full((8,), value)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth: NaN or Inf .*1\.bias"):
        load_checkpoint(net(), tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 300])
def test_a_truncated_file_is_one_clear_error(tmp_path: Path, name: str, kept: int) -> None:
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(net().state_dict(), path)
    else:
        save_file(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)


class Surprise:
    """Something that unpickling would have to import."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": Surprise()}, "never unpickles"),
        ({"epoch": 3}, "top-level keys are epoch"),
        ([torch.zeros(1)], "holds a list"),
    ],
)
def test_a_file_without_plain_weights_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "w.pth")


def test_a_missing_file_and_a_foreign_extension_say_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        read_checkpoint(tmp_path / "none.pth")
    (tmp_path / "w.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="unknown kind"):
        read_checkpoint(tmp_path / "w.onnx")


def test_half_precision_weights_load_as_float32(tmp_path: Path) -> None:
    reference = net().half()
    torch.save(reference.state_dict(), tmp_path / "w.pth")
    model = net()
    load_checkpoint(model, tmp_path / "w.pth")
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, reference[0].weight.float())
