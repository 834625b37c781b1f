"""Detectors keep the contract of families with images of several sizes, and all recipes run on one of them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

import vitq
from vitq.calibrate.importance import row_weights
from vitq.calibrate.linears import linears
from vitq.calibrate.selected import behind_choices
from vitq.core.batches import Batches, first_of, split
from vitq.core.errors import CompositionError, DataError, SiteNotFoundError
from vitq.core.format import Bits, Format
from vitq.core.progress import Silent
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import RECIPES, PassSpec, Recipe, Rule, resolve_recipe
from vitq.core.site import REASON_CONSTANT, REASON_EXCLUDED
from vitq.graph.trace import trace

sys.path.insert(0, str(Path(__file__).parent))
from detectors import DETECTORS, PADDED, TORCHVISION, images, padded
from families import Family

FEW = {"steps": 16, "rounds": 1, "rows": 64}
MASK_RCNN = TORCHVISION[0]
each_detector = pytest.mark.parametrize("family", DETECTORS, ids=str)


def trains(name: str) -> bool:
    return any(spec.name == "train" for spec in resolve_recipe(name, Bits(8, 8)).passes)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_detector
def test_its_products_are_found_and_quantizers_that_are_off_change_nothing(family: Family) -> None:
    batch, model = family.batch(3), family.build()
    graph = trace(model, batch, family.forward_fn)
    assert {call.reason for call in graph.calls} <= {None, REASON_CONSTANT}
    counted = sum(call.macs for call in graph.calls if call.reason is None)
    constant = sum(call.macs for call in graph.calls if call.reason == REASON_CONSTANT)
    assert counted >= 0.99 * (graph.macs - constant)
    assert len(graph.blocks) == family.blocks
    qmodel = vitq.quantize(model, "minmax", "w8a8", batch, freeze=False)
    qmodel.set_state("off")
    assert same(family.run(model, batch), family.run(qmodel, batch))


@each_detector
def test_what_is_saved_and_loaded_finds_the_same(family: Family, tmp_path: Path) -> None:
    batch = family.batch(3)
    qmodel = vitq.quantize(family.build(), "repq_vit", "w4a4", batch)
    found = family.run(qmodel, batch)
    assert all(bool(t.isfinite().all()) for t in found)
    assert not same(found, family.run(family.build(), batch))
    vitq.save(qmodel, tmp_path / "artifact")
    loaded = vitq.load(tmp_path / "artifact", model=family.build())
    assert same(found, family.run(loaded, batch))


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_runs_on_a_detector_or_says_why_not(name: str) -> None:
    model, batch = MASK_RCNN.build(), images(4)
    known = inspect.signature(RECIPES[name]).parameters
    options = {option: value for option, value in FEW.items() if option in known}
    if trains(name):  # without a loss of its own: tests/unit/data/test_objects.py
        with pytest.raises(CompositionError, match=r"returns nothing by example|nothing to train"):
            vitq.quantize(model, name, "w8a8", batch, options=options)
        return
    qmodel = vitq.quantize(model, name, "w8a8", batch, options=options)
    with torch.no_grad():
        levels = [m.backbone(batch[2][None]) for m in (model, qmodel)]
    for key, wanted in levels[0].items():
        error = (levels[1][key] - wanted).norm() / wanted.norm()
        assert 0 < float(error) < 0.2, (key, float(error))


@pytest.mark.parametrize("name", ["gplq", "lsq"])
def test_training_on_images_of_several_sizes_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="training takes images of one size, and these have 3"):
        vitq.quantize(PADDED[0].build(), name, "w8a8", padded(3))


@pytest.mark.parametrize("name", ["ptq4vit", "apq_vit", "vitq_calib"])
def test_gradients_reach_a_detector_whose_images_are_cut_off_the_list_one_by_one(name: str) -> None:
    """Images of one size stay together in a list, of which passes with gradients take two at a time."""
    seen: list[int] = []
    model = MASK_RCNN.build()

    def forward(model: nn.Module, batch: Any) -> Any:
        assert all(image.shape == (3, 40, 56) for image in batch), "cut along the channels"
        seen.append(len(batch))
        return model(batch)

    batch = [image + 0.1 * number for number, image in enumerate([images(1)[0]] * 5)]
    known = inspect.signature(RECIPES[name]).parameters
    options = {option: value for option, value in FEW.items() if option in known}
    vitq.quantize(model, name, "w8a8", batch, options=options, forward_fn=forward)
    assert set(seen) <= {1, 2, 5}
    assert 5 in seen or 2 in seen


# -- inputs ----------------------------------------------------------------------------------------------


def test_images_of_several_sizes_go_alone_and_those_of_one_size_together() -> None:
    several, equal = images(4), [images(1)[0]] * 3
    assert Batches.of(several).sizes == [1, 1, 1, 1]
    assert Batches.of([several, equal]).sizes == [1, 1, 1, 1, 3]
    assert [len(part) for part in split(equal, 2)] == [2, 1]
    assert [image.shape for image in first_of(several)] == [(3, 40, 56)]
    shown = [tuple(part["pixel_values"].shape) for part in Batches.of(padded(3))]
    assert shown == [(1, 3, 40, 56), (1, 3, 48, 36), (1, 3, 64, 64)]


@pytest.mark.parametrize("family", [MASK_RCNN, *PADDED], ids=str)
def test_padding_of_a_batch_does_not_decide_scales(family: Family) -> None:
    """Padded in one batch, or each image as if it were alone: the same scales, to the bit."""
    batch = family.batch(3)
    if isinstance(batch, list):
        alone: list[Any] = [[image] for image in batch]
    else:
        cut = zip(batch["pixel_values"], batch["pixel_mask"].bool(), strict=True)
        alone = [
            {
                "pixel_values": p[None, :, : m.any(1).sum(), : m.any(0).sum()],
                "pixel_mask": m[m.any(1)][None, :, m.any(0)],
            }
            for p, m in cut
        ]
    made = [vitq.quantize(family.build(), "percentile", "w8a8", data) for data in (batch, alone)]
    assert same(list(made[0].state_dict().values()), list(made[1].state_dict().values()))


def test_zeros_that_pad_windows_do_not_decide_scales() -> None:
    """Behind a norm, Swin pads to whole windows. Ranges of the padded map and of its own rows are the same."""
    torch.manual_seed(0)
    swin = SwinTransformer([4, 4], 16, [2], [2], [4, 4], stochastic_depth_prob=0.0, num_classes=4).eval()
    photo = torch.randn(1, 3, 36, 36)  # 9 x 9 patches: padded to 12 x 12, of which 44 % are padding
    site = "features.1.0.attn:linear0.input"
    rows: list[Tensor] = []
    swin.features[1][0].norm1.register_forward_hook(lambda module, args, out: rows.append(out.reshape(-1, 16)))
    fit = PassSpec.of("fit", method="percentile", percentile=0.999)
    recipe = Recipe("percentiles", "", (Rule(Format("uniform", 4)),), (fit,))
    qmodel = vitq.quantize(swin, recipe, "w4a4", photo)
    with torch.no_grad():
        rows.clear()
        swin(photo)
    range_of = lambda x: float(torch.quantile(x, 0.999) - torch.quantile(x, 0.001))  # noqa: E731
    (scale,) = qmodel.quantizers[site].params()["scale"].flatten().tolist()
    assert 15 * scale == pytest.approx(range_of(rows[0].flatten()), rel=1e-5)
    with_padding = torch.cat([rows[0].flatten(), torch.zeros(16 * (144 - 81))])
    assert range_of(with_padding) < 0.99 * range_of(rows[0].flatten())  # what counting them would have done


def test_scales_per_token_refuse_images_of_several_sizes() -> None:
    recipe = Recipe(
        "tokens", "", (Rule(Format("uniform", 8), ("WEIGHT",)), Rule(Format("uniform", 8, per="token"), ("FC1_IN",))),
        (PassSpec.of("fit"),),
    )  # fmt: skip
    with pytest.raises(DataError, match="give inputs of the size that was calibrated on"):
        vitq.quantize(MASK_RCNN.build(), recipe, "w8a8", images(3), scope="backbone")


# -- scope -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["backbone", ["backbone.body", "rpn"], "all"], ids=str)
def test_scope_says_what_is_quantized_and_leaves_the_rest_as_it_is(scope: Any) -> None:
    model, batch = MASK_RCNN.build(), images(2)
    qmodel = vitq.quantize(model, "minmax", "w8a8", batch, scope=scope)
    within: Callable[[str], bool] = lambda owner: scope == "all" or owner.startswith(tuple(scope_names(scope)))  # noqa: E731
    for site in qmodel.graph.sites.values():
        assert (site.id in qmodel.quantizers) == within(site.owner), site.id
    left = qmodel.plan.assign(qmodel.graph).reasons
    assert set(left.values()) <= {REASON_EXCLUDED}
    before, after = model.state_dict(), qmodel.model.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])]
    assert all(torch.equal(before[k], after[k]) for k in before if not within(k))


def scope_names(scope: Any) -> list[str]:
    return [scope] if isinstance(scope, str) else list(scope)


def test_an_unknown_scope_names_what_there_is() -> None:
    with pytest.raises(SiteNotFoundError, match=r"scope 'neck' .*backbone, rpn, roi_heads"):
        vitq.quantize(MASK_RCNN.build(), "minmax", "w8a8", images(1), scope=["backbone", "neck"])


def test_a_detector_in_a_quantized_model_behaves_like_it() -> None:
    qmodel = vitq.quantize(MASK_RCNN.build(), "minmax", "w8a8", images(1))
    assert isinstance(qmodel, QuantModel)
    found = qmodel(images(2))
    assert [sorted(each) for each in found] == [["boxes", "labels", "masks", "scores"]] * 2
    assert [tuple(each["masks"].shape[-2:]) for each in found] == [(40, 56), (48, 36)]
    assert qmodel.roi_heads.score_thresh == 0.0


# -- what is found ---------------------------------------------------------------------------------------


@pytest.fixture
def sparing() -> nn.Module:
    """Finds something in two of four images."""
    model: Any = MASK_RCNN.build()
    best = sorted(float(found["scores"].max()) for found in model(images(4)))
    model.roi_heads.score_thresh = (best[1] + best[2]) / 2
    assert sorted(min(len(found["scores"]), 1) for found in model(images(4))) == [0, 0, 1, 1]
    return model


@pytest.mark.parametrize("name", ["minmax", "repq_vit", "liu2021", "ptq4vit", "vitq_calib"])
def test_images_in_which_nothing_is_found_are_no_obstacle(name: str, sparing: nn.Module) -> None:
    known = inspect.signature(RECIPES[name]).parameters
    options = {option: value for option, value in FEW.items() if option in known}
    qmodel = vitq.quantize(sparing, name, "w8a8", images(4), options=options)
    with torch.no_grad():
        for image in images(4):
            qmodel([image])


def test_heads_that_never_had_anything_to_do_are_named(sparing: Any) -> None:
    sparing.roi_heads.score_thresh = 0.999
    with pytest.raises(DataError, match=r"roi_heads\.mask_head.*found nothing in the calibration images.*or a scope"):
        vitq.quantize(sparing, "minmax", "w8a8", images(4))
    vitq.quantize(sparing, "minmax", "w8a8", images(4), scope=["backbone", "rpn"])


def test_heads_on_proposed_regions_are_known_as_such() -> None:
    """Their rows are other ones once the backbone is quantized: no weights by row from the float model."""
    qmodel = vitq.quantize(MASK_RCNN.build(), "minmax", "w8a8", images(2), freeze=False)
    calls = behind_choices(qmodel, Batches.of(images(2)))
    assert {call.split(".")[0] for call in calls} == {"roi_heads"}
    assert len(calls) == sum(call.owner.startswith("roi_heads") for call in qmodel.graph.calls)
    found = linears(qmodel)
    weights = row_weights(qmodel, Batches.of(images(2)), found, Silent())
    assert weights
    assert not any(name.startswith("roi_heads") for name in weights)
