"""From a marked model to a file: every mark becomes what its site's format is in ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vitq.core.qmodel import QuantModel
from vitq.core.roles import WEIGHT
from vitq.export.edit import Editor
from vitq.export.marked import DOMAIN, OPSET
from vitq.export.place import enters_float, fold_factor, takes_whole_numbers
from vitq.export.signed import Rests, add_rests, sign_operands
from vitq.export.sites import fits_bytes, put_activation
from vitq.export.tables import DOMAIN as FUNCTIONS
from vitq.export.tables import Functions
from vitq.export.weights import put_weight
from vitq.quantizers.base import Quantizer


@dataclass(frozen=True)
class Profile:
    """What a runtime wants.

    Attributes:
        name: as on the command line.
        runtime: which runs the file (runtime.py).
        pairs: activations as QuantizeLinear and DequantizeLinear, placed next to products; else as local functions.
        signed: operands without zero-points, what they lack added behind the product (signed.py), products of two
            dimensions among them, and functions written out, which OpenVINO does not call.
        dynamic: the runtime does the arithmetic of dynamic formats as torch does it, to the bit.
    """

    name: str
    runtime: str
    pairs: bool
    signed: bool = False
    dynamic: bool = True


PROFILES = {
    p.name: p
    for p in (
        Profile("ort", "ort", pairs=True),
        Profile("openvino", "openvino", pairs=True, signed=True, dynamic=False),
        Profile("reference", "ort", pairs=False),
    )
}


def lower_marks(model: Any, qmodel: QuantModel, profile: Profile) -> None:
    """Replace every mark, in place."""
    graph, functions = model.graph, Functions(model, OPSET)
    marks = [node for node in graph if node.domain == DOMAIN]

    def paired(node: Any) -> bool:
        return (
            profile.pairs
            and fits_bytes(qmodel.quantizers[node.attributes["site"].as_string()])
            and not enters_float(node, profile.signed)
        )

    pairs = {node for node in marks if paired(node)}
    wide = {node for node in marks if takes_whole_numbers(node, lambda v: v.producer() in pairs, profile.signed)}
    rests: Rests = {}
    for node in marks:
        edit = Editor(graph, node)
        site, found = qmodel.graph.sites[edit.site], qmodel.quantizers[edit.site]
        quantizer = found if isinstance(found, Quantizer) else None
        weight = qmodel.weight(site) if site.role == WEIGHT else None
        if weight is not None and quantizer is not None and node.inputs[0].is_initializer():
            rests |= put_weight(edit, quantizer, weight.detach(), node in wide, signed=profile.signed)
            continue
        kind = qmodel.formats[edit.site].kind
        value = put_activation(edit, kind, quantizer, functions, node in pairs, alone=profile.signed)
        if node in pairs:
            fold_factor(graph, value, f"{edit.name}/scale_times_factor")
    if profile.signed:
        rests |= sign_operands(graph, qmodel)
        add_rests(graph, rests)
        _write_out_functions(model)
    _tidy(model)


def _write_out_functions(model: Any) -> None:
    """Local functions become the nodes that they are of; an Identity keeps what was noted about their values."""
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    for node in [n for n in model.graph if n.domain == FUNCTIONS]:
        value = node.outputs[0]
        kept = ir.node("Identity", [value], name=f"{node.name}/value", num_outputs=1)
        kept.metadata_props.update(node.metadata_props)
        node.metadata_props.clear()
        ir.convenience.replace_all_uses_with(value, kept.outputs[0], replace_graph_outputs=True)
        kept.replace_input_with(0, value)
        kept.outputs[0].name, kept.outputs[0].shape, kept.outputs[0].dtype = kept.name, value.shape, value.dtype
        model.graph.insert_after(node, kept)
    common.InlinePass()(model)


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
