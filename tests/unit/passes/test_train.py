"""Training: the loss against an oracle, gradients of scales, and that nothing but the run decides the weights."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.calibrate.features import Watched
from vitq.core.batches import Batches, default_forward
from vitq.core.errors import ArtifactError, CompositionError, DataError, InputError
from vitq.core.format import Format
from vitq.core.progress import Silent
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.core.roles import QKV_IN, WEIGHT
from vitq.core.training import Draw, Given, Training
from vitq.data.zoo import build_zoo, seeded_images
from vitq.passes.train import loop
from vitq.passes.train.stage import Distance
from vitq.passes.train.teacher import Teacher, principal
from vitq.quantizers.layout import Layout
from vitq.quantizers.uniform import UniformQuantizer

IMAGES = 20
RATES: dict[str, Any] = {"rate": 1e-3, "scale_rate": 1e-2}


class Labelled:
    """Seeded images with labels by number."""

    labelled, fixed = True, True

    def __init__(self, count: int = IMAGES) -> None:
        self.images = seeded_images(count)

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        return f"{len(self)} seeded images"

    def stream(self, batches: Sequence[Sequence[Draw]]) -> Iterator[tuple[Any, Tensor | None]]:
        for draws in batches:
            numbers = torch.tensor([number for _, number in draws])
            yield self.images[numbers], numbers % 10


def training(**options: Any) -> Training:
    return Training(**{"examples": Labelled(), "epochs": 2, "batch_size": 8, "micro_batch": 4} | options)


def trained(recipe: str | Recipe = "gplq", bits: str = "w4a4", model: str = "seeded_vit", **options: Any) -> QuantModel:
    given = options.pop("options", RATES if isinstance(recipe, str) else None)
    data = options.pop("data", seeded_images(8))
    return vitq.quantize(build_zoo(model), recipe, bits, data, options=given, training=training(**options))


def tensors(qmodel: QuantModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in qmodel.state_dict().items()}


def same(a: QuantModel, b: QuantModel) -> bool:
    left, right = tensors(a), tensors(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# -- parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "count"), [(0.1, 32), (0.99, 64), (0.6, 32), (0.9, 32), (1.0, 96)])
def test_main_directions_are_those_of_a_singular_value_decomposition(share: float, count: int) -> None:
    rng = np.random.default_rng(0)
    size = np.concatenate([np.linspace(3, 1, 60), np.full(40, 1e-2)])
    rows = rng.normal(size=(5000, 100)) * size @ np.linalg.qr(rng.normal(size=(100, 100)))[0]
    centred = rows - rows.mean(0)
    _, values, vectors = np.linalg.svd(centred, full_matrices=False)
    explained = np.cumsum(values**2) / np.sum(values**2)
    wanted = int(np.argmax(explained >= share - 1e-12)) + 1
    assert abs(max(wanted, 32) - count) <= 16
    basis = principal(torch.from_numpy(centred.T @ centred / len(rows)), share)
    assert basis.shape == (100, count)
    # The space is compared: signs, and axes of equal variance, are free.
    np.testing.assert_allclose(basis @ basis.T, vectors[:count].T @ vectors[:count], atol=1e-6)


def test_gradients_of_a_scale_are_those_of_the_paper() -> None:
    """LSQ, equation 3, with a zero-point: round(x/s) - x/s inside, the end of the codes outside."""
    torch.manual_seed(0)
    x = torch.randn(200, requires_grad=True)
    quantizer = UniformQuantizer(4, Layout())
    quantizer.set_params({"scale": torch.tensor([0.2]), "zero_point": torch.tensor([6.0])})
    quantizer.learn()
    direction = torch.randn(200)
    (quantizer(x) * direction).sum().backward()
    wide = x.detach().double() / quantizer.scale.detach().double()
    low, high = -6.0, 9.0
    inside = (wide.round() >= low) & (wide.round() <= high)
    by_scale = torch.where(inside, wide.round() - wide, wide.round().clamp(low, high))
    wanted = (by_scale * direction.double()).sum()
    assert quantizer.scale.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(quantizer.scale.grad.double().sum(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad, direction * inside)


def test_the_loss_is_the_distance_along_the_main_directions() -> None:
    model, images = build_zoo("seeded_vit"), seeded_images(IMAGES)
    plain = replace(gplq_like(), passes=(PassSpec.of("fit"),))
    qmodel = vitq.quantize(model, plain, "w4a4", images, freeze=False)
    given = Training(Given(Batches.of(images)), batch_size=IMAGES, micro_batch=7)
    teacher = Teacher(Watched(model, ["head"], default_forward), given, torch.device("cpu"), Silent())
    (basis,) = teacher.bases(0.6, 0)

    def features(net: nn.Module) -> np.ndarray:
        seen: list[Tensor] = []
        handle = net.get_submodule("head").register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        with torch.no_grad():
            net(images)
        handle.remove()
        return seen[0].double().numpy()

    exact, quantized = features(model), features(qmodel.model)
    centred = exact - exact.mean(0)
    _, _, vectors = np.linalg.svd(centred, full_matrices=True)
    wanted = (((quantized - exact) @ vectors[: basis.shape[1]].T) ** 2).sum(1).mean()
    course = vitq.quantize(
        model, gplq_like(), "w4a4", images, training=Training(Given(Batches.of(images)), batch_size=IMAGES)
    ).log["train"][0]
    assert course["curve"][0][1]["features"] == pytest.approx(wanted, rel=1e-3)
    assert course["start"] == pytest.approx(wanted, rel=1e-3)


def gplq_like(**options: Any) -> Recipe:
    """Min-max ranges as `minmax` has them, weights quantized while training: the first loss is known beforehand."""
    rules = (Rule(Format("uniform", 4)), Rule(Format("uniform", 4, "channel"), roles=(WEIGHT,)))
    step = PassSpec.of("train", **{"weights": "learn", "labels": 0.0, "rate": 1e-3} | options)
    return Recipe("x", "", rules, (PassSpec.of("fit"), step))


def test_directions_without_variance_are_left_out() -> None:
    rows = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).double()
    centred = rows - rows.mean(0)
    assert principal(centred.T @ centred / 10, 0.6).shape == (64, 9)
    assert principal(torch.zeros(64, 64), 0.6).shape == (64, 1)


# -- what decides the weights ----------------------------------------------------------------------------


def test_a_run_makes_the_loss_smaller_and_tells_its_course() -> None:
    course = trained(gplq_like(labels=1.0), epochs=6).log["train"][0]
    curve = course["curve"]
    first, last = (sum(point[1].values()) for point in (curve[0], curve[-1]))
    assert last < 0.9 * first
    assert (course["steps"], curve[-1][0]) == (18, 18)
    assert curve[0][1].keys() == {"features", "labels"}


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not() -> None:
    assert same(trained(), trained())
    other = vitq.quantize(
        build_zoo("seeded_vit"), "gplq", "w4a4", seeded_images(8), options=RATES, training=training(), seed=1
    )
    assert not same(trained(), other)


def gradients(**options: Any) -> Tensor:
    """Of everything, in the first step. What comes after is chaos: rounding of weights flips codes."""

    def stop(optimizer: torch.optim.AdamW) -> None:
        every = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        found.append(torch.cat([g.flatten() for g in every]))
        raise Killed

    found: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop)
        with pytest.raises(Killed):
            trained(**options)
    return found[0]


def test_gradients_are_those_of_the_whole_batch() -> None:
    whole = gradients(bits="w8a8", micro_batch=8)
    parts = gradients(bits="w8a8", micro_batch=3)  # products of another size are rounded otherwise: codes flip
    assert float((whole - parts).norm() / whole.norm()) < 0.02
    assert torch.equal(gradients(bits="w8a8", micro_batch=8, recompute=True), whole)


def test_what_the_teacher_keeps_is_what_it_would_compute_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, examples = build_zoo("seeded_vit"), list[int](), Labelled()

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        calls.append(len(x))
        made: Tensor = net(x)
        return made

    def teacher() -> Teacher:
        return Teacher(Watched(model, ["head"], forward), training(micro_batch=8), torch.device("cpu"), Silent())

    draws = [(1, number) for number in (3, 1, 4)]
    (images, _), *_ = examples.stream([draws])
    features, logits = teacher()(images, draws)
    assert calls == [1, 8, 8, 4], "one tells the room that is needed, then all of them once, in their order"
    monkeypatch.setattr("vitq.passes.train.teacher.KEPT", 0)
    again, again_logits = teacher()(images, draws)
    assert calls == [1, 8, 8, 4, 1, 3]
    torch.testing.assert_close(features, again, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, again_logits, rtol=1e-4, atol=1e-5)


def test_weights_stay_in_float_while_scales_are_trained_and_are_quantized_after() -> None:
    seen: list[set[str]] = []
    original = loop.Loop._step

    def step(self: loop.Loop, *args: Any) -> Any:
        seen.append(set(self.params))
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_step", step)
        qmodel = trained()
    scales = {name for name in seen[0] if "|" in name}
    weights = {site.id for site in qmodel.sites(WEIGHT)}
    assert scales
    assert not {name.split("|")[0] for name in scales} & weights
    for site in qmodel.sites(WEIGHT):
        parameter = qmodel.weight(site)
        assert parameter is not None
        assert len(parameter[0].unique()) <= 16
    assert all(qmodel.quantizers[site].state == "on" for site in qmodel.sites())


def test_channel_scales_behind_norms_are_folded() -> None:
    qmodel = trained()
    assert {rewrite.name for rewrite in qmodel.rewrites} >= {"fold_norm_scale"}
    assert all(qmodel.formats[site.id].per == "tensor" for site in qmodel.sites(QKV_IN))


@pytest.mark.parametrize("weights", ["learn", "fixed"])
def test_weights_are_trained_as_they_are_quantized_or_not_at_all(weights: str) -> None:
    model = build_zoo("seeded_vit")
    qmodel = vitq.quantize(
        model, gplq_like(weights=weights), "w4a4", seeded_images(8), freeze=False, training=training()
    )
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, qmodel.model.get_parameter(name))]
    assert bool(moved) == (weights == "learn")
    assert qmodel.freeze().frozen


@pytest.mark.parametrize("chosen", [False, True])
def test_of_outliers_alone_the_codes_change(chosen: bool) -> None:
    """Of weights that were quantized, by the nearest codes or by others that a pass chose, the largest move."""
    share = 0.02
    train = PassSpec.of("train", weights="outliers", outliers=share, rate=3e-2, scale_rate=0.0, logits=1.0)
    fit, chooses = PassSpec.of("fit"), (PassSpec.of("round_columns"),) if chosen else ()
    whole = gplq_like()
    kept = [
        vitq.quantize(build_zoo("seeded_vit"), replace(whole, passes=passes), "w4a4", seeded_images(8), **more)
        for passes, more in (((fit, *chooses), {}), ((fit, *chooses, train), {"training": training()}))
    ]
    float_model, changed = build_zoo("seeded_vit"), 0
    for site in kept[0].sites(WEIGHT):
        before, after = (qmodel.model.get_parameter(site.param or "") for qmodel in kept)
        assert torch.equal(*(torch.stack(list(q.quantizers[site].params().values())) for q in kept))
        size = float_model.get_parameter(site.param or "").abs()
        differ = (before != after).reshape(size.shape)
        least = size.flatten().topk(max(1, round(share * size.numel()))).values[-1]
        assert not bool((differ & (size < least)).any()), site.id
        changed += int(differ.sum())
    assert changed > 20
    biases = [name for name, _ in float_model.named_parameters() if name.endswith("bias") and not chosen]
    assert all(torch.equal(kept[1].model.get_parameter(n), float_model.get_parameter(n)) for n in biases)


def test_activations_in_float_leave_nothing_to_train() -> None:
    qmodel = trained(bits="w4a16")
    assert qmodel.log["train"][0]["steps"] == 0
    assert qmodel.frozen


# -- keeping ---------------------------------------------------------------------------------------------


class Killed(Exception):  # noqa: N818
    pass


def interrupted(file: Path, at: int, run: Callable[..., QuantModel] = trained) -> None:
    original = loop.Loop._step

    def step(self: loop.Loop, *args: Any) -> Any:
        calls.append(1)
        if len(calls) > at:
            raise Killed
        return original(self, *args)

    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_step", step)
        with pytest.raises(Killed):
            run(file=file, every=0.0)


@pytest.mark.parametrize(("at", "recipe"), [(1, "gplq"), (4, "gplq"), (4, "gplq+noisy")])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, at: int, recipe: str) -> None:
    file, options = tmp_path / "state", RATES | {"logits": 1.0}
    trained = partial(globals()["trained"], recipe, options=options, batch_size=5, epochs=3)
    interrupted(file, at, trained)
    resumed = trained(file=file, resume=True)
    whole = trained()
    assert same(resumed, whole)
    assert resumed.log["train"][0] == whole.log["train"][0]
    assert same(trained(file=file, resume=True), whole), "a finished run is not trained again"


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("model or calibration", {"model": "seeded_swin"}),
        ("model or calibration", {"data": seeded_images(8, seed=5)}),
        ("recipe", {"options": RATES | {"variance": 0.9}}),
        ("recipe", {"bits": "w3a3"}),
        ("data", {"examples": Labelled(IMAGES - 1)}),
        ("settings", {"epochs": 3}),
    ],
)
def test_a_state_of_something_else_is_refused(tmp_path: Path, part: str, other: dict[str, Any]) -> None:
    file = tmp_path / "state"
    interrupted(file, 1)
    with pytest.raises(ArtifactError, match=rf"another .*{part}"):
        trained(file=file, resume=True, **other)


@pytest.mark.parametrize("damage", [b"", b"not a state", None])
def test_a_damaged_state_is_refused(tmp_path: Path, damage: bytes | None) -> None:
    file = tmp_path / "state"
    interrupted(file, 1)
    kept = tmp_path / "state.0"
    kept.write_bytes(kept.read_bytes()[:-10] if damage is None else damage)
    with pytest.raises(ArtifactError, match=r"state\.0 is no state of a training run"):
        trained(file=file, resume=True)


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state"
    interrupted(file, 2)
    before = (tmp_path / "state.0").read_bytes()

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitq.passes.train.keep.write_bytes", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        trained(file=file, resume=True, every=0.0)
    assert (tmp_path / "state.0").read_bytes() == before


def test_a_run_that_diverges_keeps_what_was_good() -> None:
    course = trained(epochs=20, options={"rate": 3.0, "scale_rate": 1e-2, "labels": 100.0}).log["train"][0]
    assert course["diverged"] == course["steps"] < 60
    assert course["kept"] <= course["diverged"] - loop.WINDOW


def test_what_is_good_is_known_a_window_later() -> None:
    """Steps that explode at the end of a window are not what is kept."""
    course = loop.Course(start=1.0)
    for value in (*[1.0] * 9, 2.0, *[9.0] * 4):
        course.add({"loss": value}, 1)
    assert course.bad
    assert course.good == 0


def test_easy_first_examples_are_no_measure_for_the_others() -> None:
    for seed in (1, 2):
        given = training(batch_size=1, epochs=1)
        options = {"rate": 1e-12, "scale_rate": 0.0}
        qmodel = vitq.quantize(
            build_zoo("seeded_vit"), "gplq", "w8a8", seeded_images(8), options=options, training=given, seed=seed
        )
        assert "diverged" not in qmodel.log["train"][0]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_no_number_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    original, calls = Distance.__call__, list[int]()

    def broken(self: Distance, *args: Any) -> dict[str, Tensor]:
        found = original(self, *args)
        calls.append(torch.is_grad_enabled())
        if sum(calls) != 7:
            return found
        if what == "loss":
            return {name: value * math.nan for name, value in found.items()}
        for value in found.values():
            value.register_hook(lambda g: g * math.nan)
        return found

    monkeypatch.setattr(Distance, "__call__", broken)
    qmodel = trained()
    course = qmodel.log["train"][0]
    assert (course["diverged"], course["steps"]) == (4, 3)  # two micro-batches a step, three with the last of an epoch
    assert all(bool(torch.isfinite(p).all()) for p in qmodel.parameters())
    json.dumps(course, allow_nan=False)


# -- what is trained -------------------------------------------------------------------------------------


def test_a_head_that_is_left_in_float_still_teaches() -> None:
    qmodel = vitq.quantize(
        build_zoo("seeded_vit"), "gplq", "w4a4", seeded_images(8), exclude=["head"], options=RATES, training=training()
    )
    assert qmodel.log["train"][0]["loss"].keys() == {"features", "labels"}


def test_the_teacher_is_the_model_as_it_was_given() -> None:
    """Whatever passes before have done to it."""
    seen: list[nn.Module] = []
    original = Watched.__init__

    def note(self: Watched, model: nn.Module, *args: Any) -> None:
        seen.append(model)
        original(self, model, *args)

    steps = ("fit", "compensate_blocks", "train", "fit")
    recipe = replace(gplq_like(), passes=tuple(PassSpec.of(name) for name in steps))
    model = build_zoo("seeded_vit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watched, "__init__", note)
        vitq.quantize(model, recipe, "w4a4", seeded_images(8), training=training())
    assert any(watched is model for watched in seen)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.head._forward_pre_hooks


def test_scales_move_in_parts_of_their_own_size() -> None:
    moved: list[float] = []
    original = loop.Loop._update

    def update(self: loop.Loop) -> None:
        scales = {name: group.params[name].detach().clone() for group in self.groups for name in group.sizes}
        original(self)
        for name, before in scales.items():
            moved.append(float(((self.params[name].detach() - before) / before).abs().max()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_update", update)
        trained(epochs=1)
    assert 0.5e-2 < moved[0] < 1.01e-2
    assert max(moved) < 2e-2


def test_codes_that_a_pass_chose_do_not_hold_back_weights_that_learn() -> None:
    model = build_zoo("seeded_vit")
    passes = (PassSpec.of("fit"), PassSpec.of("round_columns"), PassSpec.of("train", weights="learn", rate=1e-3))
    qmodel = vitq.quantize(
        model, replace(gplq_like(), passes=passes), "w4a4", seeded_images(8), freeze=False, training=training()
    )
    for site in qmodel.sites(WEIGHT):
        assert site.param is not None
        assert not torch.equal(model.get_parameter(site.param), qmodel.model.get_parameter(site.param)), site.id


def test_nothing_is_left_behind() -> None:
    qmodel = trained()
    assert all(p.grad is None for p in qmodel.parameters())
    assert not qmodel.model.get_submodule("head")._forward_pre_hooks
    assert not any("forward" in vars(module) for module in trained(recompute=True).model.modules())


# -- several processes -----------------------------------------------------------------------------------

SCRIPT = """
import os, sys, torch
sys.path.insert(0, {folder!r})
from test_train import gradients
torch.set_num_threads(1)
found = gradients(bits="w8a8", micro_batch=4, batch_size=9)  # 5 and 4, and in micro-batches: nothing is even
torch.save(found, sys.argv[1] + os.environ.get("RANK", "0"))
os._exit(0)  # at the end of the interpreter, threads of the process group now and then abort
"""


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    """The gradients that the optimizer is given; what comes after a step is chaos."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]  # on CPUs, too
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    for name, command in (("one", [sys.executable]), ("two", launch)):
        done = subprocess.run(
            [*command, str(script), str(tmp_path / name)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, first, second = (torch.load(tmp_path / name) for name in ("one0", "two0", "two1"))
    assert torch.equal(first, second)
    assert float((one - first).norm() / one.norm()) < 1e-3


# -- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_size": IMAGES + 1}, DataError),
        ({"epochs": 0}, InputError),
        ({"precision": "fp8"}, InputError),
        ({"examples": Labelled(0)}, DataError),
    ],
)
def test_training_that_cannot_be_is_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        training(**options)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"features": 0.0, "labels": 1.0}, DataError, "no labels"),
        ({"weights": "fixed", "scale_rate": 0.0}, CompositionError, "nothing to train"),
    ],
)
def test_a_loss_or_rates_that_cannot_be_are_refused(options: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        vitq.quantize(build_zoo("seeded_vit"), gplq_like(**options), "w4a4", seeded_images(8))


def test_half_precision_is_refused() -> None:
    with pytest.raises(InputError, match="float32"):
        vitq.quantize(build_zoo("seeded_vit").bfloat16(), gplq_like(), "w4a4", seeded_images(8).bfloat16())


def test_batches_that_cannot_be_divided_are_refused() -> None:
    given = {"x": seeded_images(4), "mask": torch.ones(1, 4)}
    with pytest.raises(DataError, match="first dimension"):
        Given(Batches.of(given))
    (inputs, _), *_ = Given(Batches.of([{"x": seeded_images(4), "flag": True}])).stream([[(0, 2), (0, 1)]])
    assert inputs["flag"] is True
    assert torch.equal(inputs["x"], seeded_images(4)[[2, 1]])


def test_a_recipe_that_trains_nothing_is_refused() -> None:
    with pytest.raises(CompositionError, match="trains nothing"):
        vitq.quantize(build_zoo("seeded_vit"), "repq_vit", "w4a4", seeded_images(8), training=training())


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "some"},
        {"rate": -1.0},
        {"outliers": 0.0},
        {"outliers": 1.5},
        {"variance": 0.0},
        {"features": 0.0, "labels": 0.0},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CompositionError, match="pass 'train'"):
        PassSpec.of("train", **options).build()


