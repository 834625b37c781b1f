"""The contract of a recipe (design: contracts), for everything in the RECIPES registry, and each paper's mechanism.

A new recipe is tested with no edit, after `make golden`.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.core import roles
from vitq.core.format import Bits, Format
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import RECIPES, PassSpec, Recipe, Rule, resolve_recipe
from vitq.core.site import Site
from vitq.data.zoo import build_zoo, seeded_images
from vitq.quantizers.base import Quantizer
from vitq.quantizers.common import AnyQuantizer

TOP = Path(__file__).resolve().parents[2]
RECIPE_FILES = TOP / "vitq" / "recipes"
BITS = ("w8a8", "w6a6", "w4a4", "w3a3", "w4a16")
SECONDS = 20.0  # "in seconds", with room for a busy machine

# Options of searches, for recipes that have them (golden files search all). A scale for each of 64 channels is fitted
# to these rows: with 32 of them the search would fit the sample, and not pass the contract at 8 bits.
FEW = {"steps": 32, "rounds": 1, "rows": 128}

Measure = Callable[[str, Tensor, Tensor], float]

each_recipe = pytest.mark.parametrize("name", list(RECIPES))
each_model = pytest.mark.parametrize("model", ["seeded_vit", "seeded_swin"])


def quick(name: str, model: nn.Module, bits: str, data: Tensor | list[Tensor], **more: Any) -> QuantModel:
    """Quantize by a recipe that searches little."""
    known = inspect.signature(RECIPES[name]).parameters
    options = {option: value for option, value in FEW.items() if option in known}
    return vitq.quantize(model, name, bits, data, options=options, **more)


def load_writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_write", TOP / "tests" / "golden" / "write.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quantizers(qmodel: QuantModel) -> dict[str, Quantizer]:
    found = {site: qmodel.quantizers[site] for site in qmodel.quantizers}
    assert all(isinstance(q, AnyQuantizer) for q in found.values())
    return found  # type: ignore[return-value]


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    """Keys of the state dict that are not equal bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    return [key for key in left if not torch.equal(left[key], right[key])]


