"""Read an artifact back. Every way in which it can be wrong is one ArtifactError."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitq.artifact import schema, wrapped
from vitq.artifact.schema import CONFIG, TENSORS
from vitq.core.batches import ForwardFn, default_forward, example_from
from vitq.core.errors import ArtifactError
from vitq.core.format import Format
from vitq.core.plan import Plan
from vitq.core.qmodel import QuantModel
from vitq.core.rewrite import REWRITES
from vitq.core.site import Graph, Site
from vitq.data.source import build_model
from vitq.graph.trace import trace
from vitq.pipeline import insert
from vitq.quantizers.base import Quantizer
from vitq.quantizers.common import AnyQuantizer
from vitq.quantizers.packing import unpack

SAME_CODES = 0.01  # of a weight's codes may differ between machines, when a float model is quantized again
SAME_WEIGHTS = 0.5  # of a weight's variance may be lost where a pass chose other codes than the nearest


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    float_model: nn.Module | None = None,
    forward_fn: ForwardFn = default_forward,
    rename: Mapping[str, str] | None = None,
    trust_code: bool = False,
) -> QuantModel:
    """Read an artifact back: identical outputs on the same machine.

    Args:
        model: the architecture, for models that have no name; it is changed in place.
        float_model: as `model`, and its float weights are kept and quantized at every forward, so that sites
            can be switched off (`diagnose`). It must be the model that was quantized.
        forward_fn: as in `quantize`.
        rename: module names in the artifact -> module names in `model`, where the tree has changed.
        trust_code: allow sources of the form file.py:function, which run that file.

    Raises:
        ArtifactError: missing, truncated or changed files, a newer schema, or a model that does not fit.
    """
    path = Path(path)
    if isinstance(model, QuantModel) or isinstance(float_model, QuantModel):
        raise ArtifactError("the model given is quantized already; give the float architecture")
    config = schema.read(path / CONFIG)
    target = float_model if float_model is not None else model
    if target is None and config.source is None:
        raise ArtifactError(f"{path} does not name its model; give the architecture as model=")
    with schema.told_as_damage(path, "is damaged, or not of this model"):
        tensors = _read_tensors(path / TENSORS, config)
        if target is None:
            target = build_model(config.source or {}, trust_code=trust_code)
        names = schema.Renaming(dict(rename or {}))
        return _assemble(config, tensors, target.eval(), forward_fn, names, float_model is not None)


def load_onto(model: nn.Module, config: schema.ArtifactConfig, tensors: Path) -> QuantModel:
    """Fill a model that is there already from the two parts of an artifact, in place.

    Args:
        config: what config.json says.
        tensors: the file that it goes with.

    Raises:
        ArtifactError: as `load`.
    """
    with schema.told_as_damage(tensors, "is damaged, or not of this model"):
        read = _read_tensors(tensors, config)
        return _assemble(config, read, model.eval(), default_forward, schema.Renaming(), False)


def _assemble(
    config: schema.ArtifactConfig,
    tensors: dict[str, Tensor],
    model: nn.Module,
    forward_fn: ForwardFn,
    names: schema.Renaming,
    keep_float: bool,
) -> QuantModel:
    parts = _Parts(tensors)
    state = {names.module(k): v for k, v in parts.below("state/").items()}
    if not keep_float:
        _cast(model, state, config, names)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, example_from(config.example))
    graph = trace(model, example, forward_fn)
    _check_graph({names.site(s): names.line(line) for s, line in config.graph.items()}, graph)
    formats = {names.site(s): Format.from_json(f) for s, f in config.formats.items()}
    qmodel = insert(model, graph, Plan.from_json(config.plan), formats)
    for number, entry in enumerate(config.rewrites):
        values = {name: parts.take(f"rewrite/{number}/{name}").to(device) for name in entry.tensors}
        rewrite = REWRITES[entry.name](names.arguments(entry.args), values)
        rewrite.prepare(model)
        if keep_float:
            rewrite.apply(model)
        qmodel.rewrites.append(rewrite)
    stored = {site.id: names.back(site.id) for site in qmodel.sites()}
    _check_state(model, state, config, names, set(stored.values()))
    for site in qmodel.sites():
        quantizer = qmodel.quantizers[site]
        assert isinstance(quantizer, AnyQuantizer)
        quantizer.set_params({f: parts.take(f"site/{stored[site.id]}/{f}").float() for f in quantizer.fields})
        quantizer.state = "on"
    if keep_float:
        _check_same_model(qmodel, state, config, names, parts)
    else:
        with torch.no_grad():
            model.load_state_dict(state, strict=False)
        for site in qmodel.sites():
            if stored[site.id] in config.packed:
                _weight(qmodel, site).data = _decoded(qmodel, site, stored[site.id], config, names, parts)
            qmodel.quantizers[site].baked = qmodel.weight(site) is not None
    parts.finish()
    qmodel.example, qmodel.source, qmodel.preprocess = config.example, config.source, config.preprocess
    qmodel.provenance, qmodel.log = config.provenance, config.log
    qmodel.frozen = not keep_float
    return qmodel


class _Parts:
    """The tensors of the file, of which none may be missing and none left over."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._taken: set[str] = set()

    def take(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ArtifactError(f"{TENSORS} lacks {name!r}; the artifact is damaged")
        self._taken.add(name)
        return self._tensors[name]

    def below(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): self.take(name) for name in self._tensors if name.startswith(prefix)}

    def finish(self) -> None:
        left = sorted(set(self._tensors) - self._taken)
        if left:
            raise ArtifactError(f"{TENSORS} holds {len(left)} tensors that nothing uses: {', '.join(left[:5])}")


