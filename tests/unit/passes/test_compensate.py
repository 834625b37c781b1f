"""Compensation: means of outputs by the biases, differences of blocks by a linear map."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.core.errors import CompositionError, DataError, InputError
from vitq.core.format import Bits, Format
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.core.roles import WEIGHT
from vitq.data.zoo import build_zoo, seeded_images
from vitq.passes.compensate.blocks import CHILD, CompensateBlockRewrite, CompensateBlocks, _Regression
from vitq.passes.fit import Fit

each_model = pytest.mark.parametrize("model", ["seeded_vit", "seeded_swin"])


def output_means(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """Mean output of modules over images and tokens."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> None:
        module = model.get_submodule(name)
        dim = 1 if isinstance(module, nn.Conv2d) else -1
        handles.append(
            module.register_forward_hook(
                lambda m, a, out: found.__setitem__(name, out.movedim(dim, -1).flatten(0, -2).double().mean(0))
            )
        )

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name in names:
        note(name)
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


@each_model
def test_after_bias_correction_every_linear_has_the_mean_of_the_float_model(model: str) -> None:
    images, float_model = seeded_images(40), build_zoo(model)
    names = [n for n, m in float_model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    wanted = output_means(float_model, names, images)
    off: dict[str, float] = {}
    for recipe in ("minmax", "minmax+bias_correction"):
        qmodel = vitq.quantize(float_model, recipe, "w4a4", images)
        got = output_means(qmodel.model, names, images)
        off[recipe] = max(float((got[n] - wanted[n]).abs().max()) for n in names)
    # Whole numbers of other micro-batches may round another way on the border of two codes.
    assert off["minmax+bias_correction"] < 2e-3
    assert off["minmax"] > 0.05


class Twice(nn.Module):
    """One linear that is called two times, and one that is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.shared(torch.relu(self.shared(x)))))
        return out


@pytest.mark.parametrize("images", [8, 40])
def test_a_module_that_is_called_twice_keeps_its_bias(images: int) -> None:
    model = Twice().eval()
    qmodel = vitq.quantize(model, "minmax+bias_correction", "w3a3", torch.randn(images, 5, 16))
    assert torch.equal(qmodel.model.get_parameter("shared.bias"), model.shared.bias)
    assert not torch.equal(qmodel.model.get_parameter("last.bias"), model.last.bias)
    assert qmodel.log["correct_bias"] == {"corrected": 1, "kept": 1}


def test_what_cannot_work_is_refused_before_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("fitted before it was refused")

    monkeypatch.setattr(Fit, "run", never)
    for recipe in ("minmax+qwt", "minmax+gptq+qwt"):
        with pytest.raises(DataError, match="two calibration images"):
            vitq.quantize(build_zoo("seeded_vit"), recipe, "w4a4", seeded_images(1))


def test_work_is_counted_per_image_where_a_block_sees_windows() -> None:
    """TNT's inner blocks take one row of pixels for every patch, not for every image."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "tnt_s_legacy_patch16_224", img_size=32, embed_dim=32, inner_dim=8, depth=2, num_heads_outer=2, num_classes=5
    ).eval()
    images = torch.randn(8, 3, 32, 32)
    qmodel = vitq.quantize(model, "minmax+qwt", "w3a3", images)
    rows = 0
    for rewrite in qmodel.rewrites:
        size = len(rewrite.tensors["bias"])
        (seen,) = block_outputs(qmodel.model, [rewrite.args["block"]], images).values()
        rows += seen[0].numel() // size // len(images) * size**2
    assert qmodel.extra_macs() == rows > 0


@pytest.mark.parametrize("wrong", [{"channel": 0}, {"channel": 5}, {"weight": (3, 4)}, {"bias": (2, 2)}])
def test_a_map_that_is_none_is_refused(wrong: dict[str, object]) -> None:
    shapes: dict[str, object] = {"weight": (4, 4), "bias": (4,), "channel": -1} | wrong
    tensors = {name: torch.zeros(shapes[name], dtype=torch.float16) for name in ("weight", "bias")}  # type: ignore[call-overload]
    rewrite = CompensateBlockRewrite({"block": "0", "channel": shapes["channel"]}, tensors)
    with pytest.raises(InputError, match="no map of channels"):
        rewrite.prepare(nn.Sequential(nn.Identity()))


@each_model
def test_mechanism_bias_correction_lowers_the_error_of_the_output(model: str) -> None:
    images, others, float_model = seeded_images(32), seeded_images(64)[32:], build_zoo(model)
    with torch.no_grad():
        expected = float_model(others)
        noise = [
            float((vitq.quantize(float_model, recipe, "w4a4", images)(others) - expected).square().mean())
            for recipe in ("repq_vit+bias_correction", "repq_vit")
        ]
    assert noise[0] < noise[1]


def block_outputs(model: nn.Module, names: list[str], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Block -> what goes in and comes out."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: found.__setitem__(name, (args[0].clone(), out))
        )
        for name in names
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def block_error(qmodel: QuantModel, float_model: nn.Module, name: str, images: Tensor) -> float:
    """Squared difference of one block from the float one, on the input that the quantized model gives it."""
    x, got = block_outputs(qmodel.model, [name], images)[name]
    with torch.no_grad():
        return float((float_model.get_submodule(name)(x) - got).square().mean())


