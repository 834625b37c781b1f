"""Write <recipe>.json for every registered recipe, and print what changed: `make golden`.

A golden file holds, for the seeded ViT at w4a4, each site's format and its scales and zero-points summed up in a
few numbers of six significant digits, and the signal-to-noise ratio of the output. tests/conformance/test_recipes.py
compares. A file that changes needs a line in CHANGELOG.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vitq
from vitq.core.recipe import RECIPES
from vitq.data.zoo import build_zoo, seeded_images
from vitq.quantizers.base import Quantizer
from vitq.quantizers.common import AnyQuantizer

FOLDER = Path(__file__).resolve().parent
MODEL, BITS, CALIBRATION, EVALUATION = "seeded_vit", "w4a4", 8, 8


def golden(name: str) -> dict[str, Any]:
    """What the golden file of a recipe holds."""
    model = build_zoo(MODEL)
    qmodel = vitq.quantize(model, name, BITS, seeded_images(CALIBRATION))
    sites: dict[str, Any] = {}
    for site in qmodel.quantizers:
        quantizer = qmodel.quantizers[site]
        assert isinstance(quantizer, AnyQuantizer)
        groups = quantizer.layout.groups if isinstance(quantizer, Quantizer) else 0  # a dynamic format stores none
        sites[site] = {"format": str(qmodel.formats[site]), "groups": groups}
        sites[site] |= {field: digest(value) for field, value in quantizer.params().items()}
    images = seeded_images(EVALUATION, seed=1)
    with torch.no_grad():
        expected, got = model(images).double(), qmodel(images).double()
    noise = (got - expected).square().sum()
    ratio = float(10 * (expected.square().sum() / noise).log10())
    return {"model": MODEL, "bits": BITS, "sqnr_db": round(ratio, 4), "sites": sites}


def digest(values: Tensor) -> list[float]:
    """Smallest, largest, mean and root mean square, and a mean with weights that tells an order from another."""
    flat = values.detach().double().flatten()
    weights = torch.linspace(0.5, 1.5, flat.numel(), dtype=torch.float64)
    numbers = (flat.min(), flat.max(), flat.mean(), flat.square().mean().sqrt(), (flat * weights).mean())
    return [float(f"{float(number):.6g}") for number in numbers]


def path_of(name: str) -> Path:
    """The golden file of a recipe."""
    return FOLDER / f"{name}.json"


def main() -> None:
    """Write them all."""
    torch.set_num_threads(1)
    for name in RECIPES:
        path = path_of(name)
        old = path.read_text(encoding="utf-8") if path.exists() else None
        new = json.dumps(golden(name), indent=1) + "\n"
        path.write_text(new, encoding="utf-8")
        state = "written" if old is None else "unchanged" if old == new else "changed: say why in CHANGELOG.md"
        print(f"{path.name}: {state}")  # noqa: T201
    for path in sorted(FOLDER.glob("*.json")):
        if path.stem not in RECIPES:
            print(f"{path.name}: no such recipe any more; delete it")  # noqa: T201


if __name__ == "__main__":
    main()
