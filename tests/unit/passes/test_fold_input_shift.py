"""Moving the constant of the format behind GELU into the model: the same outputs, other codes, and where it stays."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.core import roles
from vitq.core.format import Format
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.data.zoo import build_zoo, seeded_images
from vitq.quantizers.adaptive_log import SHIFT, AdaptiveLogQuantizer

FOLD = PassSpec.of("fold_input_shift")
each_model = pytest.mark.parametrize("model", ["seeded_vit", "seeded_swin"])


def plain(*passes: PassSpec) -> Recipe:
    """Formats of AdaLog behind GELU, fitted to their range."""
    rules = (
        Rule(Format("uniform", 4)),
        Rule(Format.of("adaptive_log", 4, shifted=True), (roles.FC2_IN,)),
        Rule(Format("uniform", 4, "channel"), (roles.WEIGHT,)),
    )
    return Recipe("plain", "none", rules, (PassSpec.of("fit"), *passes))


def made(model: nn.Module, *passes: PassSpec, images: int = 8, freeze: bool = True) -> QuantModel:
    return vitq.quantize(model, plain(*passes), "w4a4", seeded_images(images), freeze=freeze)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def inputs(qmodel: QuantModel) -> dict[str, AdaptiveLogQuantizer]:
    found = {s.owner: qmodel.quantizers[s] for s in qmodel.sites(roles.FC2_IN)}
    assert found
    assert all(isinstance(q, AdaptiveLogQuantizer) for q in found.values())
    return found  # type: ignore[return-value]


@each_model
def test_folded_or_not_the_outputs_are_the_same(model: str) -> None:
    images = seeded_images(8, seed=1)
    kept, folded = made(build_zoo(model)), made(build_zoo(model), FOLD)
    assert folded.log["fold_input_shift"] == {"folded": len(inputs(folded)), "kept": 0}
    torch.testing.assert_close(run(folded, images), run(kept, images), rtol=1e-3, atol=1e-3)
    assert all(q.shifted for q in inputs(kept).values())
    assert not any(q.shifted for q in inputs(folded).values())


@each_model
def test_the_bias_takes_off_what_the_quantized_weight_makes_of_the_constant(model: str) -> None:
    """b <- b - c sum_j q(W)[:, j]"""
    kept, folded = made(build_zoo(model)), made(build_zoo(model), FOLD)
    for owner in inputs(folded):
        before, after = kept.model.get_submodule(owner), folded.model.get_submodule(owner)
        weight, bias = before.weight.double(), before.bias.double()  # type: ignore[operator, union-attr]
        expected = bias - SHIFT * weight.sum(1)
        torch.testing.assert_close(after.bias.double(), expected, rtol=1e-5, atol=1e-6)  # type: ignore[operator, union-attr]


@each_model
def test_what_is_multiplied_then_are_powers_and_zero(model: str) -> None:
    qmodel = made(build_zoo(model), FOLD)
    seen: dict[str, Tensor] = {}
    for owner, quantizer in inputs(qmodel).items():
        quantizer.observer = lambda q, x, owner=owner: seen.__setitem__(owner, q.decode(q.encode(x)))
    run(qmodel, seeded_images(4))
    for owner, quantizer in inputs(qmodel).items():
        levels = quantizer.decode(torch.arange(16))
        assert float(levels[-1]) == 0
        assert bool(torch.isin(seen[owner], levels).all())
        assert len(seen[owner].unique()) > 8


@each_model
def test_switched_off_the_model_is_nearly_the_float_model(model: str) -> None:
    """Not quite: the bias has what the quantized weights make of the constant, as the mean of rounding errors."""
    images, float_model = seeded_images(8), build_zoo(model)
    qmodel = made(float_model, FOLD, freeze=False)
    qmodel.set_state("off")
    expected = run(float_model, images)
    off = float((run(qmodel, images) - expected).square().mean() / expected.square().mean())
    qmodel.set_state("on")
    assert off < 0.1 * float((run(qmodel, images) - expected).square().mean() / expected.square().mean())


@each_model
def test_saved_loaded_copied_and_pickled_it_gives_identical_outputs(model: str, tmp_path: Path) -> None:
    images = seeded_images(8)
    qmodel = made(build_zoo(model), FOLD)
    expected = run(qmodel, images)
    vitq.save(qmodel, tmp_path / "artifact")
    for again in (
        vitq.load(tmp_path / "artifact", model=build_zoo(model)),
        vitq.load(tmp_path / "artifact", float_model=build_zoo(model)),
        copy.deepcopy(qmodel),
        pickle.loads(pickle.dumps(qmodel)),
    ):
        assert torch.equal(run(again, images), expected)
    program = torch.export.export(qmodel.requires_grad_(False), (images,)).module()
    assert torch.equal(run(program, images), expected)


def test_codes_chosen_by_another_pass_are_those_that_are_folded() -> None:
    images = seeded_images(16)
    kept, folded = (
        vitq.quantize(build_zoo("seeded_vit"), plain(PassSpec.of("round_columns"), *more), "w4a4", images)
        for more in ((), (FOLD,))
    )
    torch.testing.assert_close(run(folded, images), run(kept, images), rtol=1e-3, atol=1e-3)


class Odd(nn.Module):
    """A linear without bias, two that share theirs, one that is no module and one that takes its input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bare, self.named = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.other.bias = self.one.bias
        self.weight = nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        gelu = nn.functional.gelu
        x = self.named(input=gelu(self.bare(gelu(self.first(x)))))
        x = self.one(gelu(x)) + self.other(gelu(x))
        return nn.functional.linear(gelu(x), self.weight)


def test_biases_that_are_missing_come_and_shared_ones_and_other_calls_stay() -> None:
    model, x = Odd().eval(), torch.randn(8, 5, 16)
    kept, folded = (vitq.quantize(model, plain(*more), "w4a4", x) for more in ((), (FOLD,)))
    assert folded.log["fold_input_shift"] == {"folded": 2, "kept": 3}
    assert model.bare.bias is None
    assert isinstance(folded.model.get_submodule("bare").bias, nn.Parameter)
    torch.testing.assert_close(run(folded, x), run(kept, x), rtol=1e-4, atol=1e-4)
    assert torch.equal(folded.model.get_parameter("one.bias"), model.one.bias)
