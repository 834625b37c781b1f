"""Gradients of a defined probe: their second moments against Jacobians, their random numbers, odd models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.calibrate import sensitivity
from vitq.calibrate.sensitivity import PROBES, STEP, run_backward
from vitq.core.batches import Batches
from vitq.core.progress import Silent
from vitq.core.qmodel import QuantModel

SAMPLES = 20_000
each_probe = pytest.mark.parametrize("probe", PROBES)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 6), nn.Linear(6, width)

    def attended(self, x: Tensor) -> Tensor:
        return x + torch.softmax(x @ x.mT, dim=-1) @ x

    def forward(self, x: Tensor) -> Tensor:
        x = self.attended(x)
        out: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return out


class Small(nn.Module):
    """Two blocks over two tokens of three channels, and a head."""

    def __init__(self, classes: int = 4, dense: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Linear(3, 3)
        self.blocks = nn.ModuleList([Block(3), Block(3)])
        self.head = nn.Linear(3, classes)
        self.dense = dense
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x if self.dense else x.mean(1))
        return out


def gradients(
    model: nn.Module,
    data: Batches,
    probe: str,
    owner: str = "blocks.0.up",
    seed: int = 0,
    since: tuple[str, ...] = ("",),
) -> Tensor:
    """Those that a probe gives at the result of a linear, image by image."""
    qmodel = vitq.quantize(model, "minmax", "w8a8", next(iter(data)), freeze=False)
    qmodel.set_state("off")
    quantizer = next(qmodel.quantizers[s] for s in qmodel.sites() if s.owner == owner and s.operand == "input")
    quantizer.observer = lambda q, x: None
    found: list[Tensor] = []

    def watch(seen: int, images: int, live: Callable[[], bool]) -> None:
        def made(result: Tensor) -> None:
            result.register_hook(lambda g: found.append(g.detach().clone()) if live() else None)

        quantizer.product_observer = made

    with Silent().task("", len(data.sizes)) as task:
        run_backward(qmodel, data, probe, seed, watch, task, since)
    return torch.cat(found)


def jacobian(end: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """(outputs, inputs), float64"""
    found: Tensor = torch.autograd.functional.jacobian(end, point.detach())  # type: ignore[no-untyped-call]
    return found.reshape(-1, point.numel())


@dataclass
class Parts:
    """The model in float64, cut at what `up` of the first block makes and at that block's end."""

    model: Small

    def before(self, x: Tensor) -> Tensor:
        """The residual stream beside `up`."""
        return self.model.blocks[0].attended(self.model.embed(x))  # type: ignore[no-any-return, operator]

    def made(self, x: Tensor) -> Tensor:
        first = self.model.blocks[0]
        return first.up(first.norm(self.before(x)))  # type: ignore[no-any-return, operator]

    def rest(self, up: Tensor) -> Tensor:
        return self.model.blocks[0].down(torch.tanh(up))  # type: ignore[no-any-return, operator]

    def end(self, x: Tensor) -> Tensor:
        return self.before(x) + self.rest(self.made(x))

    def behind(self, end: Tensor) -> Tensor:
        hidden = self.model.blocks[1](end)
        return self.model.head(hidden if self.model.dense else hidden.mean(1))  # type: ignore[no-any-return]

    def output(self, x: Tensor, up: Tensor) -> Tensor:
        return self.behind(self.before(x) + self.rest(up))


