"""A number is measured again exactly when something that it depends on has changed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from vitq.core.recipe import RECIPES
from vitq.data.images import open_images
from vitq.evaluate import fingerprint
from vitq.evaluate.fingerprint import code_digest, data_digest, images_digest, weights_digest


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_weights_and_buffers_and_the_code_that_built_them_count() -> None:
    before = weights_digest(small(), {})
    assert weights_digest(small(), {"spec": "another name"}) == before
    weight, buffer = small(), small()
    weight[0].weight.data[0, 0] += 1e-7  # type: ignore[index, operator, union-attr]
    buffer[1].running_mean[0] += 1  # type: ignore[index, operator]
    changed = [weights_digest(weight, {}), weights_digest(buffer, {}), weights_digest(small().double(), {})]
    changed.append(weights_digest(small(), {"sha256": "of a file with code"}))
    assert len({before, *changed}) == 5


def test_images_their_order_labels_and_preparation_count() -> None:
    images = open_images("zoo:fashion_test").subset(range(5))
    plain = open_images("zoo:fashion_test", labels="none").subset(range(5))
    other = images.subset([1, 0, 2, 3, 4])
    found = [images_digest(each, each.digests(), {"size": 1}) for each in (images, plain, other)]
    found.append(images_digest(images, images.digests(), {"size": 2}))
    assert len(set(found)) == 4
    assert images_digest(images, images.digests(), {"size": 1}) == found[0]


def test_data_counts_and_the_order_of_its_keys_does_not() -> None:
    assert data_digest({"a": 1, "b": 2}) == data_digest({"b": 2, "a": 1}) != data_digest({"a": 1, "b": 3})


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a pass, a command, and two recipes of its own."""
    for name, text in {
        "passes/fit.py": "a = 1\n",
        "cli/main.py": "a = 1\n",
        "recipes/one.py": "def one(w, a): ...\n",
        "recipes/two.py": "def two(w, a): ...\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(fingerprint, "PACKAGE", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "recipes"))
    for name in ("one", "two"):
        monkeypatch.setitem(RECIPES._items, name, getattr(import_module(name), name))
    yield tmp_path
    fingerprint._library.cache_clear()
    for name in ("one", "two"):
        del sys.modules[name]


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("passes/fit.py", True),
        ("passes/new.py", True),
        ("recipes/one.py", True),
        ("recipes/two.py", False),
        ("recipes/new.py", False),
        ("cli/main.py", False),
    ],
)
def test_code_counts_but_that_of_other_recipes_does_not(house: Path, file: str, changes: bool) -> None:
    fingerprint._library.cache_clear()
    before = code_digest("one")
    assert before != code_digest("two")
    (house / file).write_text("a = 2\n")
    fingerprint._library.cache_clear()
    assert (code_digest("one") != before) is changes


def test_every_part_of_a_recipe_counts(house: Path) -> None:
    fingerprint._library.cache_clear()
    found = {code_digest(spec) for spec in ("", "one", "one+gptq", "one+gptq+qwt")}
    assert len(found) == 4


def test_the_file_of_a_function_counts(tmp_path: Path) -> None:
    from vitq.cli.recipes import recipe_of

    file = tmp_path / "mine.py"
    file.write_text("def mine(w, a): ...\n")
    before = code_digest(recipe_of(f"{file}:mine", {}))
    file.write_text("def mine(w, a): ...  # another\n")
    assert code_digest(recipe_of(f"{file}:mine", {})) != before
