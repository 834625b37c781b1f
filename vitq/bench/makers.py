"""Steps that write files of deployments: the float model for other runtimes, and what peers make of it.

Each step reads and writes the job's folder, in a process of its own. Peers are used as their own manuals say: min-max
with weights per output channel (ONNX Runtime), the preset for transformers (NNCF), dynamic inputs (torchao).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from vitq.bench.job import CALIBRATION, Job, filled

OPSET = 21  # the same as vitq's export
INPUT, OUTPUT = "images", "output"
FEED = 8  # calibration images at a time


def float_onnx(job: Job) -> None:
    """float.onnx: the float model, of any batch size."""
    import onnx

    model = job.float_model()
    shapes = ({0: torch.export.Dim("batch")},)
    example = filled(job.images(), 2)  # torch.export takes a size of one for a constant
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch warns of its own future
        program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
        names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT]}
        exported: Any = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, **names)
    onnx.save(exported.model_proto, str(job.path("float.onnx")))


def prepared_onnx(job: Job) -> None:
    """prepared.onnx: with shapes inferred and constants folded, as ONNX Runtime's quantizers want it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(job.path("float.onnx")), str(job.path("prepared.onnx")), skip_symbolic_shape=True)


def ort_dynamic(job: Job) -> None:
    """ort_dynamic.onnx: whole-numbered weights, inputs quantized as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    found, out = str(job.path("prepared.onnx")), str(job.path("ort_dynamic.onnx"))
    quantize_dynamic(found, out, weight_type=QuantType.QInt8, per_channel=True)


def ort_static(job: Job) -> None:
    """ort_static.onnx: ranges of activations from the calibration images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(job.images(CALIBRATION).split(FEED))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    quantize_static(
        str(job.path("prepared.onnx")),
        str(job.path("ort_static.onnx")),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def float_xml(job: Job) -> None:
    """float.xml and float.bin: the float model in OpenVINO's own form, weights in float32."""
    import openvino

    model = openvino.Core().read_model(str(job.path("float.onnx")))
    openvino.save_model(model, str(job.path("float.xml")), compress_to_fp16=False)


def nncf(job: Job) -> None:
    """nncf.xml and nncf.bin: SmoothQuant, min-max and bias correction over all calibration images."""
    import nncf as peer
    import openvino

    images = job.images(CALIBRATION)
    made = peer.quantize(
        openvino.Core().read_model(str(job.path("float.onnx"))),
        peer.Dataset([image.numpy() for image in images.split(1)]),
        model_type=peer.ModelType.TRANSFORMER,
        subset_size=len(images),
    )
    openvino.save_model(made, str(job.path("nncf.xml")), compress_to_fp16=False)


def torchao(job: Job) -> None:
    """torchao.pt: int8 weights of linear layers, scales of inputs found as they come."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = job.float_model()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    torch.save(model.state_dict(), job.path("torchao.pt"))


MAKERS: dict[str, Callable[[Job], None]] = {
    "float_onnx": float_onnx,
    "prepared_onnx": prepared_onnx,
    "ort_dynamic": ort_dynamic,
    "ort_static": ort_static,
    "float_xml": float_xml,
    "nncf": nncf,
    "torchao": torchao,
}
