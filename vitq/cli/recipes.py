"""Recipes and their options as they are written on the command line."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from vitq.core.errors import InputError, UnknownNameError, VitqError
from vitq.core.format import Scalar
from vitq.core.plan import Plan
from vitq.core.recipe import RECIPES, Recipe, RecipeFn
from vitq.pipeline import resolve


def recipe_of(spec: str, options: Mapping[str, Scalar]) -> str | RecipeFn:
    """A registered name as it is; FILE.py:FUNCTION as the function. Options must be of their defaults' kind.

    Raises:
        InputError: no such file or function, a file that cannot be run, or an option of another kind.
    """
    found = _from_file(spec)
    name = spec.partition("+")[0].strip()
    if found is None and name not in RECIPES:
        return spec  # whoever looks it up says so
    parameters = inspect.signature(RECIPES[name] if found is None else found).parameters
    for key, value in options.items():
        default = getattr(parameters.get(key), "default", None)
        kinds = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.get(type(default))
        if kinds is not None and (not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)):
            kind = "true or false" if kinds == (bool,) else kinds[-1].__name__
            raise InputError(f"option {key}={value} of recipe {spec!r} must be {kind}; the default is {default}")
    return spec if found is None else found


def parse_options(pairs: Sequence[str]) -> dict[str, Scalar]:
    """KEY=VALUE pairs; numbers, true and false are read as such.

    Raises:
        InputError: not of that form.
    """
    options: dict[str, Scalar] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"option {pair!r} is not KEY=VALUE; write for example parity=true")
        options[key] = _scalar(value)
    return options


@dataclass(frozen=True)
class Asked:
    """How a command was told to quantize.

    Attributes:
        recipe: a name or a function.
        more: the keywords of `quantize` and `resolve` beside the recipe.
        plan: what that comes to.
    """

    recipe: str | RecipeFn
    more: dict[str, Any]
    plan: Plan

    @classmethod
    def of(
        cls,
        recipe: str,
        bits: str,
        options: Sequence[str] | None,
        exclude: Sequence[str] | None,
        overrides: Sequence[str] | None,
        seed: int,
        scope: Sequence[str] | None = None,
    ) -> Asked:
        """From command-line words, refused here if they cannot be."""
        parsed = parse_options(options or ())
        more = {"bits": bits, "exclude": exclude or (), "overrides": overrides or (), "options": parsed, "seed": seed}
        more["scope"] = tuple(scope) if scope else "all"
        found = recipe_of(recipe, parsed)
        return cls(found, more, resolve(found, **more))  # type: ignore[arg-type]


def _scalar(text: str) -> Scalar:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _from_file(spec: str) -> RecipeFn | None:
    if spec.endswith(".py"):
        raise InputError(f"{spec!r} names a file and no function; write {spec}:FUNCTION")
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        return None
    if not Path(path).is_file():
        raise InputError(f"recipe file {path} does not exist")
    module_name = f"_vitq_recipe_{Path(path).stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"recipe file {path} cannot be imported")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses look their module up by name
    try:
        module_spec.loader.exec_module(module)
    except VitqError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"recipe file {path}: {_where(error, path)}; correct the file and try again") from error
    fn: Any = getattr(module, name, None)
    if not callable(fn):
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module_name and callable(v)]
        raise UnknownNameError(f"function in {path}", name, own)

    @wraps(fn)
    def build(*args: Any, **kwargs: Any) -> Recipe:
        try:
            made: Recipe = fn(*args, **kwargs)
        except VitqError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise InputError(f"recipe {spec}: {_where(error, path)}; correct the file and try again") from error
        return made

    return build


def _where(error: Exception, path: str) -> str:
    if isinstance(error, SyntaxError):
        return f"syntax error in line {error.lineno}: {error.msg}"
    step, line = error.__traceback__, None
    while step is not None:
        if step.tb_frame.f_code.co_filename == path:
            line = step.tb_lineno
        step = step.tb_next
    at = "" if line is None else f" in line {line}"
    return f"{type(error).__name__}{at}: {error}"
