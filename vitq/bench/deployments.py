"""Ways to run a model, each one entry: where it is loaded from, what runs it, and what makes its file.

To add one: an entry here. Its `runtime` is a name of runners.RUNTIMES; its `makes` are names of makers.MAKERS, or its
`profile` is one of vitq's own export, whose file the command line writes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitq.bench.job import ARTIFACT, CALIBRATION, WEIGHTS, Job
from vitq.core.errors import InputError, UnknownNameError

FLOAT, INTEGER, PACKED, SIMULATED = "float", "integer", "packed", "simulated"
BASE = "torch"
ALL = "all"
PACKAGES = {  # what an import needs: how to install it
    "onnx": "pip install 'vitq[onnx]'",
    "onnxscript": "pip install 'vitq[onnx]'",
    "onnxruntime": "pip install 'vitq[onnx]'",
    "openvino": "pip install 'vitq[peers]'",
    "nncf": "pip install 'vitq[peers]'",
    "torchao": "pip install 'vitq[peers]'",
}


@dataclass(frozen=True)
class Deployment:
    """One way to run a model.

    Attributes:
        name: what the command line calls it.
        kind: "float", "integer" (products of whole numbers), "packed" (whole numbers in the file, products in float) or
            "simulated" (no deployment: what an integer run would give, in float).
        numbers: what its products are of, for the roofline: "float32", "bfloat16" or "int8".
        about: what it is, in one line.
        runtime: name of what runs it.
        file: what it is loaded from, in the job's folder.
        makes: steps that write the file, in order; deployments share steps.
        profile: of vitq's export, which writes the file.
        packages: that must be installed.
        calibrated: its steps need calibration images.
        device: "cpu", "cuda", or "" for both.
        provider: of ONNX Runtime, where it is not the device's own.
        environment: of its process.
    """

    name: str
    kind: str
    numbers: str
    about: str
    runtime: str
    file: str
    makes: tuple[str, ...] = ()
    profile: str = ""
    packages: tuple[str, ...] = ()
    calibrated: bool = False
    device: str = ""
    provider: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def missing(self, job: Job) -> str:
        """Why it cannot run here, or ""."""
        if self.device and self.device != job.device.partition(":")[0]:
            return f"runs on {self.device} only (--device {self.device})"
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed: {PACKAGES[package]}"
        if self.provider:
            import onnxruntime

            if self.provider not in onnxruntime.get_available_providers():
                return f"this ONNX Runtime has no {self.provider}: install the build of it that has"
        if self.calibrated and not job.path(CALIBRATION).exists():
            return "is calibrated: name images with --data"
        return ""

    def bytes_on_disk(self, job: Job) -> int:
        """Size of what it is loaded from, bytes."""
        path = job.path(self.file).resolve()
        if path.is_dir():
            return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
        beside = {".xml": [path.with_suffix(".bin")], ".onnx": [Path(f"{path}.data")]}.get(path.suffix, [])
        return sum(part.stat().st_size for part in (path, *beside) if part.is_file())


# A compiled model is loaded as if for the first time: without what an earlier process left in a cache.
COLD = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
ONNX = ("onnx", "onnxscript", "onnxruntime")
OPENVINO = ("onnx", "onnxscript", "openvino")
PREPARED = ("float_onnx", "prepared_onnx")

DEPLOYMENTS: tuple[Deployment, ...] = (
    Deployment(BASE, FLOAT, "float32", "the float model in torch, eager", "torch", WEIGHTS),
    Deployment(
        "torch_compile", FLOAT, "float32", "the float model under torch.compile", "torch_compile", WEIGHTS,
        environment=COLD,
    ),
    Deployment("torch_bf16", FLOAT, "bfloat16", "the float model in bfloat16, eager", "torch_bf16", WEIGHTS),
    Deployment(
        "torch_bf16_compile", FLOAT, "bfloat16", "the float model in bfloat16 under torch.compile",
        "torch_bf16_compile", WEIGHTS, environment=COLD,
    ),
    Deployment(
        "onnxruntime", FLOAT, "float32", "the float model in ONNX Runtime", "onnxruntime", "float.onnx",
        ("float_onnx",), packages=ONNX,
    ),
    Deployment(
        "tensorrt", FLOAT, "float32", "the float model in ONNX Runtime's TensorRT provider", "onnxruntime",
        "float.onnx", ("float_onnx",), packages=ONNX, device="cuda", provider="TensorrtExecutionProvider",
    ),
    Deployment(
        "openvino", FLOAT, "float32", "the float model in OpenVINO", "openvino", "float.xml",
        ("float_onnx", "float_xml"), packages=OPENVINO, device="cpu",
    ),
    Deployment(
        "openvino_bf16", FLOAT, "bfloat16", "the same, allowed to take bfloat16", "openvino_bf16", "float.xml",
        ("float_onnx", "float_xml"), packages=OPENVINO, device="cpu",
    ),
    Deployment("vitq", SIMULATED, "float32", "the artifact in torch, eager", "vitq", ARTIFACT),
    Deployment(
        "vitq_compile", INTEGER, "int8", "the artifact under torch.compile: linear layers multiply codes",
        "vitq_compile", ARTIFACT, device="cpu", environment=COLD,
    ),
    Deployment(
        "vitq_cuda_compile", SIMULATED, "float32", "the artifact under torch.compile on CUDA", "vitq_compile",
        ARTIFACT, device="cuda", environment=COLD,
    ),
    Deployment(
        "vitq_ort", INTEGER, "int8", "the artifact's ONNX file (profile ort) in ONNX Runtime", "onnxruntime",
        "vitq_ort.onnx", profile="ort", packages=ONNX, device="cpu",
    ),
    Deployment(
        "vitq_openvino", INTEGER, "int8", "the artifact's files for OpenVINO (profile openvino)", "openvino",
        "vitq_openvino.xml", profile="openvino", packages=(*ONNX, *OPENVINO), device="cpu",
    ),
    Deployment(
        "ort_dynamic", INTEGER, "int8", "ONNX Runtime's quantize_dynamic of the float model", "onnxruntime",
        "ort_dynamic.onnx", (*PREPARED, "ort_dynamic"), packages=ONNX, device="cpu",
    ),
    Deployment(
        "ort_static", INTEGER, "int8", "ONNX Runtime's quantize_static of it, min-max", "onnxruntime",
        "ort_static.onnx", (*PREPARED, "ort_static"), packages=ONNX, calibrated=True, device="cpu",
    ),
    Deployment(
        "nncf", INTEGER, "int8", "NNCF's quantize for transformers of it, in OpenVINO", "openvino", "nncf.xml",
        ("float_onnx", "nncf"), packages=("nncf", *OPENVINO), device="cpu",
    ),
    Deployment(
        "torchao", INTEGER, "int8", "torchao's int8 weights and dynamic inputs under torch.compile", "torchao",
        "torchao.pt", ("torchao",), packages=("torchao",), device="cpu",
        environment=COLD | {"TORCHINDUCTOR_FREEZING": "1"},
    ),
)  # fmt: skip


def choose(names: Sequence[str], among: Iterable[Deployment] = DEPLOYMENTS) -> list[Deployment]:
    """The deployments of these names, in the registry's order, and the float one that all are compared with.

    Args:
        names: of deployments, or "all".

    Raises:
        UnknownNameError: no such deployment; lists those there are.
        InputError: none is named.
    """
    known = {deployment.name: deployment for deployment in among}
    if not names:
        raise InputError(f"no deployment is named; say {ALL}, or some of {', '.join(known)}")
    for name in names:
        if name not in known and name != ALL:
            raise UnknownNameError("deployment", name, [*known, ALL], f"All of them: {', '.join(known)}; or {ALL}.")
    wanted = set(known) if ALL in names else {*names, BASE}
    return [deployment for name, deployment in known.items() if name in wanted]
