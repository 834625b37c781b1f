"""What a measured number depends on, as digests: a number is measured again when one of them has changed."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from vitq.core.digest import of_tensors
from vitq.core.recipe import MODIFIERS, RECIPES, RecipeFn
from vitq.data.images import ImageSet

LENGTH = 12  # hex digits that are kept
PACKAGE = Path(__file__).resolve().parents[1]
APART = ("cli", "report", "export", "runtime", "bench", "recipes")  # folders that other recipes' numbers do not need


def weights_digest(model: nn.Module, source: Mapping[str, Any]) -> str:
    """Of all parameters and buffers, and of the file whose code built the model, if it was one."""
    return of_tensors(model.state_dict().items(), str(source.get("sha256", "")))[:LENGTH]


def images_digest(images: ImageSet, digests: Iterable[str], preprocess: Mapping[str, Any]) -> str:
    """Of images in their order, by their own digests, their labels and how they are prepared.

    Args:
        digests: what `images.digests()` gave: reading every file once is enough.
    """
    labels = None if images.labels is None else images.labels.tolist()
    return data_digest([list(digests), labels, preprocess])


def data_digest(data: object) -> str:
    """Of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:LENGTH]


def code_digest(recipe: str | RecipeFn = "") -> str:
    """Of the sources that a number comes from: the package, and of the recipes those that are named.

    Recipes do not import one another, so that adding one changes no other's digest.

    Args:
        recipe: `name+modifier+…`, or a function. Names that are not registered are passed over.
    """
    parts: list[Any] = [recipe]
    if isinstance(recipe, str):
        names = [part.strip() for part in recipe.split("+")]
        parts = [registry[name] for name in names for registry in (RECIPES, MODIFIERS) if name in registry]
    files = [inspect.getsourcefile(inspect.unwrap(part)) for part in parts]
    sources = [Path(file).read_bytes() for file in files if file is not None]
    return hashlib.sha256(b"".join([_library(), *sources])).hexdigest()[:LENGTH]


@cache
def _library() -> bytes:
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        part = file.relative_to(PACKAGE)
        if part.parts[0] not in APART:
            digest.update(part.as_posix().encode() + file.read_bytes())
    return digest.digest()
