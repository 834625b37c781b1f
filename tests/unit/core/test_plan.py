"""Which format each site gets, and why it gets none."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vitq.core import roles
from vitq.core.errors import InputError, SiteNotFoundError
from vitq.core.format import Bits, Format
from vitq.core.plan import Assignment, Override, Plan, matches, parse_overrides
from vitq.core.recipe import RECIPES, Recipe, Rule, resolve_recipe
from vitq.core.site import REASON_EXCLUDED, REASON_RECIPE, Call, Graph, Site


def site(owner: str, op: str, operand: str, role: str, **more: str) -> Site:
    return Site(f"{owner}:{op}0.{operand}", owner, op, 0, operand, role, ("token", "channel"), (4, 4), **more)  # type: ignore[arg-type]


SITES = [
    site("blocks.0.attn.qkv", "linear", "input", roles.QKV_IN, norm="blocks.0.norm1"),
    site("blocks.0.attn.qkv", "linear", "weight", roles.WEIGHT, param="blocks.0.attn.qkv.weight"),
    site("blocks.0.attn", "matmul", "lhs", roles.SOFTMAX_OUT),
    site("blocks.0.attn", "matmul", "rhs", roles.VALUE),
    site("blocks.0.mlp.fc2", "linear", "input", roles.FC2_IN, producer="gelu"),
    site("blocks.0.mlp.fc2", "linear", "weight", roles.WEIGHT, param="blocks.0.mlp.fc2.weight"),
    site("head", "linear", "input", roles.HEAD_IN),
    site("head", "linear", "weight", roles.WEIGHT, param="head.weight"),
]
CALLS = tuple(
    Call(call, *(lambda s: (s.owner, s.op, s.ordinal))(next(s for s in SITES if s.call == call)), 1,
         tuple(s.id for s in SITES if s.call == call))
    for call in dict.fromkeys(s.call for s in SITES)
)  # fmt: skip
GRAPH = Graph({s.id: s for s in SITES}, CALLS)
QKV, QKV_W, SOFTMAX, VALUE, FC2, FC2_W, HEAD, HEAD_W = (s.id for s in SITES)
ACT, WEIGHT = Format("uniform", 4), Format("uniform", 4, "channel")
RECIPE = Recipe("r", "arXiv", (Rule(ACT), Rule(WEIGHT, (roles.WEIGHT,))), ())


def assign(
    *rules: Rule, exclude: tuple[str, ...] = (), overrides: tuple[str, ...] = (), scope: tuple[str, ...] = ()
) -> Assignment:
    made = replace(RECIPE, formats=RECIPE.formats + rules)
    return Plan(made, "w4a4", exclude, parse_overrides(overrides), scope).assign(GRAPH)


def widths(assignment: Assignment) -> dict[str, int]:
    return {name: fmt.bits for name, fmt in assignment.formats.items()}


def test_the_last_rule_that_matches_wins() -> None:
    first, second = Format("log2", 4), Format("logsqrt2", 3)
    given = assign(Rule(first, (roles.SOFTMAX_OUT, roles.VALUE)), Rule(second, (roles.SOFTMAX_OUT,)))
    assert given.formats[SOFTMAX] == second
    assert given.formats[VALUE] == first
    assert given.formats[QKV] == ACT
    assert given.formats[QKV_W] == WEIGHT
    assert assign(Rule(second, (roles.SOFTMAX_OUT,)), Rule(ACT)).formats[SOFTMAX] == ACT


def test_rules_select_by_producer_and_by_foldable_norm() -> None:
    wide = Format("uniform", 8)
    assert [n for n, f in assign(Rule(wide, producer="gelu")).formats.items() if f == wide] == [FC2]
    assert wide not in assign(Rule(wide, producer="relu")).formats.values()
    assert [n for n, f in assign(Rule(wide, after_norm=True)).formats.items() if f == wide] == [QKV]
    assert wide not in assign(Rule(wide, (roles.HEAD_IN,), after_norm=True)).formats.values()


def test_a_rule_without_format_leaves_float_and_says_that_it_was_the_recipe() -> None:
    given = assign(Rule(None, (roles.SOFTMAX_OUT,)))
    assert given.reasons == {SOFTMAX: REASON_RECIPE}
    assert SOFTMAX not in given.formats
    assert set(given.formats) | set(given.reasons) == set(GRAPH.sites)


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [
        ("head", {HEAD, HEAD_W}),
        ("role=HEAD_IN", {HEAD}),
        ("role=FC*_IN", {FC2}),
        ("role=WEIGHT", {QKV_W, FC2_W, HEAD_W}),
        ("blocks.0.attn", {QKV, QKV_W, SOFTMAX, VALUE}),
        ("blocks.*.attn", {QKV, QKV_W, SOFTMAX, VALUE}),
        ("*.weight", {QKV_W, FC2_W, HEAD_W}),
        (SOFTMAX, {SOFTMAX}),
        ("*:matmul0.*", {SOFTMAX, VALUE}),
    ],
)
def test_exclusions_name_modules_sites_or_roles(pattern: str, gone: set[str]) -> None:
    given = assign(exclude=(pattern,))
    assert {name for name, reason in given.reasons.items() if reason == REASON_EXCLUDED} == gone
    assert set(given.formats) == set(GRAPH.sites) - gone


def test_a_module_pattern_does_not_match_names_that_merely_begin_alike() -> None:
    other = site("head_dist", "linear", "input", roles.HEAD_IN)
    assert not matches("head", other)
    assert not matches("role=HEAD", other)
    assert matches("head*", other)


def test_a_weight_width_goes_to_the_weights_of_the_calls_whose_activations_match() -> None:
    given = widths(assign(overrides=("role=HEAD_IN:w8a6",)))
    assert given[HEAD_W] == 8
    assert given[HEAD] == 6
    assert {given[n] for n in given if n not in (HEAD, HEAD_W)} == {4}


def test_a_width_for_one_side_leaves_the_other_alone() -> None:
    assert widths(assign(overrides=("role=FC2_IN:w8",)))[FC2] == 4
    assert widths(assign(overrides=("role=FC2_IN:w8",)))[FC2_W] == 8
    assert widths(assign(overrides=("blocks.0.mlp:a8",)))[FC2] == 8
    assert widths(assign(overrides=("blocks.0.mlp:a8",)))[FC2_W] == 4
    assert widths(assign(overrides=("role=WEIGHT:w6",)))[FC2] == 4
    assert widths(assign(overrides=("role=WEIGHT:w6",)))[FC2_W] == 6


def test_the_last_override_wins_and_keeps_kind_granularity_and_options() -> None:
    rule = Rule(Format.of("logsqrt2", 4, "head", extra_zero_level=True), (roles.SOFTMAX_OUT,))
    given = assign(rule, overrides=("blocks.0.attn:a8", "role=SOFTMAX_OUT:a3"))
    assert given.formats[SOFTMAX] == Format.of("logsqrt2", 3, "head", extra_zero_level=True)
    assert given.formats[VALUE].bits == 8


def test_an_override_can_leave_float_and_can_quantize_what_the_recipe_left_float() -> None:
    given = assign(overrides=("head:float",))
    assert given.reasons == {HEAD: REASON_RECIPE, HEAD_W: REASON_RECIPE}
    given = assign(Rule(None, (roles.VALUE,)), overrides=("role=VALUE:a8",))
    assert given.formats[VALUE] == Format("uniform", 8)


def test_an_exclusion_is_stronger_than_an_override() -> None:
    assert HEAD not in assign(exclude=("head",), overrides=("head:w8a8",)).formats


@pytest.mark.parametrize("pattern", ["haed", "role=HEADIN", "blocks.1", "blocks.0.attn.qkv:linear1.input"])
def test_a_site_that_is_not_found_is_an_error_that_helps(pattern: str) -> None:
    for given in ({"exclude": (pattern,)}, {"overrides": (f"{pattern}:w8a8",)}):
        with pytest.raises(SiteNotFoundError, match="matches no site") as caught:
            assign(**given)
        assert ("HEAD_IN" if "role=" in pattern else "blocks.0.attn") in str(caught.value)


@pytest.mark.parametrize("text", ["role=WEIGHT:a8", "role=SOFTMAX_OUT:w8", "blocks.0.attn:matmul0.*:w8"])
def test_an_override_that_changes_nothing_is_an_error(text: str) -> None:
    """Found by this test: a width for the side that the pattern does not have was dropped in silence."""
    with pytest.raises(InputError, match="changes nothing"):
        assign(overrides=(text,))


def test_scope_leaves_everything_outside_in_float() -> None:
    given = assign(scope=("blocks.0.attn",))
    assert set(given.formats) == {QKV, QKV_W, SOFTMAX, VALUE}
    assert set(given.reasons.values()) == {REASON_EXCLUDED}
    assert set(assign(scope=("blocks.0.mlp", "head")).formats) == {FC2, FC2_W, HEAD, HEAD_W}
    with pytest.raises(SiteNotFoundError, match=r"blocks\.00"):
        assign(scope=("blocks.00",))


def test_nothing_left_to_quantize_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing to quantize: every matrix product is excluded"):
        assign(exclude=("*",))
    with pytest.raises(InputError, match="nothing to quantize: every"):
        assign(overrides=("*:float",))
    with pytest.raises(InputError, match="computes no matrix product"):
        Plan(RECIPE, "w4a4").assign(Graph({}, ()))


@pytest.mark.parametrize("bits", ["w8a8", "w6a6", "w4a4", "w3a3", "w4a16", "w16a8"])
@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe_and_plan_survive_json(name: str, bits: str) -> None:
    built = resolve_recipe(name, Bits.parse(bits))
    assert Recipe.from_json(json.loads(json.dumps(built.to_json()))) == built
    plan = Plan(
        built, bits, ("head", "role=VALUE"), parse_overrides(["role=FC2_IN:w8a8", "head:float"]), ("blocks",), 7
    )
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.passes == built.passes


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_float_side_gets_no_format(name: str) -> None:
    weights = {QKV_W, FC2_W, HEAD_W}
    assert set(Plan(resolve_recipe(name, Bits(4, 16)), "w4a16").assign(GRAPH).formats) == weights
    assert set(Plan(resolve_recipe(name, Bits(16, 8)), "w16a8").assign(GRAPH).formats) == set(GRAPH.sites) - weights
    assert isinstance(Override.parse("head:a8"), Override)
