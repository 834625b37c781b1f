"""The rows of a leaderboard as they are asked for on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vitq.cli.recipes import recipe_of
from vitq.core.errors import CompositionError, InputError
from vitq.core.format import Bits, Scalar
from vitq.core.recipe import MODIFIERS, RECIPES
from vitq.evaluate.leaderboard import Entry
from vitq.pipeline import resolve

ALL = "all"


def listed(text: str, what: str) -> list[str]:
    """The parts between commas, each once.

    Raises:
        InputError: there is none, or an empty one.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(f"{what} {text!r}: names are separated by single commas, as in {what} a,b")
    return list(dict.fromkeys(parts))


def seeds_of(text: str) -> list[int]:
    """Seeds between commas.

    Raises:
        InputError: something that is no seed.
    """
    parts = listed(text, "--seeds")
    if wrong := [part for part in parts if not part.isascii() or not part.isdigit()]:
        raise InputError(f"--seeds {text!r}: {wrong[0]!r} is not a seed; write for example 0,1,2")
    return list(dict.fromkeys(int(part) for part in parts))


def bits_of(text: str) -> list[str]:
    """Widths between commas, in their usual spelling.

    Raises:
        InputError: something that is no width.
    """
    return list(dict.fromkeys(str(Bits.parse(part)) for part in listed(text, "--bits")))


def specs_of(recipes: str, modifiers: str | None) -> tuple[list[str], list[str]]:
    """Recipes as they are written, and the same with each of the modifiers behind them."""
    written = [each for part in listed(recipes, "--recipes") for each in (RECIPES if part == ALL else [part])]
    parts = listed(modifiers, "--modifiers") if modifiers else []
    extras = [each.lstrip("+") for part in parts for each in (MODIFIERS if part == ALL else [part])]
    plain = list(dict.fromkeys(written))
    return plain, [f"{recipe}+{extra}" for recipe in plain for extra in extras]


def grid(
    recipes: str, modifiers: str | None, bits: str, seeds: str, options: Mapping[str, Scalar]
) -> tuple[list[Entry], list[str]]:
    """Every row asked for: all recipes and widths with the first seed, then with the next one.

    Returns:
        (entries, notes): the notes say where a modifier does not fit a recipe, and is therefore left out.

    Raises:
        InputError: names, options, bits or seeds that cannot be used.
        CompositionError: a recipe written out with modifiers that do not fit it.
    """
    chosen, widths = seeds_of(seeds), bits_of(bits)
    plain, combined = specs_of(recipes, modifiers)
    found: dict[tuple[str, str], Entry] = {}
    notes: list[str] = []
    for width in widths:
        for spec in (*plain, *combined):
            recipe = recipe_of(spec, options)
            try:
                plan = resolve(recipe, width, options=options)
            except CompositionError as error:
                if spec in plain:
                    raise
                notes.append(f"{spec} {width} is left out: {error}")
                continue
            name = plan.recipe.name if isinstance(recipe, str) else spec
            found.setdefault((name, width), Entry(name, recipe, tuple(options.items()), width, chosen[0]))
    return [replace(entry, seed=seed) for seed in chosen for entry in found.values()], notes
