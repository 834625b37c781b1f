"""Both data flows against brute force: whole-model reruns, site after site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from vitq.calibrate import capture, observe
from vitq.calibrate.observe import Sketch
from vitq.calibrate.store import Store
from vitq.core.batches import Batches
from vitq.core.errors import DataError
from vitq.core.progress import Silent
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.core.roles import WEIGHT
from vitq.data.zoo import build_zoo, seeded_images
from vitq.graph.trace import trace
from vitq.passes.fit import Fit
from vitq.pipeline import insert, quantize, resolve
from vitq.quantizers.base import Quantizer

METHOD = "percentile_mse"


def inserted(model: nn.Module, images: Tensor) -> QuantModel:
    return insert(model, trace(model, images[:1]), resolve("repq_vit", "w4a4", options={"parity": True}))


def two_blocks() -> nn.Module:
    """Small enough for whole-model reruns over 64 images."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, num_classes=4
    ).eval()


def quantizers(qmodel: QuantModel) -> dict[str, Quantizer]:
    found = {site: qmodel.quantizers[site] for site in qmodel.quantizers}
    assert all(isinstance(q, Quantizer) for q in found.values())
    return found  # type: ignore[return-value]


def seen(qmodel: QuantModel, sites: list[str], batches: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """What arrives at sites while the model runs, one tensor per micro-batch; keys in execution order."""
    values: dict[str, list[Tensor]] = {}
    for site in sites:

        def look(quantizer: Quantizer, x: Tensor, site: str = site) -> None:
            values.setdefault(site, []).append(x.clone())

        quantizers(qmodel)[site].observer = look
    with torch.no_grad():
        for batch in batches:
            qmodel.model(batch)
    for site in sites:
        quantizers(qmodel)[site].observer = None
    return values


def fit_by_brute_force(qmodel: QuantModel, batches: Sequence[Tensor], flow: str) -> None:
    step = Fit(METHOD, METHOD, flow=flow, exact=True)
    acts = [s.id for s in qmodel.sites() if s.role != WEIGHT]
    for site in qmodel.sites():
        if site.role == WEIGHT:
            weight = qmodel.weight(site)
            assert weight is not None
            step.weight_search.fit(quantizers(qmodel)[site.id], weight.data)
            if flow == "prefix":
                quantizers(qmodel)[site.id].state = "on"
    all_values = seen(qmodel, acts, batches)
    for site_id in all_values:  # execution order
        quantizer = quantizers(qmodel)[site_id]
        values = seen(qmodel, [site_id], batches)[site_id] if flow == "prefix" else all_values[site_id]
        sketch = Sketch(keep_all=True)
        sketch.observe(torch.cat([quantizer.layout.by_group(x) for x in values], dim=1))
        quantizer.set_params(step.search.params(quantizer, sketch.statistics()))
        if flow == "prefix":
            quantizer.state = "on"
    for quantizer in quantizers(qmodel).values():
        quantizer.state = "on"


def same_scales(a: QuantModel, b: QuantModel) -> list[str]:
    """Sites whose parameters differ in any bit."""
    left, right = quantizers(a), quantizers(b)
    assert list(left) == list(right)
    return [s for s in left if not all(torch.equal(left[s].params()[n], right[s].params()[n]) for n in left[s].fields)]


WAYS = ("together", "blocks", "goes")


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several micro-batches: all at once, block by block and together elsewhere, or one site after the other."""
    if way != "together":
        monkeypatch.setattr(capture, "AT_ONCE", -1)
    if way == "goes":
        monkeypatch.setattr(capture, "possible", lambda: False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "flow", "sizes"),
    [
        ("two_blocks", "prefix", [32, 32]),
        ("seeded_vit", "prefix", [6]),
        ("seeded_vit", "prefix", [4, 4, 1]),
        ("seeded_vit", "parallel", [4, 4, 1]),
        ("seeded_swin", "prefix", [3]),
        ("seeded_swin", "prefix", [2, 2, 1]),
        ("seeded_swin", "parallel", [2, 1]),
    ],
)
def test_fit_equals_brute_force_with_whole_model_reruns(
    name: str, flow: str, sizes: list[int], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "together" and (flow == "parallel" or len(sizes) == 1):
        pytest.skip("there is one way")
    take(way, monkeypatch)
    images = seeded_images(sum(sizes))
    build = two_blocks if name == "two_blocks" else partial(build_zoo, name)
    ours, reference = inserted(build(), images), inserted(build(), images)
    data = images if sizes == [32, 32] else list(images.split(sizes))
    Fit(METHOD, METHOD, flow=flow, exact=True).run(ours, Batches.of(data), Silent())
    fit_by_brute_force(reference, images.split(sizes), flow)
    assert same_scales(ours, reference) == []


class InPlaceBlock(nn.Module):
    """Adds to its input in place, which nothing forbids."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x += self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))
        return x


class InPlaceModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.blocks = nn.Sequential(*(InPlaceBlock(16) for _ in range(3)))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("flow", ["prefix", "parallel"])
@pytest.mark.parametrize("cut", [(40,), (20, 20)], ids=str)
def test_percentiles_are_those_of_all_images_however_many_are_seen_at_a_time(
    flow: str, cut: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "SAMPLE", 500)  # else a model so small is kept whole
    monkeypatch.setattr(observe, "SAMPLE_PER_GROUP", 500)
    images = seeded_images(40)
    made = []
    for exact in (False, True):
        model = build_zoo("seeded_vit")
        made.append(inserted(model, images))
        fit = Fit("percentile", percentile=0.9995, flow=flow, exact=exact)
        fit.run(made[-1], Batches.of(list(images.split(list(cut)))), Silent())
    assert same_scales(*made) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("flow", ["prefix", "parallel"])
@pytest.mark.parametrize("count", [20, 64])
def test_blocks_that_change_their_input_in_place_are_seen_right(
    flow: str, count: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by this test: block inputs kept between reruns were changed by every rerun."""
    take(way, monkeypatch)
    torch.manual_seed(3)
    model, images = InPlaceModel(), torch.randn(count, 5, 8)
    state = model.state_dict()
    ours, reference = inserted(model, images), inserted(InPlaceModel(), images)
    reference.model.load_state_dict(state)
    Fit(METHOD, METHOD, flow=flow, exact=True).run(ours, Batches.of(images.clone()), Silent())
    fit_by_brute_force(reference, images.clone().split(32), flow)
    assert same_scales(ours, reference) == []


def test_one_tensor_and_an_iterable_of_the_same_micro_batches_are_the_same_bits() -> None:
    images = seeded_images(40)

    def generated() -> Iterator[Tensor]:
        yield from images.split(32)

    makers: list[Callable[[], object]] = [lambda: images, lambda: list(images.split(32)), generated]
    models = [quantize(build_zoo("seeded_vit"), "repq_vit", "w4a4", make()) for make in makers]
    states = [model.state_dict() for model in models]
    for other in states[1:]:
        assert list(other) == list(states[0])
        assert all(torch.equal(other[key], states[0][key]) for key in other)


def test_observers_are_removed_and_states_restored_also_after_an_error() -> None:
    images = seeded_images(40)
    images_with_nan = images.clone()
    qmodel = inserted(build_zoo("seeded_vit"), images)
    for flow in ("parallel", "prefix"):
        bad = Batches(lambda: iter([images_with_nan]), [40])
        images_with_nan[3] = float("nan")
        with pytest.raises(DataError, match=r"patch_embed\.proj.*NaN or Inf.*images"):
            Fit(flow=flow).run(qmodel, bad, Silent())
        assert all(q.observer is None for q in quantizers(qmodel).values())
        assert not any(q.state == "on" for s, q in quantizers(qmodel).items() if not s.endswith(".weight"))


def test_a_model_that_no_longer_reaches_a_site_is_an_error_and_not_an_unfitted_site(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_zoo("seeded_vit")
    qmodel = inserted(model, seeded_images(1))
    monkeypatch.setattr(model.get_submodule("blocks.2"), "forward", lambda x: x)
    with pytest.raises(DataError, match=r"blocks\.2.*saw no values"):
        Fit(flow="parallel").run(qmodel, Batches.of(seeded_images(4)), Silent())
    for sizes in ([4], [2, 2]):
        fresh = inserted(build_zoo("seeded_vit"), seeded_images(1))
        monkeypatch.setattr(fresh.model.get_submodule("blocks.2"), "forward", lambda x: x)
        with pytest.raises(DataError, match=r"saw no values.*blocks\.2"):
            Fit(flow="prefix").run(fresh, Batches.of(list(seeded_images(4).split(sizes))), Silent())


def test_the_store_spills_to_disk_and_gives_back_what_it_was_given() -> None:
    items = [((torch.randn(3, 4), 2), {"mask": None, "scale": torch.ones(5) * i}) for i in range(4)]
    store = Store(budget=100)
    for item in items:
        store.append(item)
    assert len(store) == 4
    assert store.spilled == 3
    for _ in range(2):
        for (args, kwargs), (wanted_args, wanted_kwargs) in zip(store, items, strict=True):
            assert torch.equal(args[0], wanted_args[0])
            assert args[1] == 2
            assert kwargs["mask"] is None
            assert torch.equal(kwargs["scale"], wanted_kwargs["scale"])


def test_spilled_block_inputs_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    take("blocks", monkeypatch)
    batches = list(seeded_images(3).split(2))
    kept = quantize(build_zoo("seeded_swin"), "repq_vit", "w4a4", batches).state_dict()
    monkeypatch.setattr(Store.__init__, "__defaults__", (0,))
    spilled = quantize(build_zoo("seeded_swin"), "repq_vit", "w4a4", batches).state_dict()
    assert all(torch.equal(kept[key], spilled[key]) for key in kept)


def test_a_plain_recipe_object_runs_with_the_prefix_flow_over_two_micro_batches() -> None:
    base = resolve("minmax", "w4a4").recipe
    made = Recipe("own", "arXiv 0000.00000", base.formats, (PassSpec.of("fit", flow="prefix"),))
    assert isinstance(made.formats[0], Rule)
    qmodel = quantize(build_zoo("seeded_vit"), made, data=seeded_images(40))
    assert all(q.fitted for q in quantizers(qmodel).values())
