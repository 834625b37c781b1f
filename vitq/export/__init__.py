"""Out of vitq: a frozen model as a file that other runtimes run, checked there against the simulated model."""

from vitq.export.onnx import Exported as Exported
from vitq.export.onnx import export_onnx as export_onnx
from vitq.export.openvino_ir import export_openvino as export_openvino
