"""Papers' numbers: they parse, belong to a method, and are those of the digest they were taken from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vitq.core.format import Bits
from vitq.core.recipe import MODIFIERS, RECIPES
from vitq.report.published import KINDS, OFFICIAL, PAPER, TRAININGS, beside, of_method, published, told

DEIT_TINY = "deit_tiny_patch16_224"
# Methods that need not be among our recipes; a method that is neither here nor one of them is a slip.
FOREIGN = {
    "ADFQ-ViT", "AIQViT", "APHQ-ViT", "APQ-ViT", "AdaLog", "BasePTQ", "ERQ", "EasyQuant", "FIMA-Q", "FQ-ViT", "GLF-Q",
    "I&S-ViT", "IGQ-ViT", "LS-ViT", "Liu et al.", "NoisyQuant", "OASQ", "PD-Quant", "PTQ4ViT", "QDrop", "UQ-ViT",
}  # fmt: skip


def test_every_row_can_be_read() -> None:
    assert published()
    for row in published():
        assert str(Bits.parse(row.bits)) == row.bits
        assert 0 < row.top1 < 100
        assert 70 < row.top1_float < 90
        assert row.recovery < 1.01, row
        assert row.kind in KINDS
        assert row.training in TRAININGS
        assert row.source
        assert re.fullmatch(r"(arXiv \d{4}\.\d{5}|[A-Z]+ 20\d\d|)", row.paper)
        assert re.fullmatch(r"(vit|deit|swin)_(tiny|small|base)_patch(16|4_window7)_224", row.model)


def test_no_number_is_there_twice() -> None:
    rows = published()
    assert len(set(rows)) == len(rows)
    places = [(r.method, r.model, r.bits, r.training, r.kind, r.source, r.note) for r in rows]
    assert len(set(places)) == len(places), "two numbers of one method from one source"


def test_every_method_is_one_of_our_recipes_or_known_not_to_be() -> None:
    ours = {row.method for name in (*RECIPES, *MODIFIERS) for row in of_method(name)}
    assert {row.method for row in published()} <= ours | FOREIGN
    assert {"RepQ-ViT", "DopQ-ViT"} <= ours


def test_a_recipe_finds_its_paper_by_id() -> None:
    found = beside("repq_vit", DEIT_TINY, "w4a4")
    assert {row.method for row in found} == {"RepQ-ViT"}
    assert told(found, PAPER) == "57.43 (0.795)"
    assert told(found, OFFICIAL) == "64.40 (0.809)"
    assert beside("repq_vit", f"{DEIT_TINY}.fb_in1k", "w4a4") == found
    assert told(beside("dopq_vit", DEIT_TINY, "w4a4"), PAPER).endswith("retrained")


@pytest.mark.parametrize(
    ("recipe", "model", "bits"),
    [("repq_vit+gptq", DEIT_TINY, "w4a4"), ("repq_vit", "zoo:fashion_vit", "w4a4"), ("minmax", DEIT_TINY, "w4a4")],
)
def test_what_no_paper_measured_has_no_number(recipe: str, model: str, bits: str) -> None:
    assert beside(recipe, model, bits) == []


def test_a_recipe_finds_its_paper_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every paper has an arXiv id."""
    monkeypatch.setitem(RECIPES._items, "uq_vit", RECIPES["minmax"])
    assert {row.method for row in of_method("uq_vit")} == {"UQ-ViT"}


@pytest.mark.real
def test_the_numbers_are_those_of_the_digest(shared: Path) -> None:
    text = "".join((shared / "reference" / f"methods-{n}.md").read_text(encoding="utf-8") for n in (1, 2))
    known = {float(number) for number in re.findall(r"\d+\.\d+", text)}
    rows = [row for row in published() if row.kind != OFFICIAL]
    assert [row for row in rows if row.top1 not in known or row.top1_float not in known] == []
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    for row in rows:
        own = [line for line in lines if row.method.split()[0] in line.split("|")[1]]
        assert any(re.search(rf"(?<![\d.]){row.top1:g}0?(?!\d)", line) for line in own), row
