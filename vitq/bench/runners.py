"""What runs a deployment, in a process of its own: images in, logits out.

Shapes:  images  (B, C, H, W) float32 on the CPU      logits  (B, classes) float32 on the CPU

`feed` puts a batch where, and in the type in which, the runtime takes it; `run` alone is what is timed. It returns when
the result is there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitq.bench.job import Job
from vitq.core.logits import logits_of
from vitq.graph.integer import multiplied


class Runner(Protocol):
    """A deployment that is loaded."""

    def feed(self, images: Tensor) -> Any:
        """A batch as the runtime takes it."""

    def run(self, fed: Any) -> Any:
        """The result, where the runtime leaves it; it is complete."""

    def logits(self, result: Any) -> Tensor:
        """The result as float32 on the CPU."""


class TorchRunner:
    """A module on a device, compiled for each batch size or not."""

    def __init__(self, model: nn.Module, job: Job, dtype: torch.dtype = torch.float32, compiled: bool = False) -> None:
        self.device, self.dtype = torch.device(job.device), dtype
        model = model.to(self.device, dtype).eval()
        self.model: Callable[[Tensor], Any] = torch.compile(model, dynamic=False) if compiled else model

    def feed(self, images: Tensor) -> Tensor:
        return images.to(self.device, self.dtype)

    @torch.no_grad()
    def run(self, fed: Tensor) -> Any:
        result = self.model(fed)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return result

    def logits(self, result: Any) -> Tensor:
        return logits_of(result).float().cpu()

    def device_mb(self) -> float | None:
        """What torch took on the GPU at most, MiB; None on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else None


class CodesRunner(TorchRunner):
    """A compiled artifact, whose linear layers multiply codes where the processor and their formats allow it."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.quantized_model(), job, compiled=True)

    def whole_products(self) -> int:
        """Weights that were multiplied as codes so far."""
        return multiplied()


class OnnxRunner:
    """A file in ONNX Runtime; inputs and outputs stay on the device."""

    def __init__(self, path: Path, job: Job, provider: str = "") -> None:
        import onnxruntime

        device = torch.device(job.device)
        self.device, self.number = device.type, device.index or 0
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, too
        options.intra_op_num_threads = job.threads
        # Its threads would go on spinning while the next deployment is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.device == "cuda":
            on_gpu = [name for name in (provider, "CUDAExecutionProvider") if name]
            providers = [(name, {"device_id": self.number}) for name in on_gpu] + providers
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if wanted not in self.session.get_providers():  # it warns, and goes on with the next one
            raise RuntimeError(f"ONNX Runtime could not start its {wanted}")
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.input, self.output = self.session.get_inputs()[0].name, self.session.get_outputs()[0].name

    def feed(self, images: Tensor) -> Any:
        binding = self.session.io_binding()
        binding.bind_ortvalue_input(self.input, self.value(images.numpy(), self.device, self.number))
        binding.bind_output(self.output, self.device, self.number)
        return binding

    def run(self, fed: Any) -> Any:
        self.session.run_with_iobinding(fed)
        fed.synchronize_outputs()
        return fed

    def logits(self, result: Any) -> Tensor:
        return torch.from_numpy(result.copy_outputs_to_cpu()[0]).float()


class OpenVinoRunner:
    """A model in OpenVINO on the CPU, compiled for each batch size.

    Args:
        precision: what its float products may be of. Unless told, OpenVINO takes bfloat16 where the processor has it.
    """

    def __init__(self, path: Path, job: Job, precision: str = "f32") -> None:
        import openvino

        self.core = openvino.Core()
        self.model = self.core.read_model(str(path))
        self.config = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": job.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.requests: dict[int, Any] = {}

    def feed(self, images: Tensor) -> tuple[Any, Any]:
        size = len(images)
        if size not in self.requests:
            self.model.reshape(list(images.shape))
            self.requests[size] = self.core.compile_model(self.model, "CPU", self.config).create_infer_request()
        return self.requests[size], images.contiguous().numpy()

    def run(self, fed: tuple[Any, Any]) -> Any:
        request, images = fed
        return request.infer([images], share_inputs=True, share_outputs=True)

    def logits(self, result: Any) -> Tensor:
        return torch.from_numpy(result[0].copy()).float()


def load_torchao(job: Job, path: Path) -> TorchRunner:
    """The weights that torchao wrote, in the float model's modules."""
    import torchao  # its tensors become known to torch.load  # noqa: F401

    model = job.float_model()
    model.load_state_dict(torch.load(path, weights_only=True), assign=True)
    return TorchRunner(model, job, compiled=True)


Loader = Callable[[Job, Path, str], Runner]

RUNTIMES: dict[str, Loader] = {
    "torch": lambda job, path, _: TorchRunner(job.float_model(), job),
    "torch_compile": lambda job, path, _: TorchRunner(job.float_model(), job, compiled=True),
    "torch_bf16": lambda job, path, _: TorchRunner(job.float_model(), job, torch.bfloat16),
    "torch_bf16_compile": lambda job, path, _: TorchRunner(job.float_model(), job, torch.bfloat16, compiled=True),
    "vitq": lambda job, path, _: TorchRunner(job.quantized_model(), job),
    "vitq_compile": lambda job, path, _: CodesRunner(job),
    "onnxruntime": lambda job, path, provider: OnnxRunner(path, job, provider),
    "openvino": lambda job, path, _: OpenVinoRunner(path, job),
    "openvino_bf16": lambda job, path, _: OpenVinoRunner(path, job, "bf16"),
    "torchao": lambda job, path, _: load_torchao(job, path),
}