@each_model
def test_mechanism_the_map_lowers_the_error_of_the_blocks_on_other_images(model: str) -> None:
    images, others, float_model = seeded_images(32), seeded_images(64)[32:], build_zoo(model)
    plain, helped = (vitq.quantize(float_model, r, "w4a4", images) for r in ("repq_vit", "repq_vit+qwt"))
    names = [n for n in helped.graph.blocks if hasattr(helped.model.get_submodule(n), CHILD)]
    assert len(names) == helped.log["compensate_blocks"]["blocks"] > 0
    last = names[-1]
    # Folding changes no block's function, so that the float blocks serve as reference for both.
    assert block_error(helped, float_model, last, others) < block_error(plain, float_model, last, others)


def compensated(model: str, bits: str, weights_only: bool) -> QuantModel:
    weight, act = Bits.parse(bits).weight, Bits.parse(bits).act
    assert weight is not None
    assert act is not None
    rules = (Rule(Format("uniform", act)), Rule(Format("uniform", weight, "channel"), roles=(WEIGHT,)))
    passes = (PassSpec.of("fit"), PassSpec.of("compensate_blocks", weights_only=weights_only))
    return vitq.quantize(build_zoo(model), Recipe("x", "", rules, passes), bits, seeded_images(32))


@each_model
def test_what_activations_lost_is_made_up_for_only_where_that_is_wanted(model: str) -> None:
    logs = {
        (bits, only): compensated(model, bits, only).log["compensate_blocks"]
        for bits in ("w16a4", "w4a16")
        for only in (False, True)
    }
    assert logs["w16a4", True]["blocks"] == 0
    assert logs["w16a4", False]["blocks"] > 0
    assert logs["w4a16", True]["blocks"] > 0
    assert logs["w4a16", True] == pytest.approx(logs["w4a16", False], abs=2e-3)  # 16 bits of activations lose little


@each_model
def test_behind_trained_activations_the_map_leads_to_the_model_with_float_weights(model: str) -> None:
    others = seeded_images(64)[32:]
    weights = [compensated(model, "w16a4", True), *(compensated(model, "w4a4", only) for only in (False, True))]
    name = next(n for n in weights[2].graph.blocks if hasattr(weights[2].model.get_submodule(n), CHILD))
    first = block_outputs(weights[0].model, [name], others)[name]
    errors = []
    for helped in weights[1:]:
        with torch.no_grad():
            errors.append(float((helped.model.get_submodule(name)(first[0]) - first[1]).square().mean()))
    assert errors[1] < errors[0]


def test_the_moments_give_the_regression_of_all_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    x, r = torch.randn(300, 6, generator=draw), torch.randn(300, 6, generator=draw)
    r += 0.3 * x[:, :1] + 1.0
    parts = [_Regression.empty(6, x.device) for _ in range(2)]
    parts[0].add(x[:100], r[:100])
    parts[1].add(x[100:], r[100:])
    sums = parts[0] + parts[1]
    weight, bias = sums.solve(1e-12)
    wide = torch.cat([x.double(), torch.ones(300, 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(wide, r.double()).solution
    torch.testing.assert_close(torch.cat([weight, bias[None]]), expected, rtol=1e-4, atol=1e-6)
    left = (r.double() - wide @ expected).square().sum()
    assert sums.error(weight, bias) == pytest.approx(float(left), rel=1e-6)
    assert sums.rest_spread() == pytest.approx(float(r.double().square().sum()))


def test_a_map_is_counted_in_size_and_work(tmp_path: Path) -> None:
    images = seeded_images(16)
    plain, helped = (vitq.quantize(build_zoo("seeded_vit"), r, "w3a3", images) for r in ("repq_vit", "repq_vit+qwt"))
    log = helped.log["compensate_blocks"]
    width, tokens = 64, 17
    assert plain.extra_macs() == 0
    assert helped.extra_macs() == log["blocks"] * tokens * width**2
    vitq.save(helped, tmp_path / "out")
    assert vitq.load(tmp_path / "out", model=build_zoo("seeded_vit")).extra_macs() == helped.extra_macs()
    parameters = sum(p.numel() for p in plain.model.parameters())
    extra = 16 * log["blocks"] * (width**2 + width) / parameters
    assert helped.effective_bits()["model"] == pytest.approx(plain.effective_bits()["model"] + extra, abs=0.01)


def test_one_image_is_not_enough_for_two_folds() -> None:
    with pytest.raises(DataError, match="two calibration images"):
        vitq.quantize(build_zoo("seeded_vit"), "minmax+qwt", "w4a4", seeded_images(1))


def test_a_model_without_blocks_is_told_so() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).eval()
    with pytest.raises(CompositionError, match="no repeated transformer blocks"):
        vitq.quantize(model, "minmax+qwt", "w4a4", torch.randn(4, 3, 4, 4))


def test_a_negative_ridge_is_refused() -> None:
    with pytest.raises(CompositionError, match=r"ridge -1\.0 must not be negative"):
        CompensateBlocks(ridge=-1.0)
