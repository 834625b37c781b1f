"""The resolved plan: what the user asked for, as data; which format each site of a graph gets, and why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from vitq.core.errors import InputError, SiteNotFoundError
from vitq.core.format import FLOAT_FROM, Bits, Format
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.core.roles import WEIGHT
from vitq.core.site import REASON_EXCLUDED, REASON_RECIPE, Call, Graph, Site


@dataclass(frozen=True)
class Override:
    """A width for some sites: `role=HEAD_IN:w8a8`, `blocks.0.attn.*:a8`, `head:float`.

    The pattern is matched against site ids and owner names (a module name also covers what lies below it).
    The weight width goes to the weights of the calls whose activation sites match.
    """

    pattern: str
    bits: Bits

    @classmethod
    def parse(cls, text: str) -> Override:
        """Read PATTERN:BITS.

        Raises:
            InputError: not of that form.
        """
        pattern, colon, bits = text.rpartition(":")
        if not colon or not pattern:
            raise InputError(f"override {text!r} is not PATTERN:BITS; write for example role=HEAD_IN:w8a8 or head:a8")
        return cls(pattern, Bits.parse(bits, partial=True))

    def __str__(self) -> str:
        return f"{self.pattern}:{self.bits}"


@dataclass(frozen=True)
class Plan:
    """Everything that decides the result beside the data.

    Attributes:
        recipe: the recipe with its modifiers applied.
        bits: as asked for, "w4a4".
        exclude: patterns of sites left in float.
        overrides: widths for some sites.
        scope: module names outside of which nothing is quantized; () for all.
        seed: for whatever draws random numbers.
    """

    recipe: Recipe
    bits: str
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    scope: tuple[str, ...] = ()
    seed: int = 0

    @property
    def passes(self) -> tuple[PassSpec, ...]:
        """The passes, in order."""
        return self.recipe.passes

    def assign(self, graph: Graph) -> Assignment:
        """Choose the format of every site.

        Raises:
            SiteNotFoundError: an exclusion, override or scope matches nothing.
            InputError: nothing is left to quantize, or an override has no width for what it names.
        """
        known = set(graph.sites)
        for pattern in (*self.exclude, *(o.pattern for o in self.overrides)):
            if not any(matches(pattern, s) for s in graph.sites.values()):
                raise _not_found(pattern, graph)
        for override in self.overrides:
            widths = (_override_width(override, graph, c, graph.sites[s]) for c in graph.calls for s in c.sites)
            if all(width is None for width in widths):
                raise InputError(
                    f"override '{override}' changes nothing: {override.pattern!r} names only "
                    f"{'activations whose calls have no weight' if override.bits.act is None else 'weights'}; "
                    f"write for example {override.pattern}:w8a8"
                )
        for module in self.scope:
            if not any(_below(s.owner, module) for s in graph.sites.values()):
                top = dict.fromkeys(s.owner.split(".")[0] or "the model itself" for s in graph.sites.values())
                raise SiteNotFoundError(
                    f"scope {module!r} holds no matrix product; those at the top that do: {', '.join(top)}. Names are "
                    f"those of model.named_modules(), and `vitq inspect` shows what they hold"
                )
        formats: dict[str, Format] = {}
        reasons: dict[str, str] = {}
        for call in graph.calls:
            for site_id in call.sites:
                if site_id not in known or site_id in formats or site_id in reasons:
                    continue
                self._assign_one(graph, call, graph.sites[site_id], formats, reasons)
        if not formats:
            raise InputError(
                "nothing to quantize: every matrix product is excluded, out of scope or left in float by the recipe"
                if graph.sites
                else "nothing to quantize: the model computes no matrix product from its input"
            )
        return Assignment(formats, reasons)

    def _assign_one(
        self, graph: Graph, call: Call, site: Site, formats: dict[str, Format], reasons: dict[str, str]
    ) -> None:
        out_of_scope = bool(self.scope) and not any(_below(site.owner, m) for m in self.scope)
        if out_of_scope or any(matches(pattern, site) for pattern in self.exclude):
            reasons[site.id] = REASON_EXCLUDED
            return
        fmt = self.recipe.format_for(site)
        for override in self.overrides:
            width = _override_width(override, graph, call, site)
            if width is None:
                continue
            if width >= FLOAT_FROM:
                fmt = None
            else:
                fmt = Format("uniform", width) if fmt is None else fmt.with_bits(width)
        if fmt is None:
            reasons[site.id] = REASON_RECIPE
        else:
            formats[site.id] = fmt

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back."""
        return {
            "recipe": self.recipe.to_json(),
            "bits": self.bits,
            "exclude": list(self.exclude),
            "overrides": [str(o) for o in self.overrides],
            "scope": list(self.scope),
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_json`."""
        return cls(
            recipe=Recipe.from_json(data["recipe"]),
            bits=data["bits"],
            exclude=tuple(data["exclude"]),
            overrides=tuple(Override.parse(o) for o in data["overrides"]),
            scope=tuple(data["scope"]),
            seed=int(data["seed"]),
        )


@dataclass(frozen=True)
class Assignment:
    """Site id -> format, and site id -> why it is left in float."""

    formats: dict[str, Format]
    reasons: dict[str, str] = field(default_factory=dict)


def matches(pattern: str, site: Site) -> bool:
    """Whether a pattern names a site: `role=NAME` (glob), a glob on its id, or a module at or above its owner."""
    if pattern.startswith("role="):
        return fnmatchcase(site.role, pattern.removeprefix("role="))
    owners = site.owner.split(".")
    prefixes = (".".join(owners[:n]) for n in range(1, len(owners) + 1))
    return fnmatchcase(site.id, pattern) or any(fnmatchcase(p, pattern) for p in prefixes)


def parse_overrides(texts: Sequence[str | Override]) -> tuple[Override, ...]:
    """Read overrides that are not yet."""
    return tuple(t if isinstance(t, Override) else Override.parse(t) for t in texts)


def _override_width(override: Override, graph: Graph, call: Call, site: Site) -> int | None:
    if site.role != WEIGHT:
        return override.bits.act if matches(override.pattern, site) else None
    operands = (graph.sites[s] for s in call.sites)
    return override.bits.weight if any(matches(override.pattern, s) for s in operands) else None


def _below(owner: str, module: str) -> bool:
    return owner == module or owner.startswith(f"{module}.")


def _not_found(pattern: str, graph: Graph) -> SiteNotFoundError:
    roles = sorted({s.role for s in graph.sites.values()})
    owners = list(dict.fromkeys(s.owner for s in graph.sites.values()))
    hint = (
        f"roles here: {', '.join(roles)}"
        if pattern.startswith("role=")
        else f"modules with sites: {', '.join(owners[:6])} …"
    )
    return SiteNotFoundError(f"{pattern!r} matches no site of this model; {hint}. `vitq inspect` lists them all.")


__all__ = ["Assignment", "Override", "Plan", "Rule", "matches", "parse_overrides"]