def noise_ratio(qmodel: nn.Module, model: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        expected, got = model(images), qmodel(images)
    return float((got - expected).square().sum() / expected.square().sum())


@each_recipe
def test_the_quick_gelu_is_treated_as_gelu(name: str) -> None:
    """Their shapes are nearly the same, and models that are fine-tuned from CLIP's have the quick one."""
    recipe = resolve_recipe(name, Bits.parse("w4a4"))
    sites = [
        Site("x:op0.input", "x", "linear", 0, "input", roles.FC2_IN, ("batch", "token", "channel"), (1, 4, 8), producer)
        for producer in ("gelu", "quick_gelu")
    ]
    assert recipe.format_for(sites[0]) == recipe.format_for(sites[1])


@each_recipe
@pytest.mark.parametrize("bits", BITS)
def test_a_recipe_builds_at_every_width(name: str, bits: str) -> None:
    built = resolve_recipe(name, Bits.parse(bits))
    assert built.name == name
    assert built.formats
    assert built.passes
    for spec in built.passes:
        assert spec.build().cost
    widths = Bits.parse(bits)
    assert widths.weight in {rule.format.bits for rule in built.formats if rule.format}


@each_recipe
def test_a_recipe_cites_its_paper_and_says_where_it_differs(name: str) -> None:
    module = inspect.getmodule(RECIPES[name])
    assert module is not None
    docstring = module.__doc__ or ""
    number = r"(?<=arXiv )\d{4}\.\d{4,5}\b|\b[A-Z]{4,} 20\d\d\b"  # not every paper is on arXiv
    assert re.search(number, docstring)
    assert re.search(r"[Dd]iffer|baseline", docstring)
    cited = re.findall(number, resolve_recipe(name, Bits(4, 4)).paper)
    assert cited
    assert all(each in docstring for each in cited)
    assert RECIPES[name].__doc__


def test_every_file_of_the_recipes_folder_registers_something() -> None:
    registered = {Path(inspect.getfile(RECIPES[name])).stem for name in RECIPES}
    for path in RECIPE_FILES.glob("[!_]*.py"):
        makes_modifier = "@modifier" in path.read_text(encoding="utf-8")
        assert path.stem in registered or makes_modifier, path.name
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@each_recipe
@each_model
@pytest.mark.parametrize("bits", BITS)
def test_a_recipe_runs_in_seconds_and_gives_finite_outputs(name: str, model: str, bits: str) -> None:
    images = seeded_images(4)
    float_model = build_zoo(model)
    before = {key: value.clone() for key, value in float_model.state_dict().items()}
    start = time.perf_counter()
    if bits == "w4a4":
        qmodel = vitq.quantize(float_model, name, bits, images)
    else:
        qmodel = quick(name, float_model, bits, images)
    assert time.perf_counter() - start < SECONDS
    with torch.no_grad():
        assert bool(qmodel(images).isfinite().all())
    assert all(q.fitted and q.state == "on" for q in quantizers(qmodel).values())
    after = float_model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    for site, quantizer in quantizers(qmodel).items():
        weight = qmodel.weight(site)
        if weight is not None:  # baked: decoded values, which quantizing again does not change
            for row in quantizer.layout.by_group(weight.detach()):
                assert row.unique().numel() <= 2**quantizer.bits
            assert torch.equal(quantizer.decode(quantizer.encode(weight.detach())), weight)


@each_recipe
@each_model
def test_more_bits_are_better(name: str, model: str) -> None:
    images, float_model = seeded_images(8), build_zoo(model)
    made = [quick(name, float_model, bits, images) for bits in ("w8a8", "w6a6", "w3a3")]
    noise = [noise_ratio(qmodel, float_model, images) for qmodel in made]
    assert noise[0] < noise[1] < noise[2]
    # The largest codes of a logarithm to a fixed base are as far apart with 8 bits as with few.
    coarse = [site for site, fmt in made[0].formats.items() if "log" in fmt.kind]
    if coarse:
        noise[0] = noise_ratio(quick(name, float_model, "w8a8", images, exclude=coarse), float_model, images)
    assert noise[0] < 0.01


@each_recipe
@each_model
def test_the_same_seed_gives_the_same_bits(name: str, model: str) -> None:
    images = seeded_images(5)
    runs = [quick(name, build_zoo(model), "w4a4", images, seed=3) for _ in range(2)]
    assert differing(*runs) == []
    assert runs[0].formats == runs[1].formats


@each_recipe
def test_micro_batches_as_a_tensor_and_as_an_iterable_give_the_same_bits(name: str) -> None:
    images = seeded_images(40)  # micro-batches of 32 and 8
    runs = [quick(name, build_zoo("seeded_vit"), "w4a4", data) for data in (images, list(images.split(32)))]
    assert differing(*runs) == []
    with torch.no_grad():
        assert torch.equal(runs[0](images[:8]), runs[1](images[:8]))


@each_recipe
def test_how_often_the_prefix_is_run_again_does_not_show(name: str) -> None:
    """32 images in one forward, and the same 32 in four micro-batches: the same statistics, so the same bits."""
    images = seeded_images(32)
    runs = [quick(name, build_zoo("seeded_vit"), "w6a6", data) for data in (images, list(images.split(8)))]
    for site, quantizer in quantizers(runs[0]).items():
        other = quantizers(runs[1])[site]
        # Matrix products of another batch size may round differently; scales follow to float precision.
        scales = [q.params().get("scale") for q in (quantizer, other)]  # dynamic formats have none
        torch.testing.assert_close(*scales, rtol=1e-4, atol=0)


@each_recipe
def test_a_recipe_matches_its_golden_file(name: str) -> None:
    writer = load_writer()
    path = writer.path_of(name)
    assert path.exists(), f"no {path.name}; write it with `make golden`"
    expected, got = json.loads(path.read_text(encoding="utf-8")), writer.golden(name)
    assert list(got["sites"]) == list(expected["sites"])
    may = expected["tolerance"]
    assert got["sqnr_db"] == pytest.approx(expected["sqnr_db"], abs=may["sqnr_db"])
    for site, wanted in expected["sites"].items():
        assert sorted(got["sites"][site]) == sorted(wanted)
        for field, value in wanted.items():
            found = got["sites"][site][field]
            assert found == (pytest.approx(value, rel=may["params"]) if isinstance(value, list) else value), (
                site,
                field,
            )


def test_no_golden_file_is_left_of_a_recipe_that_is_gone() -> None:
    assert {path.stem for path in (TOP / "tests" / "golden").glob("*.json")} == set(RECIPES)


def test_golden_files_do_not_depend_on_float_noise() -> None:
    """Another machine's matrix kernels differ by as much; the comparison must not be fooled by it."""
    writer = load_writer()
    model = build_zoo(writer.MODEL)
    images = seeded_images(writer.CALIBRATION)
    noisy = images * (1 + 3e-7 * torch.randn(images.shape))
    a, b = (quantizers(vitq.quantize(model, "repq_vit", writer.BITS, data)) for data in (images, noisy))
    for site, quantizer in a.items():
        for field, value in quantizer.params().items():
            assert writer.digest(b[site].params()[field]) == pytest.approx(writer.digest(value), rel=1e-4), site


# -- mechanisms ------------------------------------------------------------------------------------------


def peaked(model: nn.Module) -> nn.Module:
    """The same model with attention as trained models have it: one head peaked at one token, the others diffuse."""
    with torch.no_grad():
        for module in model.modules():
            qkv = getattr(module, "qkv", None)
            if isinstance(qkv, nn.Linear):
                query_and_key = qkv.weight[: 2 * qkv.in_features].unflatten(0, (2, 4, -1))
                query_and_key[:, 0] *= 3.0
                query_and_key[:, 1:] *= 0.7
    return model


def outlying(model: nn.Module) -> nn.Module:
    """The same model with a few LayerNorm channels many times larger than the rest."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[::16] *= 12.0
    return model


def site_noise(qmodel: QuantModel, role: str, images: Tensor, measure: Measure) -> dict[str, float]:
    """Per site of a role: what the measure makes of the float model's values, and of their error when quantized."""
    qmodel.set_state("off")
    sites = [quantizers(qmodel)[site.id] for site in qmodel.graph.with_roles(role)]
    seen: dict[Quantizer, Tensor] = {}
    for quantizer in sites:
        quantizer.observer = lambda quantizer, x: seen.__setitem__(quantizer, x)
    with torch.no_grad():
        qmodel(images)
        names = [site.id for site in qmodel.graph.with_roles(role)]
        return {n: measure(n, seen[q], q.quantized(seen[q]) - seen[q]) for n, q in zip(names, sites, strict=True)}


def relative(name: str, x: Tensor, error: Tensor) -> float:
    return float(error.square().mean() / x.square().mean())


def relative_by_head(name: str, x: Tensor, error: Tensor) -> float:
    """The mean over heads, so that one head of large values does not hide the others."""
    return float((error.square().mean((0, 2, 3)) / x.square().mean((0, 2, 3))).mean())


def without(name: str, *rules: Rule, passes: tuple[PassSpec, ...] | None = None) -> Recipe:
    """A recipe at w4a4 with a mechanism switched off by further rules, or by other passes."""
    base = resolve_recipe(name, Bits(4, 4))
    return Recipe("ablated", base.paper, (*base.formats, *rules), base.passes if passes is None else passes)


def test_mechanism_log_sqrt2_lowers_the_error_of_peaked_attention() -> None:
    images, model = seeded_images(8), peaked(build_zoo("seeded_vit"))
    uniform = without("repq_vit", Rule(Format("uniform", 4), (roles.SOFTMAX_OUT,)))
    log2 = without("repq_vit", Rule(Format("log2", 4), (roles.SOFTMAX_OUT,)))
    noise = {}
    for label, made in (("logsqrt2", "repq_vit"), ("uniform", uniform), ("log2", log2)):
        qmodel = vitq.quantize(model, made, "w4a4", images, freeze=False)
        noise[label] = site_noise(qmodel, roles.SOFTMAX_OUT, images, relative_by_head)
    assert len(noise["logsqrt2"]) == 3
    for site, value in noise["logsqrt2"].items():
        assert value < 0.8 * noise["uniform"][site], (site, noise)
        assert value < 0.8 * noise["log2"][site], (site, noise)


def test_mechanism_folded_channel_scales_lower_the_error_of_outlier_channels_at_the_query_key_value_input() -> None:
    images, model = seeded_images(8), outlying(build_zoo("seeded_vit"))
    fit = PassSpec.of("fit", method="percentile_mse", weight_method="percentile_mse", flow="prefix")
    whole = without("repq_vit", Rule(Format("uniform", 4), after_norm=True), passes=(fit,))
    noise = {}
    for label, made in (("folded", "repq_vit"), ("per tensor", whole)):
        qmodel = vitq.quantize(model, made, "w4a4", images, freeze=False)
        weights = {s.owner: qmodel.weight(s) for s in qmodel.graph.with_roles(roles.WEIGHT)}

        def product(name: str, x: Tensor, error: Tensor, weights: dict[str, nn.Parameter | None] = weights) -> float:
            # Folding changes the unit of every channel; what the linear makes of them it does not change.
            weight = weights[name.split(":")[0]]
            assert weight is not None
            return relative(name, x @ weight.T, error @ weight.T)

        noise[label] = site_noise(qmodel, roles.QKV_IN, images, product)
        assert {qmodel.formats[site].per for site in noise[label]} == {"tensor"}
    assert len(noise["folded"]) == 3
    for site, value in noise["folded"].items():
        assert value < noise["per tensor"][site], (site, noise)


def test_mechanism_percentiles_lower_the_error_where_values_are_rare_and_large() -> None:
    images = seeded_images(8)
    model = build_zoo("seeded_vit")
    images[0, :, :1, :1] = 60.0  # one broken pixel
    clipped, whole = (
        site_noise(vitq.quantize(model, name, "w4a4", images, freeze=False), roles.FC2_IN, seeded_images(8), relative)
        for name in ("percentile", "minmax")
    )
    assert sum(clipped.values()) < sum(whole.values())


def test_parity_mode_is_a_choice_that_refuses_to_be_lowered() -> None:
    images = seeded_images(4)
    qmodel = vitq.quantize(build_zoo("seeded_vit"), "repq_vit", "w4a4", images, options={"parity": True})
    refused = {site for site, q in quantizers(qmodel).items() if not q.exportable}
    wanted = {s.id for s in qmodel.graph.with_roles(roles.SOFTMAX_OUT, roles.QKV_IN, roles.FC1_IN)}
    assert refused == wanted
    plain = vitq.quantize(build_zoo("seeded_vit"), "repq_vit", "w4a4", images)
    assert all(q.exportable for q in quantizers(plain).values())
    for quantizer in quantizers(plain).values():
        quantizer.lower()