def test_labels_that_are_no_classes_are_refused() -> None:
    class Wrong(Labelled):
        def stream(self, batches: Sequence[Sequence[Draw]]) -> Iterator[tuple[Any, Tensor | None]]:
            for images, labels in super().stream(batches):
                assert labels is not None
                yield images, labels + 5

    with pytest.raises(DataError, match="10 classes"):
        trained(examples=Wrong())


def test_a_model_whose_outputs_cannot_be_compared_is_refused_before_anything_is_fitted() -> None:
    class Tokens(nn.Module):
        """Returns no (B, classes)."""

        def __init__(self, whole: bool) -> None:
            super().__init__()
            self.up, self.act, self.down, self.whole = nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 4), whole

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.down(self.act(self.up(x)))
            return made.sum() if self.whole else made

    class Rows(Labelled):
        def __init__(self) -> None:
            self.images = torch.randn(IMAGES, 5, 6, generator=torch.Generator().manual_seed(0))

    data = Rows().images[:8]
    with pytest.raises(CompositionError, match="no logits"):
        vitq.quantize(Tokens(False), gplq_like(labels=1.0), "w4a4", data, training=training(examples=Rows()))
    with pytest.raises(CompositionError, match="nothing by example that features"):
        vitq.quantize(Tokens(True), gplq_like(), "w4a4", data)
    learned = vitq.quantize(Tokens(False), gplq_like(), "w4a4", data)
    assert learned.log["train"][0]["loss"] == {"features": 1.0}, "its outputs take the place of features"