def metric(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return p.diag() - p[:, None] * p[None]


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """The same image again and again, in large pieces."""
    monkeypatch.setattr(sensitivity, "GRADIENT_IMAGES", SAMPLES // 4)
    image = torch.randn(1, 2, 3)
    return Batches.of([image.expand(SAMPLES, 2, 3)])


def assert_moment(found: Tensor, expected: Tensor, tails: float = 1.0) -> None:
    """Two second moments within the error of sampling; products of normal numbers have tails 1."""
    spread = expected.diag().sqrt()
    off = (found - expected).abs() / (spread[:, None] * spread[None])
    assert float(off.max()) < tails * 6 * (2 / SAMPLES) ** 0.5


@pytest.mark.parametrize("probe", ["hessian", "fisher"])
def test_the_second_moment_at_logits_is_the_gauss_newton_hessian(probe: str, many: Batches) -> None:
    model, image = Small(), next(iter(many))[:1].double()
    g = gradients(model, many, probe).flatten(1).double()
    cut = Parts(Small().double())
    j = jacobian(lambda up: cut.output(image, up), cut.made(image))
    expected = (j.T @ metric(cut.model(image)[0]) @ j).detach()
    assert_moment(g.T @ g / len(g), expected, 1.0 if probe == "hessian" else 3.0)  # labels that are drawn: heavier


def test_outputs_that_are_no_logits_count_alike(many: Batches) -> None:
    model, image = Small(dense=True), next(iter(many))[:1].double()
    g = gradients(model, many, "hessian").flatten(1).double()
    cut = Parts(Small(dense=True).double())
    j = jacobian(lambda up: cut.output(image, up), cut.made(image))
    assert_moment(g.T @ g / len(g), (j.T @ j).detach())


def test_blockwise_squares_average_to_the_metric_at_the_end_of_the_block(many: Batches) -> None:
    """E[g**2] = diag(J_rest^T diag(g_B**2) J_rest), and over draws of g_B its second moment stands for g_B**2."""
    model, image = Small(), next(iter(many))[:1].double()
    g = gradients(model, many, "blockwise").flatten(1).double()
    cut = Parts(Small().double())
    j_rest, j_behind = jacobian(cut.rest, cut.made(image)), jacobian(cut.behind, cut.end(image))
    at_end = (j_behind.T @ metric(cut.model(image)[0]) @ j_behind).diag()
    expected = (j_rest.T @ at_end.diag() @ j_rest).diag().detach()
    found = g.square().mean(0)
    torch.testing.assert_close(found, expected, rtol=12 * SAMPLES**-0.5, atol=0)
    plain = gradients(model, many, "hessian").flatten(1).double().square().mean(0)
    assert float(((plain - expected).abs() / expected).max()) > 24 * SAMPLES**-0.5  # it is another metric


def test_the_perturbation_hessian_is_that_of_finite_differences() -> None:
    model, images = Small(), torch.randn(3, 2, 3)
    qmodel = vitq.quantize(model, "minmax", "w8a8", images, freeze=False)
    qmodel.set_state("off")
    roots = sensitivity._perturbed(qmodel, Batches.of(images), 0)
    assert list(roots) == ["blocks.0", "blocks.1"]
    cut = Parts(Small().double())
    with torch.no_grad():
        end, to = cut.end(images.double()), cut.model(images.double())
        step = STEP * float(end.square().mean().sqrt())

        def loss(hidden: Tensor) -> Tensor:
            return (to.softmax(1) * (to.log_softmax(1) - cut.behind(hidden).log_softmax(1))).sum()

        def slope(hidden: Tensor, image: int, token: int, channel: int) -> float:
            by = torch.zeros_like(hidden)
            by[image, token, channel] = 1e-5
            return float(loss(hidden + by) - loss(hidden - by)) / 2e-5

        expected = torch.zeros(2, 3, dtype=torch.float64)
        for token in range(2):
            for channel in range(3):
                curves = [
                    abs(slope(end + step, i, token, channel) - slope(end - step, i, token, channel)) / (2 * step)
                    for i in range(len(images))
                ]
                expected[token, channel] = (sum(curves) / len(curves)) ** 0.5
    torch.testing.assert_close(roots["blocks.0"].double(), expected, rtol=2e-2, atol=1e-3)


def test_perturbation_squares_average_to_its_metric(many: Batches) -> None:
    model, image = Small(), next(iter(many))[:1]
    qmodel = vitq.quantize(model, "minmax", "w8a8", image, freeze=False)
    qmodel.set_state("off")
    root = sensitivity._perturbed(qmodel, Batches.of(image), 0)["blocks.0"].double()
    g = gradients(model, many, "perturbation").flatten(1).double()
    cut = Parts(Small().double())
    j_rest = jacobian(cut.rest, cut.made(image.double()))
    expected = (j_rest.T @ root.square().flatten().diag() @ j_rest).diag().detach()
    torch.testing.assert_close(g.square().mean(0), expected, rtol=12 * SAMPLES**-0.5, atol=1e-6)


@each_probe
def test_random_numbers_belong_to_an_image_whatever_the_micro_batches(
    probe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(10, 2, 3)
    runs = [
        gradients(Small(), Batches.of(cut), probe)
        for cut in ([images], list(images.split([5, 5])), list(images.split([6, 1, 3])))
    ]
    assert float(runs[0].abs().max()) > 0
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-4, atol=1e-6)
    again, another = (gradients(Small(), Batches.of([images]), probe, seed=seed) for seed in (0, 1))
    assert torch.equal(again, runs[0])
    assert not torch.allclose(another, runs[0])
    monkeypatch.setattr(sensitivity, "LARGE", 0)
    assert sensitivity.images_at_a_time(Small()) == 1
    torch.testing.assert_close(gradients(Small(), Batches.of([images]), probe), runs[0], rtol=1e-4, atol=1e-6)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.head = nn.Linear(3, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dict[str, object]:
        out = self.head(self.a(x))
        return {"one": out, "two": -out, "three": out.detach(), "count": torch.tensor(1)}


def test_outputs_have_random_numbers_of_their_own() -> None:
    """Found by this test: with the same ones, two heads of opposite signs looked as if nothing mattered."""
    g = gradients(TwoOutputs().eval(), Batches.of(torch.randn(6, 2, 3)), "hessian", owner="a")
    assert float(g.abs().max()) > 1e-3


class InPlace(nn.Module):
    """Changes its input, and calls nothing a block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.relu_(self.a(x.sub_(0.5))))
        return out


@each_probe
def test_a_model_that_changes_its_input_in_place_and_has_no_blocks(probe: str) -> None:
    """Found by this test: a leaf that requires gradients may not be changed in place."""
    images = torch.randn(6, 3)
    before = images.clone()
    assert float(gradients(InPlace().eval(), Batches.of(images.clone()), probe, owner="a").abs().max()) > 0
    model = Small()
    g = gradients(model, Batches.of(torch.randn(6, 2, 3)), probe)
    assert bool(g.isfinite().all())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(images, before)


@each_probe
def test_half_precision_gives_finite_gradients_like_those_of_float32(probe: str) -> None:
    images = torch.randn(6, 2, 3)
    found, wanted = (
        gradients(model, Batches.of(x), probe)
        for model, x in ((Small().bfloat16(), images.bfloat16()), (Small(), images.bfloat16().float()))
    )
    assert found.dtype == torch.bfloat16
    assert float(torch.cosine_similarity(found.float().flatten(), wanted.flatten(), dim=0)) > 0.9


def test_states_of_the_probe_leave_the_model_as_it_was() -> None:
    model = Small()
    qmodel = vitq.quantize(model, "minmax", "w8a8", torch.randn(4, 2, 3), freeze=False)
    assert isinstance(qmodel, QuantModel)
    qmodel.model.head.weight.requires_grad_(False)
    with Silent().task("", 1) as task:
        run_backward(qmodel, Batches.of(torch.randn(4, 2, 3)), "blockwise", 0, lambda *_: None, task)
    asked = {name for name, p in qmodel.model.named_parameters() if p.requires_grad}
    assert asked == {name for name, _ in model.named_parameters()} - {"head.weight"}
    assert not any(module._forward_hooks for module in qmodel.model.modules())


@pytest.mark.parametrize("probe", PROBES)
def test_gradients_go_back_to_where_they_are_asked_for_and_are_the_same(probe: str) -> None:
    data, entered = Batches.of(torch.randn(4, 2, 3)), list[bool]()
    model = Small()
    whole = gradients(model, data, probe, "blocks.1.up")
    model.blocks[0].register_forward_hook(lambda m, args, out: entered.append(out.requires_grad))
    since = gradients(model, data, probe, "blocks.1.up", since=("blocks.1", "head"))
    assert torch.equal(whole, since)
    assert entered
    assert not any(entered)


def test_gradients_start_at_the_batch_whatever_the_forward_calls() -> None:
    class Other(Small):
        def features(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    model, x = Other(), torch.randn(4, 2, 3)
    other = Batches.of(x, lambda model, batch: model.features(batch))
    assert torch.equal(
        gradients(model, other, "hessian", "blocks.0.up"), gradients(model, Batches.of(x), "hessian", "blocks.0.up")
    )
