"""Recipes, passes and modifiers as data, and how they compose.

A recipe is formats + passes. A modifier fills one slot of the order `SLOTS` and is written after a plus:
`repq_vit+gptq+qwt`. Passes of modifiers run in slot order whatever the order written; two owners of one slot
are an error (docs/decisions/recipe_composition.md).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vitq.core.errors import CompositionError, InputError
from vitq.core.format import FLOAT_FROM, Bits, Format, Scalar
from vitq.core.progress import Progress
from vitq.core.registry import Registry
from vitq.core.roles import ACTIVATIONS, WEIGHT
from vitq.core.site import Site

if TYPE_CHECKING:
    from vitq.core.batches import Batches
    from vitq.core.qmodel import QuantModel

SLOTS = ("rewrite", "formats", "fit", "round", "compensate", "tune", "finish")
SHARED_SLOTS = ("rewrite", "fit", "finish")  # several passes of one recipe may own these; a modifier may add to them
WEIGHT_SCALES = "weight scales"
ACT_SCALES = "activation scales"


@dataclass(frozen=True)
class Rule:
    """Which sites get a format. Of several rules that match a site the last one wins.

    Attributes:
        format: None leaves the sites in float.
        roles: of these roles; () for every role.
        producer: only where this activation function made the tensor.
        after_norm: only where a LayerNorm made the tensor and channel scales can be folded into it.
        axis: only where the tensor has this axis: fused attention of torch knows no heads.
    """

    format: Format | None
    roles: tuple[str, ...] = ()
    producer: str | None = None
    after_norm: bool = False
    axis: str | None = None

    def matches(self, site: Site) -> bool:
        """Whether the rule speaks about a site."""
        if (self.after_norm and site.norm is None) or (self.axis is not None and self.axis not in site.axes):
            return False
        return (not self.roles or site.role in self.roles) and self.producer in (None, site.producer)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "format": self.format.to_json() if self.format else None,
            "roles": list(self.roles),
            "producer": self.producer,
            "after_norm": self.after_norm,
            "axis": self.axis,
        }


@dataclass(frozen=True)
class PassSpec:
    """A pass by name, with its options."""

    name: str
    options: tuple[tuple[str, Scalar | None], ...] = ()

    @classmethod
    def of(cls, name: str, **options: Scalar | None) -> PassSpec:
        """Build a spec with its options written as keywords."""
        return cls(name, tuple(sorted(options.items())))

    def build(self) -> Pass:
        """The pass itself.

        Raises:
            UnknownNameError: no such pass.
            InputError: an option that it does not have.
        """
        cls = PASSES[self.name]
        try:
            inspect.signature(cls).bind(**dict(self.options))
        except TypeError as error:
            raise InputError(f"pass {self.name!r}: {error}; it takes {inspect.signature(cls)}") from None
        return cls(**dict(self.options))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options)})"


@dataclass(frozen=True)
class Recipe:
    """A paper as data.

    Attributes:
        name: registered name; with modifiers `name+modifier`.
        paper: where it is published.
        formats: rules, of which the last matching one wins.
        passes: in the paper's order.
        note: what differs from the paper, or "reconstruction" where formulas are not public.
    """

    name: str
    paper: str
    formats: tuple[Rule, ...]
    passes: tuple[PassSpec, ...]
    note: str = ""

    def format_for(self, site: Site) -> Format | None:
        """Format of a site, None for float."""
        matching = [rule.format for rule in self.formats if rule.matches(site)]
        return matching[-1] if matching else None

    def misses_norm(self, site: Site) -> bool:
        """Whether a rule would match this site if there were a LayerNorm before it to fold channel scales into."""
        return site.norm is None and any(
            rule.after_norm and replace(rule, after_norm=False).matches(site) for rule in self.formats
        )

    def without_float_sides(self, bits: Bits) -> Recipe:
        """The same recipe with weights, or activations, left in float where their width says so."""
        rules = self.formats
        if bits.weight is not None and bits.weight >= FLOAT_FROM:
            rules += (Rule(None, (WEIGHT,)),)
        if bits.act is not None and bits.act >= FLOAT_FROM:
            rules += (Rule(None, ACTIVATIONS),)
        return replace(self, formats=rules)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back."""
        return {
            "name": self.name,
            "paper": self.paper,
            "formats": [rule.to_json() for rule in self.formats],
            "passes": [{"name": p.name, "options": dict(p.options)} for p in self.passes],
            "note": self.note,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_json`."""
        rules = tuple(
            Rule(
                Format.from_json(r["format"]) if r["format"] else None,
                tuple(r["roles"]),
                r["producer"],
                r["after_norm"],
                r.get("axis"),  # artifacts of before have none
            )
            for r in data["formats"]
        )
        passes = tuple(PassSpec.of(p["name"], **p["options"]) for p in data["passes"])
        return cls(data["name"], data["paper"], rules, passes, data["note"])


class Pass(ABC):
    """One step over the whole model.

    Attributes:
        name: registered name.
        slot: its place in `SLOTS`.
        needs, gives, drops: facts about the model that must hold before, hold after, or cease to hold.
        keeps_float_output: with quantizers off, the model computes the same as before.
        cost: what it costs, in words, as every pass must say.
    """

    name: str
    slot: str
    needs: frozenset[str] = frozenset()
    gives: frozenset[str] = frozenset()
    drops: frozenset[str] = frozenset()
    keeps_float_output: bool = True
    cost: str = ""

    def check(self, qmodel: QuantModel, data: Batches | None) -> None:
        """Refuse what this pass cannot work with. All passes are asked before the first one runs.

        Raises:
            DataError: no calibration images, or too few.
            CompositionError: a model that lacks what the pass is about.
        """
        return

    @abstractmethod
    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Do the step, in place."""


@dataclass(frozen=True)
class Modifier:
    """An addition to any recipe.

    Attributes:
        slot: the one slot it fills.
        passes: what it runs there.
        formats: rules appended to the recipe's.
    """

    name: str
    paper: str
    slot: str
    passes: tuple[PassSpec, ...] = ()
    formats: tuple[Rule, ...] = ()


RecipeFn = Callable[..., Recipe]
ModifierFn = Callable[..., Modifier]
RECIPES: Registry[RecipeFn] = Registry("recipe", "vitq.recipes")
MODIFIERS: Registry[ModifierFn] = Registry("modifier", "vitq.recipes")
PASSES: Registry[Callable[..., Pass]] = Registry("pass", "vitq.passes")


def recipe(fn: RecipeFn) -> RecipeFn:
    """Register a function (weight_bits, act_bits, **options) -> Recipe under its own name."""
    return RECIPES.register(fn.__name__)(fn)


def modifier(fn: ModifierFn) -> ModifierFn:
    """Register a function (weight_bits, act_bits, **options) -> Modifier under its own name."""
    return MODIFIERS.register(fn.__name__)(fn)


def resolve_recipe(spec: str | Recipe | RecipeFn, bits: Bits, options: Mapping[str, Scalar] | None = None) -> Recipe:
    """Build a recipe from `name+modifier+…`, a recipe function or a recipe, and check its order.

    Args:
        spec: what to build.
        bits: both widths; 16 means float, and drops the rules of that side.
        options: keyword arguments of the recipe function, such as `parity=True`.

    Raises:
        UnknownNameError: no such recipe or modifier.
        InputError: an option that the recipe does not have.
        CompositionError: slots with two owners, or passes in an impossible order.
    """
    extras: list[str] = []
    if isinstance(spec, Recipe):
        if options:
            raise InputError("recipe options can only be given with a recipe's name or function")
        built = spec
    elif callable(spec):
        built = _call(spec, bits, options)
    else:
        name, *extras = [part.strip() for part in spec.split("+")]
        if name in MODIFIERS:
            raise CompositionError(f"{name!r} is a modifier; write a recipe first, for example 'minmax+{name}'")
        built = _call(RECIPES[name], bits, options)
    for extra in extras:
        if extra in RECIPES:
            raise CompositionError(f"{extra!r} is a recipe, not a modifier; one quantization has one recipe")
    modifiers = [MODIFIERS[extra](*_widths(bits)) for extra in extras]
    built = compose(built, modifiers)
    if not isinstance(spec, Recipe):
        weights_float = bits.weight is not None and bits.weight >= FLOAT_FROM
        if weights_float and any(m.slot == "round" for m in modifiers):
            raise CompositionError(f"{built.name!r} rounds weights, and {bits} leaves them in float")
        built = built.without_float_sides(bits)
    check_order(built)
    return built


def _call(fn: RecipeFn, bits: Bits, options: Mapping[str, Scalar] | None) -> Recipe:
    try:
        inspect.signature(fn).bind(bits.weight, bits.act, **(options or {}))
    except TypeError as error:
        name = getattr(fn, "__name__", str(fn))
        raise InputError(f"recipe {name!r}: {error}; it is {name}{inspect.signature(fn)}") from None
    built = fn(*_widths(bits), **(options or {}))
    if not isinstance(built, Recipe):
        raise InputError(f"{getattr(fn, '__name__', fn)} returned {type(built).__name__}, not a Recipe")
    return built


def _widths(bits: Bits) -> tuple[int, int]:
    # A side in float has no formats; recipes are built at a width that exists, and the rules are overruled.
    weight, act = (8 if width is None or width > 8 else width for width in (bits.weight, bits.act))
    return weight, act


def compose(base: Recipe, modifiers: Sequence[Modifier]) -> Recipe:
    """Put modifiers into a recipe, in slot order.

    Raises:
        CompositionError: a modifier that does nothing, comes twice, or whose slot has an owner already.
    """
    names = [m.name for m in modifiers]
    for m in modifiers:
        if m.slot not in SLOTS:
            raise CompositionError(f"modifier {m.name!r} names slot {m.slot!r}; slots are {', '.join(SLOTS)}")
        if not m.passes and not m.formats:
            raise CompositionError(f"modifier {m.name!r} would do nothing to {base.name!r}")
        if names.count(m.name) > 1:
            raise CompositionError(f"modifier {m.name!r} is written twice")
    owners: dict[str, list[str]] = {}
    for spec in base.passes:
        owners.setdefault(spec.build().slot, []).append(base.name)
    result = base
    for m in sorted(modifiers, key=lambda m: SLOTS.index(m.slot)):
        taken = owners.get(m.slot, [])
        if taken and m.slot not in SHARED_SLOTS:
            raise CompositionError(
                f"slot {m.slot!r} of {base.name!r} is already filled by {taken[0]!r}; leave out {m.name!r}"
            )
        owners.setdefault(m.slot, []).append(m.name)
        result = replace(result, formats=result.formats + m.formats, passes=_placed(result.passes, m))
    suffix = "".join(f"+{m.name}" for m in sorted(modifiers, key=lambda m: SLOTS.index(m.slot)))
    return replace(result, name=base.name + suffix)


def _placed(passes: tuple[PassSpec, ...], m: Modifier) -> tuple[PassSpec, ...]:
    """Behind the last pass of its own or a lower slot; a rewrite comes before everything that is no rewrite."""
    mine = SLOTS.index(m.slot)
    ranks = [SLOTS.index(spec.build().slot) for spec in passes]
    at = max((i + 1 for i, rank in enumerate(ranks) if rank <= mine), default=0)
    return passes[:at] + m.passes + passes[at:]


def check_order(recipe: Recipe) -> None:
    """Check that every pass finds what it needs, and that the last one leaves every scale chosen.

    Raises:
        CompositionError: says which pass lacks what, and which pass could give it.
    """
    facts: set[str] = set()
    for spec in recipe.passes:
        step = spec.build()
        missing = step.needs - facts
        if missing:
            built = [(p.name, p.build()) for p in recipe.passes]
            later = [name for name, other in built if other.gives & missing and not other.needs & missing]
            advice = f"move {later[0]!r} before it" if later else f"add a pass that gives {', '.join(sorted(missing))}"
            raise CompositionError(
                f"recipe {recipe.name!r}: pass {spec.name!r} needs {', '.join(sorted(missing))}, which no earlier "
                f"pass gives; {advice}"
            )
        facts = (facts - step.drops) | step.gives
    unfitted = {WEIGHT_SCALES, ACT_SCALES} - facts
    if unfitted:
        raise CompositionError(
            f"recipe {recipe.name!r} leaves {' and '.join(sorted(unfitted))} unfitted; end with PassSpec.of('fit')"
        )
