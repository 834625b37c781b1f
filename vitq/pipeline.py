"""quantize(): the library on one screen."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vitq.calibrate.heap import give_back
from vitq.core.batches import Batches, ForwardFn, default_forward, describe_example, device_of, first_of, moved
from vitq.core.errors import CompositionError, DataError, InputError
from vitq.core.format import Bits, Format, Scalar
from vitq.core.plan import Override, Plan, parse_overrides
from vitq.core.progress import Progress, Silent
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import Recipe, RecipeFn, resolve_recipe
from vitq.core.site import Graph
from vitq.core.training import Training, TrainingPass
from vitq.graph.insert import QuantizedOwner, attach
from vitq.graph.trace import trace
from vitq.quantizers.registry import quantizer_at


def quantize(
    model: nn.Module,
    recipe: str | Recipe | RecipeFn,
    bits: str = "w4a4",
    data: Any = None,
    *,
    scope: str | Sequence[str] = "all",
    exclude: Sequence[str] = (),
    overrides: Sequence[str | Override] = (),
    options: Mapping[str, Scalar] | None = None,
    example: Any = None,
    forward_fn: ForwardFn = default_forward,
    seed: int = 0,
    freeze: bool = True,
    training: Training | None = None,
    progress: Progress | None = None,
) -> QuantModel:
    """Quantize a vision transformer by a recipe. The model given is not changed.

    Args:
        model: any module, in eval mode, on the device where the work shall be done.
        recipe: a recipe's name with modifiers ("repq_vit+gptq"), a recipe function, or a Recipe.
        bits: widths of weights and activations, "w4a4"; 16 leaves that side in float.
        data: calibration images as the model takes them: a tensor (N, C, H, W), a list of images (3, H, W) of any sizes
            for a detector that takes such, or batches of them.
        scope: module names inside of which to quantize.
        exclude: sites left in float: a module, a glob on site ids, or "role=NAME".
        overrides: other widths for some sites, "role=HEAD_IN:w8a8".
        options: keyword arguments of the recipe, such as {"parity": True}.
        example: one input for tracing; the first calibration image unless given.
        forward_fn: (model, batch) -> output, for models that are not called as model(batch).
        seed: for whatever draws random numbers.
        freeze: fix the scales and put decoded weights into the model.
        training: on what, and how long, a recipe that trains does; one epoch on the calibration images unless given.
        progress: where to show it.

    Returns:
        A QuantModel: an nn.Module that behaves like the model.

    Raises:
        InputError: bad bits, names, options, data or weights; before any long work.
        SiteNotFoundError: an exclusion, override or scope that matches nothing.
        TraceError: the model does not run on the example.
    """
    plan = resolve(recipe, bits, scope=scope, exclude=exclude, overrides=overrides, options=options, seed=seed)
    check_weights(model)
    batches = None if data is None else Batches.of(data, forward_fn)
    device = device_of(model)
    if device is not None:  # images may come from another one
        batches = None if batches is None else batches.on(device)
        example = moved(example, device)
    example = first_example(batches, example)
    graph = trace(model, example, forward_fn)  # 1. where
    qmodel = insert(copy.deepcopy(model), graph, plan)  # 2. which numbers
    qmodel.example = describe_example(example)
    with torch.random.fork_rng():  # the caller's random numbers are not touched
        torch.manual_seed(seed)
        run_passes(qmodel, batches, progress or Silent(), training, model)  # 3. how
    return qmodel.freeze() if freeze else qmodel  # 4. codes and scales


def resolve(
    recipe: str | Recipe | RecipeFn,
    bits: str,
    *,
    scope: str | Sequence[str] = "all",
    exclude: Sequence[str] = (),
    overrides: Sequence[str | Override] = (),
    options: Mapping[str, Scalar] | None = None,
    seed: int = 0,
) -> Plan:
    """Turn what was asked for into a plan, or refuse it.

    Raises:
        InputError: unknown names, bad bits or overrides.
        CompositionError: recipe and modifiers do not fit together.
    """
    widths = Bits.parse(bits)
    if scope == "all":
        scope = ()
    return Plan(
        recipe=resolve_recipe(recipe, widths, options),
        bits=str(widths),
        exclude=tuple(exclude),
        overrides=parse_overrides(overrides),
        scope=(scope,) if isinstance(scope, str) else tuple(scope),
        seed=seed,
    )


def insert(model: nn.Module, graph: Graph, plan: Plan, formats: Mapping[str, Format] | None = None) -> QuantModel:
    """Put an unfitted quantizer at every site that the plan gives a format, in place.

    Args:
        formats: instead of the plan's own choice (an artifact stores what the passes made of it).
    """
    chosen = plan.assign(graph).formats if formats is None else formats
    quantizers = {site: quantizer_at(graph.sites[site], fmt) for site, fmt in chosen.items()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for site, quantizer in quantizers.items():
        quantizer.to(device)
        quantizer.where = site
    attach(model, graph, quantizers)
    qmodel = QuantModel(model, graph, quantizers, chosen, plan)
    if unfolded := [s.id for s in graph.sites.values() if s.id in chosen and plan.recipe.misses_norm(s)]:
        qmodel.log["no_norm_to_fold_into"] = unfolded
    return qmodel


def run_passes(
    qmodel: QuantModel,
    data: Batches | None,
    progress: Progress,
    training: Training | None = None,
    float_model: nn.Module | None = None,
) -> None:
    """Ask the plan's passes whether they can work, then run them in order, and note how long each took.

    Args:
        training: for passes that train.
        float_model: their teacher.

    Raises:
        CompositionError: there is training to do, and no pass that trains.
    """
    steps = [(spec, spec.build()) for spec in qmodel.plan.passes]
    trained = [step for _, step in steps if isinstance(step, TrainingPass)]
    if training is not None and not trained:
        raise CompositionError(f"recipe {qmodel.plan.recipe.name!r} trains nothing; use quantize without training=")
    for number, one in enumerate(trained):
        one.training, one.teacher = training and training.stage(number), float_model
    for _, step in steps:
        step.check(qmodel, data)
    seconds = []
    for spec, step in steps:
        start = time.perf_counter()
        step.run(qmodel, data, progress)
        if isinstance(step, TrainingPass):  # a run that goes on has drawn fewer random numbers than one in one piece
            torch.manual_seed(qmodel.plan.seed)
        give_back()
        seconds.append({"pass": str(spec), "seconds": round(time.perf_counter() - start, 3)})
    qmodel.log["passes"] = seconds


def first_example(data: Batches | None, example: Any) -> Any:
    """The example to trace with: the one given, else the first calibration image.

    Raises:
        DataError: neither is there.
    """
    if example is not None:
        return example
    if data is None:
        raise DataError("nothing to trace with: give calibration images as data=, or one input as example=")
    return first_of(next(iter(data)))


def check_weights(model: nn.Module) -> None:
    """Refuse models that cannot be quantized.

    Raises:
        InputError: NaN or Inf in the weights, or a model that is quantized already.
    """
    if isinstance(model, QuantModel) or any(isinstance(module, QuantizedOwner) for module in model.modules()):
        raise InputError("this model is quantized already; give the float model")
    bad = [n for n, p in model.named_parameters() if p.is_floating_point() and not bool(torch.isfinite(p).all())]
    if bad:
        raise InputError(f"NaN or Inf in {len(bad)} weights: {', '.join(bad[:5])}; load a sound checkpoint")
