"""What tests of the export share: one site alone in a graph, and a small model that was exported once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitq
from vitq.core.qmodel import QuantModel
from vitq.data.zoo import build_zoo, seeded_images
from vitq.export.edit import Editor
from vitq.export.lower import PROFILES
from vitq.export.marked import DOMAIN, OPSET
from vitq.export.onnx import Exported, export_onnx
from vitq.export.parity import Parity, check_parity
from vitq.export.runtime import runtime_named
from vitq.export.sites import fits_bytes, put_activation
from vitq.export.tables import Functions
from vitq.export.weights import put_weight
from vitq.quantizers.base import Quantizer

SITE = "place:op0.input"


def one_mark(shape: tuple[int, ...], weight: np.ndarray[Any, Any] | None = None) -> Any:
    """A model whose output is one marked value: its input, or an initializer."""
    import onnx_ir as ir

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    if weight is not None:
        x.const_value = ir.tensor(weight, name="x")
    node = ir.node("Site", [x], {"site": SITE, "use": 0}, domain=DOMAIN, name="mark")
    out = node.outputs[0]
    out.name, out.type, out.shape = "marked", ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    inputs, initializers = ([x], []) if weight is None else ([], [x])
    graph = ir.Graph(inputs, [out], nodes=[node], initializers=initializers, opset_imports={"": OPSET}, name="one")
    return ir.Model(graph, ir_version=10)


def run_alone(model: Any, feeds: dict[str, Any], profile: str = "ort") -> Tensor:
    import onnx
    import onnx_ir as ir

    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    (value,) = runtime_named(PROFILES[profile].runtime).session(proto.SerializeToString()).run(feeds).values()
    return value


@pytest.fixture(scope="session")
def through_file() -> Callable[..., Tensor]:
    """(quantizer, x, profile) -> what a file makes of x at a site of that format."""

    def run(quantizer: Quantizer, x: Tensor, profile: str = "ort") -> Tensor:
        model = one_mark(tuple(x.shape))
        mark = model.graph.node(0)
        paired = PROFILES[profile].pairs and fits_bytes(quantizer)
        put_activation(Editor(model.graph, mark), "format", quantizer, Functions(model, OPSET), paired)
        return run_alone(model, {"x": x.numpy()})

    return run


@pytest.fixture(scope="session")
def weight_through_file() -> Callable[..., tuple[Tensor, Any]]:
    """(quantizer, weight, whole) -> what a file makes of a weight's codes, and the type that they have."""

    def run(quantizer: Quantizer, weight: Tensor, whole: bool) -> tuple[Tensor, Any]:
        model = one_mark(tuple(weight.shape), weight.numpy())
        put_weight(Editor(model.graph, model.graph.node(0)), quantizer, weight, whole)
        codes = model.graph.initializers.get(f"{SITE}/codes")
        model.graph.initializers.pop("x")
        return run_alone(model, {}), None if codes is None else codes.dtype.name

    return run


@dataclass(frozen=True)
class Small:
    """An exported model of one block."""

    qmodel: QuantModel
    images: Tensor
    made: Exported

    @property
    def data(self) -> bytes:
        return self.made.path.read_bytes()

    def check(self, data: bytes) -> Parity:
        """Parity of a file, in the runtime of the profile that the small one is of."""
        runtime = runtime_named(PROFILES[self.made.profile].runtime)
        return check_parity(self.qmodel, data, self.images, "these", runtime)


def small_model() -> Any:
    """zoo:seeded_vit with one block."""
    model = build_zoo("seeded_vit")
    model.blocks = model.blocks[:1]
    return model


@pytest.fixture(scope="session")
def small_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Small]:
    """profile -> one block, log formats and folded channels, w4a4."""

    @cache
    def make(profile: str) -> Small:
        if profile == "openvino":
            pytest.importorskip("openvino")
        images = seeded_images(8)
        qmodel = vitq.quantize(small_model(), "repq_vit", "w4a4", images)
        file = tmp_path_factory.mktemp("small") / "m.onnx"
        with torch.random.fork_rng():
            made = export_onnx(qmodel, file, profile, data=images, described="seeded images")
        return Small(qmodel, images, made)

    return make


@pytest.fixture
def small(small_for: Callable[[str], Small]) -> Small:
    """For ONNX Runtime."""
    return small_for("ort")


@pytest.fixture(params=["ort", "openvino"])
def either(request: pytest.FixtureRequest, small_for: Callable[[str], Small]) -> Small:
    """For each runtime."""
    return small_for(request.param)