def test_a_state_that_is_there_is_not_begun_anew(tmp_path: Path) -> None:
    interrupted(tmp_path / "state", 1)
    before = (tmp_path / "state.0").read_bytes()
    with pytest.raises(InputError, match="was begun"):
        trained(file=tmp_path / "state")
    assert (tmp_path / "state.0").read_bytes() == before


def test_no_float_model_is_asked_where_labels_are_all_that_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*args: Any) -> None:
        raise AssertionError("the float model ran")

    monkeypatch.setattr(Teacher, "__init__", asked)
    told = trained(gplq_like(features=0.0, labels=1.0)).log["train"][0]
    assert told["loss"] == {"labels": 1.0}
    assert "targets" not in told


def test_the_forward_may_run_in_bfloat16() -> None:
    wide, narrow = (trained(precision=precision).log["train"][0]["start"] for precision in ("no", "bf16"))
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=0.2)


def test_frozen_parameters_stay() -> None:
    model = build_zoo("seeded_vit")
    frozen = [p for name, p in model.named_parameters() if name.startswith("blocks.0.")]
    for parameter in frozen:
        parameter.requires_grad_(False)
    qmodel = vitq.quantize(
        model, gplq_like(), "w4a4", seeded_images(8), freeze=False, training=replace(training(), epochs=1)
    )
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, qmodel.model.get_parameter(name))]
    assert {name.split(".")[1] for name in moved if name.startswith("blocks.")} == {"1", "2"}
