"""Fitting probabilities by the error of A V: against a slow float64 search, and where it must keep its hands off."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.core import roles
from vitq.core.batches import Batches
from vitq.core.errors import CompositionError
from vitq.core.format import Format
from vitq.core.progress import Silent
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.data.zoo import build_zoo, seeded_images
from vitq.passes.fit_attention import FitAttention
from vitq.quantizers.base import Quantizer

EVERYTHING = 10**6  # matrices and rows: no sampling


def fitted(kind: str, images: Tensor, per: str = "tensor", model: nn.Module | None = None) -> QuantModel:
    """Everything at 16 bits but the probabilities, which have 4 and are fitted to their range."""
    rules = (
        Rule(Format("uniform", 16)),
        Rule(Format("uniform", 16, "channel"), (roles.WEIGHT,)),
        Rule(Format(kind, 4, per), (roles.SOFTMAX_OUT,)),
    )
    recipe = Recipe("plain", "none", rules, (PassSpec.of("fit"),))
    return vitq.quantize(model or build_zoo("seeded_vit"), recipe, "w4a4", images, freeze=False)


def operands(qmodel: QuantModel, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Probabilities and values of every attention, as they enter the product, the probabilities not quantized."""
    seen: dict[str, list[Tensor]] = {}
    for site in qmodel.graph.with_roles(roles.SOFTMAX_OUT, roles.VALUE):
        qmodel.quantizers[site].observer = lambda q, x, owner=site.owner: seen.setdefault(owner, []).append(x.double())
    with torch.no_grad():
        qmodel(images)
    for site in qmodel.sites():
        qmodel.quantizers[site].observer = None
    return {owner: (both[0], both[1]) for owner, both in seen.items()}


def product_error(quantizer: Quantizer, a: Tensor, v: Tensor) -> float:
    wrong = quantizer.decode(quantizer.encode(a.float())).double() - a
    return float((wrong @ v).square().sum())


@pytest.mark.parametrize("kind", ["tan", "logsqrt2", "uniform"])
def test_the_choice_is_the_best_of_a_slow_search_in_float64(kind: str) -> None:
    images = seeded_images(2)
    qmodel = fitted(kind, images)
    # The last attention: no other probabilities come after it, so what it sees does not depend on the pass's order.
    site = qmodel.graph.with_roles(roles.SOFTMAX_OUT)[-1]
    a, v = operands(qmodel, images)[site.owner]
    quantizer = qmodel.quantizers[site]
    assert isinstance(quantizer, Quantizer)
    before = {name: value.clone() for name, value in quantizer.params().items()}
    tops = (1.0, 0.7, 0.4)
    ranges = a.max().float() * torch.tensor(tops)[:, None]
    tried = quantizer.variants(quantizer.range_to_params(torch.zeros_like(ranges), ranges))
    count = len(tried["scale"])
    assert (count > len(tops)) == (kind == "tan")
    errors = [product_error(quantizer, a, v)]
    for k in range(count):
        quantizer.set_params({name: value[k] for name, value in tried.items()})
        errors.append(product_error(quantizer, a, v))
    quantizer.set_params(before)
    FitAttention(tops, EVERYTHING, EVERYTHING).run(qmodel, Batches.of(images), Silent())
    assert product_error(quantizer, a, v) == pytest.approx(min(errors), rel=1e-4)
    assert min(errors) < errors[0]


def test_a_tangent_beats_uniform_levels_where_attention_is_peaked_and_diffuse_at_once() -> None:
    images = seeded_images(8)
    model = build_zoo("seeded_vit")
    with torch.no_grad():
        for module in model.modules():
            qkv = getattr(module, "qkv", None)
            if isinstance(qkv, nn.Linear):
                qkv.weight[: 2 * qkv.in_features] *= 2
    errors: dict[str, list[float]] = {}
    for kind in ("tan", "uniform"):
        qmodel = fitted(kind, images, model=model)
        FitAttention().run(qmodel, Batches.of(images), Silent())
        for owner, (a, v) in operands(qmodel, images).items():
            quantizer = next(qmodel.quantizers[s] for s in qmodel.sites(roles.SOFTMAX_OUT) if s.owner == owner)
            assert isinstance(quantizer, Quantizer)
            errors.setdefault(kind, []).append(product_error(quantizer, a, v))
    assert all(tan < uniform for tan, uniform in zip(errors["tan"], errors["uniform"], strict=True)), errors


def test_scales_per_head_are_kept_and_counted() -> None:
    images = seeded_images(2)
    qmodel = fitted("logsqrt2", images, per="head")
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    FitAttention().run(qmodel, Batches.of(images), Silent())
    assert all(torch.equal(value, before[name]) for name, value in qmodel.state_dict().items())
    assert qmodel.log["fit_attention"] == {"fitted": 0, "kept": 3}


def test_observers_are_gone_afterwards_also_when_the_model_fails() -> None:
    images = seeded_images(2)
    qmodel = fitted("tan", images)
    FitAttention().run(qmodel, Batches.of(images), Silent())
    assert not any(qmodel.quantizers[site].observer for site in qmodel.sites())
    with pytest.raises(Exception, match=r"shape|size|height"):
        FitAttention().run(qmodel, Batches.of(torch.zeros(2, 3, 8, 8)), Silent())
    assert not any(qmodel.quantizers[site].observer for site in qmodel.sites())


@pytest.mark.parametrize("bad", [{"tops": ()}, {"tops": (1.5,)}, {"matrices": 0}, {"rows": 0}])
def test_arguments_that_make_no_sense_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(CompositionError, match="fit_attention"):
        PassSpec.of("fit_attention", **bad).build()
