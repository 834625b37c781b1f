"""What the parts of ptq4vit, apq_vit, liu2021 are for, on real weights and other photos. Skipped without ../shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.calibrate.capture import switched_off
from vitq.core import roles
from vitq.core.format import Format
from vitq.core.qmodel import QuantModel
from vitq.core.site import Site
from vitq.data.source import LoadedModel

pytestmark = pytest.mark.real
CALIBRATION, OTHERS = 8, 6
BLOCKS = 5
DRAWS = 8
LARGE = 0.3  # probabilities from here on decide what a row of attention is about


def searched(loaded: LoadedModel, recipe: str, images: Tensor, **options: str | float) -> QuantModel:
    return vitq.quantize(loaded.model, recipe, "w4a4", images, options={"rounds": 1, **options}, freeze=False)


@pytest.mark.parametrize(
    ("role", "twin", "options"),
    [(roles.SOFTMAX_OUT, "twin_softmax", {"unit": True}), (roles.FC2_IN, "twin_gelu", {})],
)
def test_two_ranges_lower_the_error(
    loaded: LoadedModel,
    photos: tuple[Tensor, Tensor],
    product_errors: Callable[..., dict[str, float]],
    role: str,
    twin: str,
    options: dict[str, bool],
) -> None:
    search = {"search": "grid", "low": 0.01}
    two = product_errors(loaded, Format.of(twin, 4, **options), role, photos, **search)
    one = product_errors(loaded, Format.of("uniform", 4, symmetric=True), role, photos, **search)
    assert len(two) == BLOCKS
    assert sum(two[site] < one[site] for site in one) >= BLOCKS - 1
    assert sum(two.values()) < 0.8 * sum(one.values())


def important_errors(qmodel: QuantModel, plain: nn.Module, images: Tensor) -> float:
    """Squared errors of the linears' outputs, one linear quantized at a time, weighed by Fisher information.

    That is the mean of squared gradients over DRAWS labels drawn from the model's own probabilities.
    """
    names = [call.owner for call in qmodel.graph.calls if call.op == "linear" and "blocks" in call.owner]
    wanted, logits = outputs(plain, names, images)
    weight = {name: torch.zeros_like(x) for name, x in wanted.items()}
    for draw in range(DRAWS):
        label = torch.multinomial(logits.softmax(1).detach(), 1, generator=torch.Generator().manual_seed(draw))
        loss = logits.log_softmax(1).gather(1, label).sum()
        gradients = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True)
        for name, g in zip(wanted, gradients, strict=True):
            weight[name] += g.square() / DRAWS
    total = 0.0
    qmodel.set_state("off")
    for call in qmodel.graph.calls:
        if call.owner in names:
            sites = [qmodel.graph.sites[site] for site in call.sites]
            qmodel.set_state("on", sites)
            with torch.no_grad():
                got = outputs(qmodel.model, [call.owner], images)[0][call.owner]
            qmodel.set_state("off", sites)
            total += float(((got - wanted[call.owner].detach()).square() * weight[call.owner]).sum())
    return total


def outputs(model: nn.Module, names: list[str], images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of modules, and the model's."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: found.__setitem__(name, out))
        for name in names
    ]
    logits = model(images.clone().requires_grad_())
    for handle in handles:
        handle.remove()
    return found, logits


@pytest.mark.parametrize(("recipe", "objective"), [("ptq4vit", "hessian"), ("apq_vit", "blockwise")])
def test_gradients_find_scales_that_lower_the_errors_that_matter(
    loaded: LoadedModel, photos: tuple[Tensor, Tensor], recipe: str, objective: str
) -> None:
    guided, plain = (
        important_errors(searched(loaded, recipe, photos[0], objective=name), loaded.model, photos[1])
        for name in (objective, "mse")
    )
    assert guided < plain


def test_uniform_codes_keep_the_large_end_of_attention(loaded: LoadedModel, photos: tuple[Tensor, Tensor]) -> None:
    """Against logarithms to base two, which the paper says lose it; with the range kept, as the port has it."""
    errors = []
    for softmax in ("uniform", "log2"):
        qmodel = searched(loaded, "apq_vit", photos[0], softmax=softmax, objective="mse", softmax_low=0.9)
        errors.append(large_end(qmodel, photos[1]))
    assert len(errors[0]) == BLOCKS
    assert all(uniform < logarithm for uniform, logarithm in zip(*errors, strict=True))


def large_end(qmodel: QuantModel, images: Tensor) -> list[float]:
    """Mean squared error of large probabilities, by block."""
    found: list[float] = []

    def look(quantizer: Any, x: Tensor) -> None:
        found.append(float((quantizer.quantized(x) - x)[x > LARGE].square().mean()))

    sites = qmodel.sites(roles.SOFTMAX_OUT)
    with torch.no_grad(), switched_off(qmodel, sites):
        for site in sites:
            qmodel.quantizers[site].observer = look
        qmodel(images)
    return found


def test_ranking_keeps_the_order_of_attention_scores(
    loaded: LoadedModel,
    photos: tuple[Tensor, Tensor],
    made: Callable[[QuantModel, Tensor, Sequence[Site], Sequence[Site]], dict[str, Tensor]],
) -> None:
    wrong = []
    for objective in ("ranking", "mse"):
        qmodel = searched(loaded, "liu2021", photos[0], objective=objective)
        queries, both = qmodel.sites(roles.QUERY), qmodel.sites(roles.QUERY, roles.KEY)
        wanted = made(qmodel, photos[1], queries, [])
        share = []
        for site in queries:
            pair = [s for s in both if s.owner == site.owner]
            got, to = made(qmodel, photos[1], [site], pair)[site.id], wanted[site.id]
            turned = [(got.roll(n, -1) - got) * (to.roll(n, -1) - to) < 0 for n in (1, 3, 7)]
            share.append(float(torch.stack(turned).double().mean()))
        wrong.append(share)
    assert len(wrong[0]) == BLOCKS
    assert sum(wrong[0]) < sum(wrong[1])
