"""The contract of a modifier, for everything in the MODIFIERS registry, on a recipe; and some together.

A new modifier is tested with no edit.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vitq
from vitq.core.errors import ArtifactError, CompositionError, DataError
from vitq.core.format import Bits
from vitq.core.recipe import MODIFIERS, SLOTS, resolve_recipe
from vitq.data.zoo import build_zoo, seeded_images
from vitq.graph import integer

BITS = ("w8a8", "w6a6", "w4a4", "w3a3", "w4a16")
SECONDS = 20.0  # "in seconds", with room for a busy machine
COMPOSED = [*(f"repq_vit+{name}" for name in MODIFIERS), "minmax+gptq+bias_correction", "repq_vit+qwt+gptq", "erq+qwt"]

each_modifier = pytest.mark.parametrize("name", list(MODIFIERS))
each_composition = pytest.mark.parametrize("spec", COMPOSED)
each_model = pytest.mark.parametrize("model", ["seeded_vit", "seeded_swin"])


def run(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


@each_modifier
def test_a_modifier_cites_its_paper_and_says_where_it_differs(name: str) -> None:
    module = inspect.getmodule(MODIFIERS[name])
    assert module is not None
    docstring = module.__doc__ or ""
    assert re.search(r"[Dd]iffer", docstring)
    made = MODIFIERS[name](4, 4)
    assert made.slot in SLOTS
    assert all(number in docstring for number in re.findall(r"\d{4}\.\d{4,5}", made.paper))
    assert re.search(r"arXiv \d{4}\.\d{4,5}", made.paper)
    assert MODIFIERS[name].__doc__


@each_composition
@each_model
@pytest.mark.parametrize("bits", BITS)
def test_a_composition_runs_in_seconds_and_gives_finite_outputs(spec: str, model: str, bits: str) -> None:
    float_model = build_zoo(model)
    before = {key: value.clone() for key, value in float_model.state_dict().items()}
    start = time.perf_counter()
    qmodel = vitq.quantize(float_model, spec, bits, seeded_images(4))
    assert time.perf_counter() - start < SECONDS
    assert bool(run(qmodel, seeded_images(4)).isfinite().all())
    assert set(qmodel.quantizers) == set(qmodel.formats)
    assert all(torch.equal(float_model.state_dict()[key], value) for key, value in before.items())
    assert not any(module._forward_hooks for module in float_model.modules())


@each_composition
@each_model
def test_the_same_seed_gives_the_same_bits_however_the_data_come(spec: str, model: str) -> None:
    images = seeded_images(40)  # micro-batches of 32 and 8
    runs = [vitq.quantize(build_zoo(model), spec, "w4a4", data) for data in (images, list(images.split(32)))]
    left, right = (made.state_dict() for made in runs)
    assert [key for key in left if not torch.equal(left[key], right[key])] == []
    assert torch.equal(run(runs[0], images[:8]), run(runs[1], images[:8]))


@each_composition
@each_model
def test_saved_loaded_and_copied_it_gives_identical_outputs(spec: str, model: str, tmp_path: Path) -> None:
    images = seeded_images(8)
    qmodel = vitq.quantize(build_zoo(model), spec, "w4a4", images)
    expected = run(qmodel, images)
    vitq.save(qmodel, tmp_path / "artifact")
    assert torch.equal(run(copy.deepcopy(qmodel), images), expected)
    assert torch.equal(run(vitq.load(tmp_path / "artifact", model=build_zoo(model)), images), expected)
    kept = vitq.load(tmp_path / "artifact", float_model=build_zoo(model))
    assert torch.equal(run(kept, images), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(qmodel)), images), expected)


@each_composition
def test_baked_or_not_it_computes_the_same(spec: str) -> None:
    images = seeded_images(8)
    made = vitq.quantize(build_zoo("seeded_vit"), spec, "w4a4", images, freeze=False)
    unbaked = copy.deepcopy(made).freeze(bake=False)
    assert torch.equal(run(unbaked, images), run(made.freeze(), images))


@each_composition
def test_float_weights_of_another_model_are_refused(spec: str, tmp_path: Path) -> None:
    vitq.save(vitq.quantize(build_zoo("seeded_vit"), spec, "w4a4", seeded_images(8)), tmp_path / "artifact")
    other = build_zoo("seeded_vit")
    with torch.no_grad():
        weight = other.get_parameter("blocks.1.mlp.fc1.weight")
        weight.copy_(weight.flip(0))
    with pytest.raises(ArtifactError, match="is not the model that was quantized"):
        vitq.load(tmp_path / "artifact", float_model=other)


@each_composition
def test_compiled_it_gives_identical_outputs(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "_AVAILABLE", False)  # those agree to float precision only
    images = seeded_images(4)
    qmodel = vitq.quantize(build_zoo("seeded_vit"), spec, "w4a4", images).requires_grad_(False)
    expected = run(qmodel, images)
    torch._dynamo.reset()
    assert torch.equal(run(torch.compile(qmodel, fullgraph=True, backend="eager"), images), expected)


@each_composition
@each_model
def test_exported_it_gives_identical_outputs(spec: str, model: str) -> None:
    images = seeded_images(4)
    qmodel = vitq.quantize(build_zoo(model), spec, "w4a4", images).requires_grad_(False)
    program = torch.export.export(qmodel, (images,)).module()
    assert torch.equal(run(program, images), run(qmodel, images))


@each_modifier
def test_it_is_written_once(name: str) -> None:
    with pytest.raises(CompositionError, match="is written twice"):
        resolve_recipe(f"minmax+{name}+{name}", Bits(4, 4))


def test_two_that_compensate_do_not_go_together() -> None:
    with pytest.raises(CompositionError, match="'compensate' of 'minmax' is already filled by 'bias_correction'"):
        resolve_recipe("minmax+bias_correction+qwt", Bits(4, 4))


def test_rounding_needs_weights_that_are_rounded() -> None:
    with pytest.raises(CompositionError, match="'minmax\\+gptq' rounds weights, and w16a8 leaves them in float"):
        resolve_recipe("minmax+gptq", Bits.parse("w16a8"))


@each_modifier
def test_without_images_it_says_what_it_needs(name: str) -> None:
    example = seeded_images(1)
    with pytest.raises(DataError, match=r"needs? .*calibration images"):
        vitq.quantize(build_zoo("seeded_vit"), f"minmax+{name}", "w4a16", example=example)
