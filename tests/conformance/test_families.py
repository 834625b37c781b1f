"""Every family, whole: trace, insert, quantize by a real recipe, save, load; and models that nobody prepared for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import vitq
from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.core.site import REASON_CONSTANT, REASON_UNSUPPORTED
from vitq.graph.trace import trace

sys.path.insert(0, str(Path(__file__).parent))
from families import Family
from families_hf import FURTHER as FURTHER_HF
from families_hf import PINNED as PINNED_HF
from families_timm import FURTHER as FURTHER_TIMM
from families_timm import PINNED as PINNED_TIMM
from families_unseen import UNSEEN, UNSUPPORTED

FAMILIES = [*PINNED_TIMM, *PINNED_HF, *FURTHER_TIMM, *FURTHER_HF]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_reloaded_model_gives_identical_outputs(family: Family, tmp_path: Path) -> None:
    batch = family.batch()
    qmodel = vitq.quantize(family.build(), "repq_vit", "w4a4", batch, forward_fn=family.forward_fn)
    expected = family.run(qmodel, batch)
    assert all(bool(torch.isfinite(t).all()) for t in expected)
    vitq.save(qmodel, tmp_path / "artifact")
    loaded = vitq.load(tmp_path / "artifact", model=family.build(), forward_fn=family.forward_fn)
    for exact, out in zip(expected, family.run(loaded, batch), strict=True):
        assert torch.equal(exact, out)


@pytest.mark.parametrize("family", UNSEEN, ids=str)
def test_models_that_nobody_prepared_for_keep_the_contract(family: Family) -> None:
    model, batch = family.build(), family.batch()
    exact = family.run(model, batch)
    rules = (Rule(Format("uniform", 16)), Rule(Format("uniform", 16, "channel"), (roles.WEIGHT,)))
    plain = Recipe("plain16", "none", rules, (PassSpec.of("fit"),))
    qmodel = vitq.quantize(model, plain, "w4a4", batch, freeze=False, forward_fn=family.forward_fn)
    graph = qmodel.graph
    constant = sum(c.macs for c in graph.calls if c.reason == REASON_CONSTANT)
    assert sum(c.macs for c in graph.calls if c.sites) >= 0.99 * (graph.macs - constant)
    for one, other in zip(exact, family.run(qmodel, batch), strict=True):
        noise = (one - other).double().square().sum()
        assert noise <= 1e-6 * one.double().square().sum()  # 60 dB
    qmodel.set_state("off")
    for one, other in zip(exact, family.run(qmodel, batch), strict=True):
        assert torch.equal(one, other) or (family.decomposed and torch.allclose(one, other, atol=1e-5, rtol=1e-5))


@pytest.mark.parametrize("family", UNSUPPORTED, ids=str)
def test_what_cannot_be_taken_apart_is_counted_and_named(family: Family) -> None:
    graph = trace(family.build(), family.batch(), family.forward_fn)
    left = [c for c in graph.calls if c.reason == REASON_UNSUPPORTED]
    assert {c.detail for c in left} == {"lstm"}
    assert all(c.macs > 0 for c in left)
    assert sum(c.macs for c in left) > 0.01 * graph.macs


def test_the_page_of_models_is_what_its_script_writes() -> None:
    path = Path(__file__).resolve().parents[2] / "tools" / "models_table.py"
    spec = importlib.util.spec_from_file_location("models_table", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run python tools/models_table.py"
