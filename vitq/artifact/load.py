"""Read an artifact back. Every way in which it can be wrong is one ArtifactError."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vitq.artifact import schema
from vitq.artifact.schema import CONFIG, TENSORS
from vitq.core.batches import ForwardFn, default_forward, example_from
from vitq.core.errors import ArtifactError, VitqError
from vitq.core.format import Format
from vitq.core.plan import Plan
from vitq.core.qmodel import QuantModel
from vitq.core.rewrite import REWRITES
from vitq.core.site import Graph, Site
from vitq.data.source import build_model
from vitq.graph.trace import trace
from vitq.pipeline import insert
from vitq.quantizers.base import Quantizer
from vitq.quantizers.packing import unpack


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
    config = schema.read(path / CONFIG)
    tensors = _read_tensors(path / TENSORS, config.tensors_sha256)
    target = float_model if float_model is not None else model
    if target is None:
        if config.source is None:
            raise ArtifactError(f"{path} does not name its model; give the architecture as model=")
        target = build_model(config.source, trust_code=trust_code)
    try:
        return _assemble(config, tensors, target.eval(), forward_fn, dict(rename or {}), float_model is not None)
    except ArtifactError:
        raise
    except (VitqError, KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{path} does not fit together: {type(error).__name__}: {error}") from error


def _assemble(
    config: schema.ArtifactConfig,
    tensors: dict[str, Tensor],
    model: nn.Module,
    forward_fn: ForwardFn,
    rename: dict[str, str],
    keep_float: bool,
) -> QuantModel:
    graph = trace(model, example_from(config.example), forward_fn)
    names = schema.Renaming(rename)
    _check_graph({names.site(s): names.line(line) for s, line in config.graph.items()}, graph)
    formats = {names.site(s): Format.from_json(f) for s, f in config.formats.items()}
    qmodel = insert(model, graph, Plan.from_json(config.plan), formats)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for number, entry in enumerate(config.rewrites):
        prefix = f"rewrite/{number}/"
        values = {k.removeprefix(prefix): v.to(device) for k, v in tensors.items() if k.startswith(prefix)}
        rewrite = REWRITES[entry.name](names.arguments(entry.args), values)
        rewrite.prepare(model)
        if keep_float:
            rewrite.apply(model)
        qmodel.rewrites.append(rewrite)
    if not keep_float:
        _load_state(
            model,
            {names.module(k.removeprefix("state/")): v for k, v in tensors.items() if k.startswith("state/")},
            config,
            names,
        )
    for site in qmodel.sites():
        quantizer = qmodel.quantizers[site]
        assert isinstance(quantizer, Quantizer)
        stored = names.back(site.id)
        quantizer.set_params({f: tensors[f"site/{stored}/{f}"].float() for f in quantizer.fields})
        quantizer.state = "on"
        if not keep_float and stored in config.packed:
            _unpack_weight(qmodel, site, quantizer, tensors[f"codes/{stored}"], config.packed[stored])
        elif not keep_float and qmodel.weight(site) is not None:
            quantizer.baked = True
    qmodel.source, qmodel.preprocess = config.source, config.preprocess
    qmodel.provenance, qmodel.log = config.provenance, config.log
    qmodel.frozen = not keep_float
    return qmodel


def _read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ArtifactError(f"{path} is missing; the artifact is not whole")
    if schema.sha256_of(path) != sha256:
        raise ArtifactError(
            f"{path} is damaged: its digest is not the one in {CONFIG}; save or copy the artifact again"
        )
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def _load_state(
    model: nn.Module, state: dict[str, Tensor], config: schema.ArtifactConfig, names: schema.Renaming
) -> None:
    own = model.state_dict()
    coded = {id(model.get_parameter(names.module(p.param))) for p in config.packed.values()}
    filled = {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in coded}
    missing = sorted(set(own) - set(state) - filled)
    unexpected = sorted(set(state) - set(own))
    wrong = [n for n in state if n in own and own[n].shape != state[n].shape]
    if missing or unexpected or wrong:
        raise ArtifactError(
            f"the model does not fit the artifact: missing {missing[:5]}, unexpected {unexpected[:5]}, other shapes "
            f"{wrong[:5]}; is it the same architecture? rename= maps module names"
        )
    for name, value in state.items():
        target = own[name]
        target.data = target.data.to(value.dtype)
    model.load_state_dict(state, strict=False, assign=False)


def _unpack_weight(qmodel: QuantModel, site: Site, quantizer: Quantizer, codes: Tensor, entry: schema.Packed) -> None:
    weight = qmodel.weight(site)
    if weight is None or list(weight.shape) != entry.shape or entry.bits != quantizer.bits:
        raise ArtifactError(
            f"{site.id}: stored as {entry.bits} bits of shape {entry.shape}, which does not fit the model"
        )
    values = quantizer.decode(unpack(codes, entry.bits, weight.numel()).reshape(weight.shape).to(weight.device))
    weight.data = values.to(weight.dtype)
    quantizer.baked = True


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
