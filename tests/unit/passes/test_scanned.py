"""Formats with much to choose besides a range: what is looked at first loses little against trying everything."""

from __future__ import annotations

import pytest
import torch

import vitq
from vitq.core import roles
from vitq.core.format import Format
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.data.zoo import build_zoo, seeded_images
from vitq.passes import fit_products
from vitq.quantizers.adaptive_log import AdaptiveLogQuantizer


def error_left(bits: int) -> float:
    """Share of the products' error that is left, logarithms behind softmax and GELU."""
    formats = (
        Rule(Format("adaptive_log", bits), roles=(roles.SOFTMAX_OUT,)),
        Rule(Format.of("adaptive_log", bits, shifted=True), roles=(roles.FC2_IN,)),
        Rule(Format("uniform", bits), roles=(roles.VALUE,)),
    )
    search = PassSpec.of("fit_products", weights=False, rounds=1, steps=6, rows=64, entries=4, per_entry=8)
    recipe = Recipe("logarithms", "none", formats, (PassSpec.of("fit"), search))
    qmodel = vitq.quantize(build_zoo("seeded_vit"), recipe, f"w16a{bits}", seeded_images(8))
    return float(qmodel.log["fit_products"]["error_of_before"])


@pytest.mark.parametrize("bits", [3, 4])
def test_scanned_bases_are_nearly_as_good_as_all(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = error_left(bits)
    monkeypatch.setattr(fit_products, "SCANNED", 2**30)
    everything = error_left(bits)
    monkeypatch.setattr(AdaptiveLogQuantizer, "variants", lambda self, params: params)
    without = error_left(bits)
    assert everything < without
    assert scanned - everything < 0.1 * (without - everything)


def test_what_is_not_among_the_candidates_is_next_to_the_closest() -> None:
    quantizer = AdaptiveLogQuantizer(4)
    one = {"scale": torch.tensor([[0.5]]), "q": torch.tensor([[40.3]])}
    every = quantizer.variants(one)
    found = fit_products._nearest(every, one)
    assert float(every["q"].gather(0, found)) == 40
