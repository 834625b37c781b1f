"""What every registered pass declares, and holds: needs, gives, drops, keeps_float_output."""

from __future__ import annotations

import pytest
import torch

from vitq.core.batches import Batches
from vitq.core.format import Bits
from vitq.core.progress import Silent
from vitq.core.recipe import ACT_SCALES, PASSES, RECIPES, SLOTS, WEIGHT_SCALES, Pass, PassSpec, resolve_recipe
from vitq.core.roles import WEIGHT
from vitq.data.zoo import build_zoo, seeded_images
from vitq.graph.trace import trace
from vitq.pipeline import insert, resolve

FACTS = {WEIGHT_SCALES, ACT_SCALES}


@pytest.mark.parametrize("name", list(PASSES))
def test_a_pass_declares_what_it_needs_gives_and_costs(name: str) -> None:
    step = PassSpec.of(name).build()
    assert isinstance(step, Pass)
    assert step.name == name
    assert step.slot in SLOTS
    assert step.cost
    assert step.needs <= FACTS
    assert step.gives <= FACTS
    assert step.drops <= FACTS
    assert not step.gives & step.drops
    assert isinstance(step.keeps_float_output, bool)
    assert type(step).__doc__


@pytest.mark.parametrize("model", ["seeded_vit", "seeded_swin"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_pass_of_every_recipe_holds_what_it_declares(recipe: str, model: str) -> None:
    images = seeded_images(3)
    float_model = build_zoo(model)
    with torch.no_grad():
        expected = float_model(images)
    qmodel = insert(build_zoo(model), trace(float_model, images[:1]), resolve(recipe, "w4a4"))
    for spec in resolve_recipe(recipe, Bits(4, 4)).passes:
        step = spec.build()
        step.run(qmodel, Batches.of(images), Silent())
        for fact, wanted in ((WEIGHT_SCALES, True), (ACT_SCALES, False)):
            sites = [s for s in qmodel.sites() if (s.role == WEIGHT) is wanted]
            if fact in step.gives:
                assert all(qmodel.quantizers[s].fitted for s in sites), spec
            if fact in step.drops:
                assert not all(qmodel.quantizers[s].fitted for s in sites), spec
        states = {s.id: qmodel.quantizers[s].state for s in qmodel.sites()}
        qmodel.set_state("off")
        with torch.no_grad():
            got = qmodel(images)
        for site, state in states.items():
            qmodel.quantizers[site].state = state
        if step.keeps_float_output:
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max(), spec
        expected = got
