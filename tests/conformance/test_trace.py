"""The trace contract of design.md 7, on small random configurations of every family that vitq promises."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitq.core import roles
from vitq.core.errors import TraceError
from vitq.core.format import Format
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.core.site import REASON_CONSTANT, REASONS, Graph
from vitq.graph.trace import trace
from vitq.pipeline import quantize

sys.path.insert(0, str(Path(__file__).parent))
from families import BATCH, Family
from families_hf import FURTHER as FURTHER_HF
from families_hf import PINNED as PINNED_HF
from families_timm import FURTHER as FURTHER_TIMM
from families_timm import PINNED as PINNED_TIMM

PINNED = [*PINNED_TIMM, *PINNED_HF]
FURTHER = [*FURTHER_TIMM, *FURTHER_HF]


def recipe(bits: int) -> Recipe:
    """Every activation per tensor, weights per channel."""
    rules = (Rule(Format("uniform", bits)), Rule(Format("uniform", bits, "channel"), (roles.WEIGHT,)))
    return Recipe(f"plain{bits}", "none", rules, (PassSpec.of("fit"),))


@dataclass
class Case:
    family: Family
    model: nn.Module
    batch: Any
    graph: Graph
    float_out: list[Tensor]
    _models: dict[int, QuantModel] = field(default_factory=dict)

    def quantized(self, bits: int) -> QuantModel:
        if bits not in self._models:
            forward = self.family.forward_fn
            self._models[bits] = quantize(
                self.model, recipe(bits), "w4a4", self.batch, freeze=False, forward_fn=forward
            )
        self._models[bits].set_state("on")
        return self._models[bits]

    def run(self, model: nn.Module, batch: Any = None) -> list[Tensor]:
        return self.family.run(model, self.batch if batch is None else batch)


_CASES: dict[str, Case] = {}


def _case(family: Family) -> Case:
    if family.name not in _CASES:
        model, batch = family.build(), family.batch()
        graph = trace(model, batch, family.forward_fn)
        _CASES[family.name] = Case(family, model, batch, graph, family.run(model, batch))
    return _CASES[family.name]


@pytest.fixture(params=PINNED, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return _case(request.param)


@pytest.fixture(params=[*PINNED, *FURTHER], ids=str)
def any_case(request: pytest.FixtureRequest) -> Case:
    return _case(request.param)


def _sqnr(exact: Tensor, other: Tensor) -> float:
    noise = (exact - other).double().square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(exact.double().square().sum() / noise))


# -- what is found ---------------------------------------------------------------------------------------


def test_every_block_has_the_roles_of_attention_and_mlp(any_case: Case) -> None:
    graph, expected = any_case.graph, any_case.family.block
    assert len(graph.blocks) == any_case.family.blocks
    if expected is None:
        return
    one_by_one = expected if isinstance(expected, tuple) else (expected,) * len(graph.blocks)
    for block, roles_of_block in zip(graph.blocks, one_by_one, strict=True):
        assert Counter(s.role for s in graph.sites.values() if s.block == block) == roles_of_block, block


def test_outside_of_blocks_are_patches_merging_and_head(any_case: Case) -> None:
    if any_case.family.outside is not None:
        found = Counter(s.role for s in any_case.graph.sites.values() if s.block is None)
        assert found == any_case.family.outside


def test_axes_say_what_each_dimension_is(case: Case) -> None:
    attention = {
        roles.QUERY: {("batch", "head", "token", "channel")},
        roles.KEY: {("batch", "head", "token", "channel"), ("batch", "head", "channel", "token")},
        roles.VALUE: {("batch", "head", "token", "channel")},
        roles.SOFTMAX_OUT: {("batch", "head", "token", "token")},
        roles.PATCH_IN: {("batch", "channel", "token", "token")},
        roles.HEAD_IN: {("batch", "channel")},
    }
    for site in case.graph.sites.values():
        assert len(site.axes) == len(site.shape)
        if site.role == roles.WEIGHT:
            assert site.axes[:2] == ("channel", "in")
            assert site.param is not None
        elif site.role in attention:
            assert site.axes in attention[site.role], site.id
        else:
            assert site.axes[-1] == "channel"
            assert set(site.axes) <= {"batch", "token", "channel"}


def test_the_axes_of_keys_put_channels_where_they_are(case: Case) -> None:
    channels = {
        (site.owner, site.role): site.shape[site.axes.index("channel")]
        for site in case.graph.with_roles(roles.QUERY, roles.KEY, roles.VALUE)
    }
    for owner in {owner for owner, _ in channels}:
        assert channels[owner, roles.QUERY] == channels[owner, roles.KEY] == channels[owner, roles.VALUE]


def test_the_second_linear_knows_its_activation_function(case: Case) -> None:
    assert {s.producer for s in case.graph.with_roles(roles.FC2_IN)} == {"gelu"}


def test_norms_are_paired_with_the_linears_they_feed(any_case: Case) -> None:
    found = Counter(any_case.graph.sites[p.inputs[0]].role for p in any_case.graph.pairs)
    if any_case.family.pairs is not None:
        assert dict(found) == any_case.family.pairs


def test_a_pair_holds_all_linears_of_its_norm(case: Case) -> None:
    assert isinstance(case.family.block, Counter)
    assert case.family.outside is not None
    apart = case.family.block[roles.QKV_IN]
    for pair in case.graph.pairs:
        role = case.graph.sites[pair.inputs[0]].role
        linears = {roles.QKV_IN: apart, roles.HEAD_IN: case.family.outside[roles.HEAD_IN]}.get(role, 1)
        assert len(pair.inputs) == len(pair.weights) == len(pair.biases) == linears
        channels = case.model.get_parameter(f"{pair.norm}.weight").shape[0]
        for input_site, weight_site in zip(pair.inputs, pair.weights, strict=True):
            site, weight = case.graph.sites[input_site], case.graph.sites[weight_site]
            assert site.norm == pair.norm
            assert site.shape[site.axes.index("channel")] == weight.shape[1] == channels
    merging = [p for p in case.graph.pairs if case.graph.sites[p.inputs[0]].role == roles.MERGE_IN]
    assert all(p.biases == (None,) for p in merging)


def test_biases_of_pairs_are_those_of_their_linears(case: Case) -> None:
    for pair in case.graph.pairs:
        for weight, bias in zip(pair.weights, pair.biases, strict=True):
            name = case.graph.sites[weight].param
            assert name is not None
            owner = name.rpartition(".")[0]
            assert bias is None or (bias.rpartition(".")[0] == owner and bias.endswith("bias"))


# -- nothing is missed -----------------------------------------------------------------------------------


def test_at_least_99_percent_of_the_macs_are_quantized(any_case: Case) -> None:
    reached = sum(c.macs for c in any_case.graph.calls if c.sites)
    constant = sum(c.macs for c in any_case.graph.calls if c.reason == REASON_CONSTANT)
    # What does not depend on the input folds into a constant before any deployment.
    assert reached >= 0.99 * (any_case.graph.macs - constant)
    if any_case.family in PINNED:
        assert reached == any_case.graph.macs


def test_macs_equal_an_independent_count(any_case: Case) -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            any_case.run(any_case.model)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert any_case.graph.example_images == BATCH
    # Each call's count is whole per image; constant ones are made once for all images.
    assert any_case.graph.macs == pytest.approx(counter.get_total_flops() / 2 / BATCH, abs=len(any_case.graph.calls))


def test_what_is_left_float_has_a_reason(any_case: Case) -> None:
    for call in any_case.graph.calls:
        assert bool(call.sites) == (call.reason is None)
        assert call.reason is None or call.reason in REASONS
        assert len(call.sites) == len(call.operands)


# -- nothing is disturbed --------------------------------------------------------------------------------


def test_switched_off_quantizers_leave_the_output_as_it_was(any_case: Case) -> None:
    qmodel = any_case.quantized(16)
    qmodel.set_state("off")
    for exact, out in zip(any_case.float_out, any_case.run(qmodel), strict=True):
        if any_case.family.decomposed:
            torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(out, exact)


def test_sixteen_bits_everywhere_give_60_db(any_case: Case) -> None:
    out = any_case.run(any_case.quantized(16))
    assert min(map(_sqnr, any_case.float_out, out)) > 60


def test_sixteen_bits_hold_on_other_images_and_batch_sizes(case: Case) -> None:
    images = case.batch.flip(0)[[0, 1, 0]]
    exact = case.run(case.model, images)
    assert min(map(_sqnr, exact, case.run(case.quantized(16), images))) > 60


def test_every_site_is_live(any_case: Case) -> None:
    """One site alone, with a scale that does not fit, changes the output."""
    qmodel = any_case.quantized(8)
    qmodel.set_state("off")
    before = any_case.run(qmodel)
    for site in qmodel.sites():
        scale = qmodel.quantizers[site].get_buffer("scale")  # type: ignore[attr-defined]
        kept = scale.clone()
        scale.mul_(1.5)
        qmodel.set_state("on", [site])
        after = any_case.run(qmodel)
        qmodel.set_state("off", [site])
        scale.copy_(kept)
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), site.id


# -- identity --------------------------------------------------------------------------------------------


def test_sites_and_fingerprint_survive_retracing(any_case: Case) -> None:
    family, graph = any_case.family, any_case.graph
    one = trace(any_case.model, family.batch(1), family.forward_fn)
    again = family.make().eval()
    again.load_state_dict(any_case.model.state_dict())
    other = trace(again, family.batch(2 * BATCH), family.forward_fn)
    assert list(one.sites) == list(graph.sites) == list(other.sites)
    assert one.fingerprint() == graph.fingerprint() == other.fingerprint()
    assert one.pairs == graph.pairs
    assert one.blocks == graph.blocks
    # Constants are made once for all images, and every text meets every image.
    if family.inputs is None and all(call.reason != REASON_CONSTANT for call in graph.calls):
        assert one.macs == graph.macs == other.macs


def test_tracing_what_is_quantized_already_is_refused(case: Case) -> None:
    with pytest.raises(TraceError, match="quantized already"):
        trace(case.quantized(16).model, case.batch[:1])
