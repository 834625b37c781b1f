"""What rows of linears count by their gradients, against autograd in float64 on a model written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.calibrate.importance import EVEN, RowWeights, row_weights
from vitq.calibrate.linears import linears
from vitq.calibrate.moments import Moments
from vitq.core.batches import Batches
from vitq.core.format import Bits
from vitq.core.progress import Silent
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, Recipe, resolve_recipe
from vitq.data.zoo import build_zoo, seeded_images, zoo_images

TOKENS, CHANNELS = 3, 6


class Tokens(nn.Module):
    """Two linears on tokens; the class token alone goes into the output."""

    def __init__(self, tokens_first: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.tokens_first, self.twice = tokens_first, twice

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1) if self.tokens_first else x
        y = torch.tanh(self.a(y))
        y = torch.tanh(self.a(y)) if self.twice else y
        y = y + y.mean(0 if self.tokens_first else 1, keepdim=True)
        y = self.b(y)
        return y[0] if self.tokens_first else y[:, 0]


def weights_of(model: nn.Module, x: Tensor) -> tuple[QuantModel, dict[str, Tensor]]:
    qmodel = vitq.quantize(model.eval(), "minmax", "w8a8", x, freeze=False)
    found = row_weights(qmodel, Batches.of(x), linears(qmodel), Silent())
    return qmodel, {name.split(":")[0]: value for name, value in found.items()}


def inputs(images: int = 9) -> Tensor:
    return torch.randn(images, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(1))


def test_weights_are_squared_gradients_of_the_probe_and_a_part_alike() -> None:
    torch.manual_seed(0)
    model, x = Tokens(), inputs()
    weights = weights_of(model, x)[1]
    # Of the last linear only class tokens reach the output: the other rows have the part that counts alike.
    last = weights["b"].reshape(-1, TOKENS)
    assert torch.allclose(last[:, 1:], torch.full_like(last[:, 1:], EVEN))
    assert torch.allclose(last.mean(), torch.tensor(1.0))
    # Of the one before: the Jacobian of each image's logits, and the expectation over the probe in closed form.
    wide = model.double()
    exact = []
    for image in x.double():
        before = wide.a(image[None]).detach().requires_grad_()

        def behind(y: Tensor) -> Tensor:
            y = torch.tanh(y)
            return wide.b(y + y.mean(1, keepdim=True))[0, 0]

        jacobian = torch.autograd.functional.jacobian(behind, before)[:, 0]
        p = behind(before).softmax(0)
        metric = torch.diag(p) - p.outer(p)
        exact.append(torch.einsum("otc,op,ptc->t", jacobian, metric, jacobian).detach())
    per_image = torch.stack(exact)
    expected = EVEN + (1 - EVEN) * per_image / per_image.mean(1, keepdim=True)
    got = weights["a"].reshape(-1, TOKENS).double()
    # One draw of the probe for each image: the shares of tokens over all images agree, single rows do not.
    assert torch.allclose(got.mean(0), expected.mean(0), rtol=0.2)
    assert float(got.mean()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("options", [{"tokens_first": True}, {"twice": True}])
def test_rows_that_do_not_come_image_by_image_count_alike(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    weights = weights_of(Tokens(**options), inputs())[1]
    assert "a" not in weights
    assert ("b" in weights) is ("twice" in options)


def test_quantizers_are_as_before_and_nothing_watches_any_more() -> None:
    images = seeded_images(6)
    qmodel = vitq.quantize(build_zoo("seeded_swin"), "repq_vit", "w4a4", images, freeze=False)
    before = {site.id: qmodel.quantizers[site].state for site in qmodel.sites()}
    with torch.no_grad():
        expected = qmodel(images)
    weights = row_weights(qmodel, Batches.of(images), linears(qmodel), Silent())
    assert {linear.weight.id for linear in linears(qmodel)} == set(weights)
    assert {site.id: qmodel.quantizers[site].state for site in qmodel.sites()} == before
    assert all(qmodel.quantizers[s].observer is qmodel.quantizers[s].product_observer is None for s in qmodel.sites())
    with torch.no_grad():
        assert torch.equal(qmodel(images), expected)


def test_weighted_moments_are_those_of_repeated_rows() -> None:
    x, counts = inputs().reshape(-1, CHANNELS), torch.arange(27) % 3
    weighted, repeated = (Moments(CHANNELS, torch.device("cpu")) for _ in range(2))
    taken = RowWeights(counts / counts.float().mean())
    for part in x.split(5):
        weighted.add(part, taken.of(part))
    repeated.add(x.repeat_interleave(counts, dim=0))
    torch.testing.assert_close(weighted.mean, repeated.mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weighted.matrix, repeated.matrix, rtol=1e-5, atol=1e-7)
    assert RowWeights(None).of(x) is None


def with_pass(model: nn.Module, images: Tensor, name: str, weighted: bool) -> QuantModel:
    base = resolve_recipe("repq_vit", Bits(3, 4))
    passes = (*base.passes, PassSpec.of(name, weighted=weighted))
    return vitq.quantize(model, Recipe("weighted", "none", base.formats, passes), "w3a4", images)


def test_weighted_codes_lower_the_divergence_of_the_output() -> None:
    model, images = build_zoo("fashion_vit"), zoo_images("fashion_test")[0][:32]
    with torch.no_grad():
        wanted = model(images).log_softmax(1)
        made = [with_pass(model, images, "round_columns", w)(images).log_softmax(1) for w in (False, True)]
    plain, weighted = (float((wanted.exp() * (wanted - each)).sum()) for each in made)
    assert weighted < plain


def test_weighted_biases_lower_the_mean_error_of_the_tokens_that_matter() -> None:
    """Behind the last block only class tokens do."""
    model, images = build_zoo("fashion_vit"), zoo_images("fashion_test")[0][:32]
    block = list(model.get_submodule("blocks"))[-1]
    name = next(name for name, module in model.named_modules() if module is block) + ".mlp.fc2"

    def class_tokens(of: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        handle = of.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out[:, 0].mean(0)))
        with torch.no_grad():
            of(images)
        handle.remove()
        return seen[0]

    made = [with_pass(model, images, "correct_bias", weighted).model for weighted in (False, True)]
    plain, weighted = (float((class_tokens(each) - class_tokens(model)).norm()) for each in made)
    assert weighted < 0.5 * plain
