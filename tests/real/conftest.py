"""The real model and photos that tests of parts share.

A module says how many photos, CALIBRATION and OTHERS, and with BLOCKS of how many blocks the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.calibrate.capture import switched_off
from vitq.calibrate.linears import linears
from vitq.core.format import Format
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import PassSpec, Recipe, Rule
from vitq.core.site import Site
from vitq.data.images import open_images
from vitq.data.source import LoadedModel, load_model

MODEL = "deit_tiny_patch16_224"


@pytest.fixture(scope="module")
def loaded(shared: Path, request: pytest.FixtureRequest) -> LoadedModel:
    """DeiT-Tiny, one for each module; its first BLOCKS blocks where the module has that number."""
    found = load_model(MODEL, shared / "models" / f"{MODEL}.safetensors")
    blocks: Any = found.model.blocks
    found.model.blocks = nn.Sequential(*list(blocks)[: getattr(request.module, "BLOCKS", None)])
    return found


@pytest.fixture(scope="module")
def photos(shared: Path, loaded: LoadedModel, request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """To calibrate on, and others."""
    sample = shared / "data" / "imagenet_sample"
    wanted = (("calib", request.module.CALIBRATION), ("ablate", request.module.OTHERS))
    calib, others = (
        open_images(sample / split, labels="none").sample(count, seed=0).tensor(loaded.preprocess)
        for split, count in wanted
    )
    return calib, others


@pytest.fixture(scope="session")
def product_errors() -> Callable[..., dict[str, float]]:
    """Error of the products that a role is the left operand of, in parts of the products; all else is float.

    As (loaded, format, role, (calibration, others), options of fit_products) -> by site.
    """
    return _product_errors


@pytest.fixture(scope="session")
def output_errors() -> Callable[[QuantModel, Tensor], dict[str, dict[str, float]]]:
    """Role -> site -> squared error of the output of the linear behind it, on what the float model gives it.

    Rewritten or not, the output is the same function, so errors compare as they are.
    """
    return _output_errors


@pytest.fixture(scope="session")
def made() -> Callable[[QuantModel, Tensor, Sequence[Site], Sequence[Site]], dict[str, Tensor]]:
    """The products that some sites are the left operand of, while only some are quantized: (qmodel, images, of, on)."""
    return _made


def _product_errors(
    loaded: LoadedModel, fmt: Format, role: str, photos: tuple[Tensor, Tensor], **options: Any
) -> dict[str, float]:
    fit = PassSpec.of("fit_products", **({"search": "progressive", "rows": 64, "entries": 8} | options))
    recipe = Recipe("one", "none", (Rule(None), Rule(fmt, (role,))), (PassSpec.of("fit"), fit))
    qmodel = vitq.quantize(loaded.model, recipe, f"w16a{fmt.bits}", photos[0], freeze=False)
    sites = qmodel.sites()
    expected, got = _made(qmodel, photos[1], sites, []), {}
    for site in sites:  # only its own operand is quantized: the others come from the float model
        got |= _made(qmodel, photos[1], [site], [site])
    return {name: float((got[name] - x).square().sum() / x.square().sum()) for name, x in expected.items()}


def _made(qmodel: QuantModel, images: Tensor, sites: Sequence[Site], on: Sequence[Site]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with torch.no_grad(), switched_off(qmodel, list(sites)):
        qmodel.set_state("on", list(on))
        for site in sites:
            quantizer = qmodel.quantizers[site]
            quantizer.observer = lambda q, x: None  # so that a product of float operands is shown, too
            quantizer.product_observer = lambda x, name=site.id: found.__setitem__(name, x.double())
        qmodel(images)
    return found


def _output_errors(qmodel: QuantModel, images: Tensor) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}

    def look(site: Site, weight: Tensor, weight_quantizer: Any, quantizer: Any, x: Tensor) -> None:
        wrong = quantizer.quantized(x) @ weight_quantizer.quantized(weight).T - x @ weight.T
        found.setdefault(site.role, {})[site.id] = float(wrong.square().sum())

    every = [linear for linear in linears(qmodel) if linear.input.op == "linear"]
    with torch.no_grad(), switched_off(qmodel, [linear.input for linear in every]):
        for linear in every:
            weight = qmodel.weight(linear.weight)
            assert weight is not None
            fixed = (linear.input, weight.data, qmodel.quantizers[linear.weight])
            qmodel.quantizers[linear.input].observer = partial(look, *fixed)
        qmodel(images)
    return found
