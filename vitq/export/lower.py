"""From a marked model to a file: every mark becomes what its site's format is in ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vitq.core.qmodel import QuantModel
from vitq.core.roles import WEIGHT
from vitq.export.edit import Editor
from vitq.export.marked import DOMAIN, OPSET
from vitq.export.place import enters_float, fold_factor, takes_whole_numbers
from vitq.export.sites import fits_bytes, put_activation
from vitq.export.tables import Functions
from vitq.export.weights import put_weight
from vitq.quantizers.base import Quantizer


@dataclass(frozen=True)
class Profile:
    """What a runtime wants.

    Attributes:
        name: as on the command line.
        pairs: activations as QuantizeLinear and DequantizeLinear, placed next to products; else as local functions.
    """

    name: str
    pairs: bool


PROFILES = {p.name: p for p in (Profile("ort", True), Profile("reference", False))}


def lower_marks(model: Any, qmodel: QuantModel, profile: Profile) -> None:
    """Replace every mark, in place."""
    graph, functions = model.graph, Functions(model, OPSET)
    marks = [node for node in graph if node.domain == DOMAIN]

    def paired(node: Any) -> bool:
        return (
            profile.pairs
            and fits_bytes(qmodel.quantizers[node.attributes["site"].as_string()])
            and not enters_float(node)
        )

    pairs = {node for node in marks if paired(node)}
    wide = {node for node in marks if takes_whole_numbers(node, lambda value: value.producer() in pairs)}
    for node in marks:
        edit = Editor(graph, node)
        site, found = qmodel.graph.sites[edit.site], qmodel.quantizers[edit.site]
        quantizer = found if isinstance(found, Quantizer) else None
        weight = qmodel.weight(site) if site.role == WEIGHT else None
        if weight is not None and quantizer is not None and node.inputs[0].is_initializer():
            put_weight(edit, quantizer, weight.detach(), node in wide)
            continue
        value = put_activation(edit, qmodel.formats[edit.site].kind, quantizer, functions, node in pairs)
        if node in pairs:
            fold_factor(graph, value.producer(), f"{edit.name}/scale_times_factor")
    _tidy(model)


def _tidy(model: Any) -> None:
    """What nothing uses goes, and so do notes of the exporter, which name files of this machine."""
    import onnx_ir.passes.common as common

    model.opset_imports.pop(DOMAIN, None)
    model.graph.opset_imports.pop(DOMAIN, None)
    common.RemoveUnusedNodesPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.doc_string = None
        for key in [k for k in node.metadata_props if not k.startswith("vitq.")]:
            del node.metadata_props[key]
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    model.producer_name, model.producer_version, model.doc_string = "vitq", None, None
    model.graph.doc_string = None
