"""Write <recipe>.json for every registered recipe, and print what changed: `make golden`.

A golden file holds, for the seeded ViT at w4a4, each site's format and its scales and zero-points summed up in a
few numbers of six significant digits, and the signal-to-noise ratio of the output. tests/conformance/test_recipes.py
compares. A search whose best candidates are nearly equal chooses another one where a matrix product is rounded
otherwise, as on another processor. So the file also holds how far its numbers may be off: a few times what noise of
that size in the images made of them. A file that changes needs a line in CHANGELOG.md.
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
NOISE, DRAWS = 3e-7, 3  # relative, a few roundings of float32
LEAST, TIMES = 1e-4, 2.0  # of what may be off: where no choice depends on noise, and in parts of what noise does


def images_of(draw: int = 0) -> Tensor:
    """The calibration images; from 1 on with noise."""
    images = seeded_images(CALIBRATION)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(draw))
    return images * (1 + NOISE * noise) if draw else images


def golden(name: str, draw: int = 0) -> dict[str, Any]:
    """What the golden file of a recipe holds, but for what may be off."""
    model = build_zoo(MODEL)
    qmodel = vitq.quantize(model, name, BITS, images_of(draw))
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


def tolerance(name: str, exact: dict[str, Any]) -> dict[str, float]:
    """How far another machine may be off: the ratio in dB, parameters relatively."""
    decibels, params = [0.0], [0.0]
    for draw in range(1, DRAWS + 1):
        noisy = golden(name, draw)
        decibels.append(abs(noisy["sqnr_db"] - exact["sqnr_db"]))
        for site, fields in exact["sites"].items():
            for field, values in fields.items():
                if isinstance(values, list):
                    pairs = zip(values, noisy["sites"][site][field], strict=True)
                    params += [abs(b - a) / abs(a) if a else float(b != 0) for a, b in pairs]
    told = {"sqnr_db": max(LEAST * exact["sqnr_db"], TIMES * max(decibels)), "params": max(LEAST, TIMES * max(params))}
    return {key: float(f"{value:.2g}") for key, value in told.items()}


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
        found = golden(name)
        new = json.dumps({"tolerance": tolerance(name, found)} | found, indent=1) + "\n"
        path.write_text(new, encoding="utf-8")
        state = "written" if old is None else "unchanged" if old == new else "changed: say why in CHANGELOG.md"
        print(f"{path.name}: {state}")  # noqa: T201
    for path in sorted(FOLDER.glob("*.json")):
        if path.stem not in RECIPES:
            print(f"{path.name}: no such recipe any more; delete it")  # noqa: T201


if __name__ == "__main__":
    main()