def _read_tensors(path: Path, config: schema.ArtifactConfig) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    schema.check_tensors(path, config)
    try:
        with safe_open(path, framework="pt") as file:
            bound = (file.metadata() or {}).get(schema.BOUND)
            names = set(file.keys())
            own = {name for name in names if "/" in name} if wrapped.NOTICE in names else names
            tensors = {name: file.get_tensor(name) for name in own}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if bound != schema.binding(config):
        raise ArtifactError(
            f"{path} belongs to another {CONFIG}: plan, formats, graph or model differ; save or copy the artifact again"
        )
    return tensors


def _cast(model: nn.Module, state: dict[str, Tensor], config: schema.ArtifactConfig, names: schema.Renaming) -> None:
    """Give parameters and buffers the types that they were saved in (an architecture is built in float32)."""
    own = model.state_dict(keep_vars=True)
    types = {name: value.dtype for name, value in state.items()}
    types |= {names.module(p.param): getattr(torch, p.dtype) for p in config.packed.values()}
    for name, dtype in types.items():
        if name in own:  # what a rewrite adds is not there yet
            own[name].data = own[name].data.to(dtype)
    floats = [dtype for dtype in set(types.values()) if dtype.is_floating_point]
    if len(floats) == 1:  # buffers that are not saved (attention masks) had the model's type, too
        for name, buffer in model.named_buffers():
            if name not in types and buffer.is_floating_point():
                buffer.data = buffer.data.to(floats[0])


def _check_state(
    model: nn.Module,
    state: dict[str, Tensor],
    config: schema.ArtifactConfig,
    names: schema.Renaming,
    sites: set[str],
) -> None:
    own = model.state_dict()
    coded = {id(model.get_parameter(names.module(p.param))) for site, p in config.packed.items() if site in sites}
    filled = {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in coded}
    missing = sorted(set(own) - set(state) - filled)
    unexpected = sorted(set(state) - (set(own) - filled)) + sorted(set(config.packed) - sites)
    wrong = [n for n in state if n in own and own[n].shape != state[n].shape]
    if missing or unexpected or wrong:
        raise ArtifactError(
            f"the model does not fit the artifact: missing {missing[:5]}, unexpected {unexpected[:5]}, other shapes "
            f"{wrong[:5]}; is it the same architecture? rename= maps module names"
        )


def _check_same_model(
    qmodel: QuantModel,
    state: dict[str, Tensor],
    config: schema.ArtifactConfig,
    names: schema.Renaming,
    parts: _Parts,
) -> None:
    """Refuse float weights that are not those which were quantized. Another machine may round a few otherwise.

    Where a pass chose the codes, they cannot be had from the float weights: the stored ones are used.
    """
    chosen = any(spec.build().slot == "round" for spec in qmodel.plan.passes)
    own = qmodel.model.state_dict()
    far = [n for n, v in state.items() if not torch.allclose(own[n].double().cpu(), v.double(), rtol=1e-2, atol=1e-4)]
    for site in qmodel.sites():
        stored = names.back(site.id)
        if stored in config.packed:
            values = _decoded(qmodel, site, stored, config, names, parts)
            quantizer, weight = qmodel.quantizers[site], _weight(qmodel, site)
            if chosen:
                error = float((values.double() - weight.data.double()).square().mean())
                if error > SAME_WEIGHTS * float(weight.data.double().square().mean()):
                    far.append(str(site.param))
                assert isinstance(quantizer, Quantizer)
                quantizer.round_to(values)
            elif float((quantizer(weight.data) != values).double().mean()) > SAME_CODES:
                far.append(str(site.param))
    if far:
        raise ArtifactError(
            f"float_model= is not the model that was quantized: {len(far)} parameters differ, for example "
            f"{', '.join(far[:4])}; load the checkpoint that was quantized"
        )


def _decoded(
    qmodel: QuantModel,
    site: Site,
    stored: str,
    config: schema.ArtifactConfig,
    names: schema.Renaming,
    parts: _Parts,
) -> Tensor:
    entry, quantizer, weight = config.packed[stored], qmodel.quantizers[site], _weight(qmodel, site)
    fits = list(weight.shape) == entry.shape and names.module(entry.param) == site.param
    if not fits or entry.bits != quantizer.bits:
        raise ArtifactError(
            f"{site.id}: stored as {entry.bits} bits of shape {entry.shape} for {entry.param}, which does not fit the "
            f"model"
        )
    codes = unpack(parts.take(f"codes/{stored}"), entry.bits, weight.numel()).reshape(weight.shape)
    assert isinstance(quantizer, Quantizer)
    return quantizer.decode(codes.to(weight.device)).to(weight.dtype)


def _weight(qmodel: QuantModel, site: Site) -> nn.Parameter:
    weight = qmodel.weight(site)
    if weight is None:
        raise ArtifactError(f"{site.id} has stored codes, and is no parameter of this model")
    return weight


def _check_graph(stored: dict[str, str], graph: Graph) -> None:
    found = graph.signature()
    if stored == found:
        return
    gone, new = sorted(set(stored) - set(found)), sorted(set(found) - set(stored))
    changed = [f"{s}: was {stored[s]}, is {found[s]}" for s in stored if s in found and stored[s] != found[s]]
    raise ArtifactError(
        "the model has other sites than the one that was quantized. "
        + "; ".join(
            f"{what}: {', '.join(items[:4])}{' …' if len(items) > 4 else ''}"
            for what, items in (("gone", gone), ("new", new), ("changed", changed))
            if items
        )
        + ". If modules were only renamed, say so with rename={'old.module': 'new.module'}."
    )
