"""Models in 16 bits, and models and images on other devices."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.core.batches import Batches, device_of
from vitq.data.zoo import build_zoo, seeded_images

CALIB, UNSEEN = seeded_images(8), seeded_images(4, seed=1)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here")


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    assert isinstance(found, Tensor)
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """Error beside the size of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("name", "dtype"), [("seeded_vit", torch.float16), ("seeded_vit", torch.bfloat16), ("seeded_swin", torch.float16)]
)
def test_16_bit_models_are_quantized_run_and_reload(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    calib, unseen = CALIB[:2], UNSEEN[:2]  # many CPUs multiply 16-bit numbers slowly
    model, low = build_zoo(name), build_zoo(name).to(dtype)
    expected = run(model, unseen)
    qmodel = vitq.quantize(low, "minmax", "w8a8", calib.to(dtype))
    found = run(qmodel, unseen.to(dtype))
    assert found.dtype == dtype
    # What 8 bits cost in float32, and what the type alone costs, may add up.
    alone = distance(run(vitq.quantize(model, "minmax", "w8a8", calib), unseen), expected)
    cast = distance(run(low, unseen.to(dtype)), expected)
    assert distance(found, expected) < 1.5 * (alone + cast)
    vitq.save(qmodel, tmp_path / "o")
    again = vitq.load(tmp_path / "o", model=build_zoo(name))  # which is float32, its attention masks too
    assert {p.dtype for p in again.model.parameters()} == {dtype}
    assert {b.dtype for b in again.model.buffers() if b.is_floating_point()} <= {dtype}
    assert torch.equal(run(again, unseen.to(dtype)), found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_scale_stays_float32(dtype: torch.dtype) -> None:
    qmodel = vitq.quantize(build_zoo("seeded_vit").to(dtype), "repq_vit", "w4a4", CALIB.to(dtype))
    before = [q.params()["scale"].clone() for q in qmodel.quantizers.children()]  # type: ignore[operator]
    for step in (qmodel, qmodel.float(), qmodel.to(dtype)):
        scales = [q.params()["scale"] for q in step.quantizers.children()]  # type: ignore[operator]
        assert all(s.dtype == torch.float32 and torch.equal(s, b) for s, b in zip(scales, before, strict=True))


def test_micro_batches_move_to_the_device_of_the_model() -> None:
    data = Batches.of([(CALIB, torch.zeros(8).long())]).on(torch.device("meta"))
    ((images, labels),) = list(data)
    assert images.device.type == labels.device.type == "meta"
    assert (data.count, data.sizes) == (8, [8])
    here = Batches.of([CALIB])
    assert next(iter(here.on(torch.device("cpu")))) is CALIB, "nothing is copied where it is already"


def test_a_model_spread_over_devices_is_left_to_itself() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert device_of(model) is None
    assert device_of(model[0]) == torch.device("cpu")
    assert device_of(nn.ReLU()) is None


@needs_cuda
@pytest.mark.parametrize("recipe", ["minmax", "percentile", "repq_vit"])
def test_a_cuda_model_takes_images_from_the_cpu(recipe: str, tmp_path: Path) -> None:
    model = build_zoo("seeded_vit").cuda()
    expected = run(vitq.quantize(copy.deepcopy(model).cpu(), recipe, "w8a8", CALIB), UNSEEN)
    for data in (CALIB, CALIB.cuda()):
        qmodel = vitq.quantize(model, recipe, "w8a8", data)
        assert all(b.is_cuda for b in qmodel.quantizers.buffers())
        found = run(qmodel, UNSEEN.cuda())
        assert distance(found.cpu(), expected) < 0.5
        vitq.save(qmodel, tmp_path / "o", force=True)
        assert torch.equal(run(vitq.load(tmp_path / "o", model=build_zoo("seeded_vit").cuda()), UNSEEN.cuda()), found)
        run(vitq.load(tmp_path / "o", model=build_zoo("seeded_vit")).cuda(), UNSEEN.cuda())


@needs_cuda
def test_a_cpu_model_takes_images_from_cuda() -> None:
    on_cpu = vitq.quantize(build_zoo("seeded_vit"), "repq_vit", "w4a4", CALIB)
    from_cuda = vitq.quantize(build_zoo("seeded_vit"), "repq_vit", "w4a4", CALIB.cuda())
    assert torch.equal(run(from_cuda, UNSEEN), run(on_cpu, UNSEEN))
