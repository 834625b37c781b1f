"""Models that exist only as ONNX files: the same outputs, the same places to quantize, and refusals."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitq
from vitq.core.errors import ArtifactError, InputError
from vitq.data.source import load_model
from vitq.data.zoo import build_zoo, seeded_images
from vitq.graph.trace import trace

pytest.importorskip("onnx2torch")
ort = pytest.importorskip("onnxruntime")
import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

Nodes = list[Any]


def exported(name: str, path: Path, dynamo: bool, opset: int) -> nn.Module:
    """The zoo model that is written to path."""
    model = build_zoo(name).eval()
    free: dict[str, Any] = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "external_data": False}
        if dynamo
        else {"dynamic_axes": {"images": {0: "batch"}}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter says that it is older
        torch.onnx.export(
            model, (seeded_images(2),), str(path), input_names=["images"], opset_version=opset, dynamo=dynamo, **free
        )
    return model


def by_runtime(path: Path, x: Tensor) -> Tensor:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it takes any power for LayerNorm's
    session = ort.InferenceSession(str(path), options)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("name", ["seeded_vit", "seeded_swin"])
@pytest.mark.parametrize(("dynamo", "opset"), [(False, 14), (False, 17), (True, 18), (True, 20)])
def test_what_exporters_took_apart_is_found_again(name: str, dynamo: bool, opset: int, tmp_path: Path) -> None:
    model = exported(name, tmp_path / "model.onnx", dynamo, opset)
    loaded = load_model(str(tmp_path / "model.onnx"))
    assert loaded.source["kind"] == "onnx"
    assert loaded.preprocess is not None
    assert loaded.preprocess.input_size == (3, 32, 32)
    for count in (1, 3):  # the batch is free
        x = seeded_images(count)
        assert torch.allclose(loaded.model(x), model(x), atol=1e-5)
        assert torch.allclose(loaded.model(x), by_runtime(tmp_path / "model.onnx", x), atol=1e-5)
    found, wanted = trace(loaded.model, seeded_images(2)), trace(model, seeded_images(2))
    assert Counter(site.role for site in found.sites.values()) == Counter(site.role for site in wanted.sites.values())
    assert len(found.blocks) == len(wanted.blocks) > 1
    assert {loaded.model.get_submodule(block).__class__.__name__ for block in found.blocks} == {"Block"}


def test_recipes_do_the_same_with_the_file_as_with_the_model(tmp_path: Path) -> None:
    model, images = exported("seeded_vit", tmp_path / "model.onnx", False, 17), seeded_images(8)
    loaded = load_model(str(tmp_path / "model.onnx"))
    float_outputs = model(images)
    for recipe in ("repq_vit", "apq_vit"):  # one needs norms beside products, the other blocks
        ours, theirs = (vitq.quantize(m, recipe, "w8a8", data=images) for m in (loaded.model, model))
        assert len(ours.rewrites) == len(theirs.rewrites)
        error = (ours(images) - float_outputs).norm() / float_outputs.norm()
        assert error < 1.5 * (theirs(images) - float_outputs).norm() / float_outputs.norm()


def test_an_artifact_builds_the_model_from_the_file_again(tmp_path: Path) -> None:
    exported("seeded_vit", tmp_path / "model.onnx", False, 17)
    loaded = load_model(str(tmp_path / "model.onnx"))
    qmodel = vitq.quantize(loaded.model, "minmax", "w4a4", data=seeded_images(4))
    qmodel.source = loaded.source
    vitq.save(qmodel, tmp_path / "out")
    again = vitq.load(tmp_path / "out")
    assert torch.equal(again(seeded_images(3)), qmodel(seeded_images(3)))
    exported("seeded_vit", tmp_path / "model.onnx", False, 14)
    with pytest.raises(ArtifactError, match="is not the file it was"):
        vitq.load(tmp_path / "out")
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"no file .*model=") as told:
        vitq.load(tmp_path / "out")
    assert "model.onnx" in str(told.value)


def written(path: Path, nodes: Nodes, constants: dict[str, Any], shape: tuple[int, ...], opset: int = 17) -> Path:
    """A graph from x to y."""
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (None, *shape[1:])) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(model, path)
    return path


def kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


N = helper.make_node
WIDE = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
ROW = WIDE[0] + 2
ONE = {"one": np.float32(1), "half": np.float32(0.5), "root": np.float32(np.sqrt(2)), "two": np.float32(2)}


def norm(square: Nodes, axes: list[int]) -> Nodes:
    return [
        N("ReduceMean", ["x"], ["m"], axes=axes), N("Sub", ["x", "m"], ["d"]), *square,
        N("ReduceMean", ["s"], ["v"], axes=axes), N("Add", ["v", "eps"], ["e"]), N("Sqrt", ["e"], ["r"]),
        N("Div", ["d", "r"], ["n"]), N("Mul", ["g", "n"], ["w"]), N("Add", ["w", "b"], ["y"]),
    ]  # fmt: skip


ERF = [N("Div", ["x", "root"], ["a"]), N("Erf", ["a"], ["f"]), N("Add", ["one", "f"], ["p"])]
SCALES = {"g": ROW, "b": ROW - 1, "eps": np.float32(1e-5), "two": np.float32(2)}
GRAPHS: dict[str, tuple[Nodes, dict[str, Any], str]] = {
    "norm by power": (norm([N("Pow", ["d", "two"], ["s"])], [-1]), SCALES, "LayerNorm"),
    "norm by product": (norm([N("Mul", ["d", "d"], ["s"])], [2]), SCALES, "LayerNorm"),
    "norm over another axis": (norm([N("Mul", ["d", "d"], ["s"])], [1]), SCALES, ""),
    "norm by a third power": (norm([N("Pow", ["d", "two"], ["s"])], [-1]), SCALES | {"two": np.float32(4)}, ""),
    "gelu halved last": ([*ERF, N("Mul", ["p", "x"], ["q"]), N("Mul", ["q", "half"], ["y"])], ONE, "GELU"),
    "gelu halved first": ([*ERF, N("Mul", ["x", "half"], ["q"]), N("Mul", ["q", "p"], ["y"])], ONE, "GELU"),
    "gelu halved inside": ([*ERF, N("Mul", ["half", "p"], ["q"]), N("Mul", ["x", "q"], ["y"])], ONE, "GELU"),
    "not a gelu": (
        [*ERF, N("Mul", ["half", "p"], ["q"]), N("Mul", ["x", "q"], ["y"])], ONE | {"root": np.float32(1.5)}, "",
    ),
    "product and bias": (
        [N("MatMul", ["x", "w"], ["p"]), N("Add", ["b", "p"], ["y"])], {"w": WIDE, "b": ROW}, "Linear",
    ),
    "product": ([N("MatMul", ["x", "w"], ["y"])], {"w": WIDE}, "Linear"),
    "product of a constant on the left": ([N("MatMul", ["w", "x"], ["y"])], {"w": WIDE[:5, :5]}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_patterns_are_taken_where_they_hold_and_nowhere_else(name: str, tmp_path: Path) -> None:
    nodes, constants, kind = GRAPHS[name]
    path = written(tmp_path / "graph.onnx", nodes, constants, (2, 5, 6))
    model = load_model(str(path)).model
    x = torch.randn(3, 5, 6)
    assert torch.allclose(model(x), by_runtime(path, x), atol=1e-5)
    assert {"LayerNorm", "GELU", "Linear"} & kinds(model) == ({kind} if kind else set())


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [([1], [4], [2], [1]), ([-1], [-100], [2], [-1]), ([0, 1], [2**62, -1], [2, 1], [2, 1]), ([4], [0], [-2], [-2])],
)
def test_slices_are_those_of_the_runtime(
    starts: list[int], ends: list[int], axes: list[int], steps: list[int], tmp_path: Path
) -> None:
    given = {name: np.asarray(value) for name, value in
             (("starts", starts), ("ends", ends), ("axes", axes), ("steps", steps))}  # fmt: skip
    nodes = [N("Slice", ["x", *given], ["c"]), N("Identity", ["c"], ["y"])]
    path = written(tmp_path / "graph.onnx", nodes, given, (2, 5, 6))
    x = torch.randn(3, 5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runtime's, of the shape that the file tells
        wanted = by_runtime(path, x)
    assert torch.equal(load_model(str(path)).model(x), wanted)


def two_inputs(path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (None, 6)) for name in ("x", "z", "y")]
    graph = helper.make_graph([N("Add", ["x", "z"], ["y"])], "graph", ends[:2], ends[2:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def fixed(path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (4, 6)) for name in ("x", "y")]
    graph = helper.make_graph([N("Erf", ["x"], ["y"])], "graph", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def quantized(path: Path) -> None:
    nodes = [N("QuantizeLinear", ["x", "s"], ["q"]), N("DequantizeLinear", ["q", "s"], ["y"])]
    written(path, nodes, {"s": np.float32(0.1)}, (1, 6))


def unknown(path: Path) -> None:
    written(path, [N("Det", ["x"], ["y"])], {}, (2, 6, 6))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "no file"),
    "no model": (lambda path: path.write_bytes(b"hello"), "is not a usable ONNX model"),
    "quantized": (quantized, r"is quantized already \(it has DequantizeLinear, QuantizeLinear\)"),
    "two inputs": (two_inputs, r"has 2 inputs \(x, z\)"),
    "fixed batch": (fixed, "takes 4 images at a time; export it with a free batch size"),
    "unknown operator": (unknown, "cannot be converted to PyTorch: .*Det.*; export it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_files_are_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    make, told = REFUSED[name]
    make(tmp_path / "model.onnx")
    with pytest.raises(InputError, match=told):
        load_model(str(tmp_path / "model.onnx"))
