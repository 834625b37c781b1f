"""The other side of worker.py: starts its processes, asks them, and says why one ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from torch import Tensor

from vitq.bench.deployments import Deployment
from vitq.bench.errors import DeploymentError
from vitq.bench.job import Job, read_images
from vitq.bench.timing import Call

TAIL = 2000  # characters of what a process printed that are looked at
SECONDS_TO_END = 10


class Process:
    """One worker; ends with its context.

    Args:
        words: what it is to do, after the folder.
    """

    def __init__(self, job: Job, words: list[str], environment: dict[str, str] | None = None) -> None:
        threads = {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self.printed: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vitq.bench.worker", job.folder, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.printed,
            text=True,
            env=os.environ | threads | (environment or {}),
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def ask(self, question: dict[str, Any] | None = None) -> dict[str, Any]:
        """One answer, after a question or without one.

        Raises:
            DeploymentError: it answers with an error, or has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            if question is not None:
                self.process.stdin.write(json.dumps(question) + "\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise DeploymentError(self._why())
        answer = cast(dict[str, Any], json.loads(line))
        if "error" in answer:
            raise DeploymentError(str(answer["error"]))
        return answer

    def _why(self) -> str:
        code = self.process.wait()
        self.printed.seek(0, os.SEEK_END)
        self.printed.seek(max(self.printed.tell() - TAIL, 0))
        lines = [line.strip() for line in self.printed.read().decode(errors="replace").splitlines() if line.strip()]
        ended = f"its process was ended by signal {-code}" if code < 0 else f"its process ended with exit code {code}"
        return ended + (f": {lines[-1]}" if lines else "")

    def end(self) -> None:
        """Let it end, or end it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.close()
            self.process.wait(SECONDS_TO_END)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        finally:
            self.process.stdout.close()
            self.printed.close()


class Running:
    """A deployment that is loaded in its own process.

    Attributes:
        load_seconds: from its files to the first result at the smallest batch; packages were imported before.
        before_mb: memory of the process before that, MiB.

    Raises:
        DeploymentError: it cannot be loaded or run.
    """

    def __init__(self, deployment: Deployment, job: Job) -> None:
        words = ["load", deployment.runtime, deployment.file, deployment.provider]
        self.deployment, self.job = deployment, job
        self.process = Process(job, words, deployment.environment)
        try:
            first = self.process.ask()
        except BaseException:
            self.process.end()
            raise
        self.load_seconds, self.before_mb = float(first["load_seconds"]), float(first["before_mb"])

    def time(self, batch: int, calls: int) -> list[Call]:
        """Each call on a batch of that size."""
        answer = self.process.ask({"do": "time", "batch": batch, "calls": calls})
        return [(float(wall), float(cpu)) for wall, cpu in answer["calls"]]

    def logits(self, images: Path) -> Tensor:
        """Logits (N, classes) float32 of the images in a file of `write_images`."""
        out = self.job.path(f"logits_{self.deployment.name}.safetensors")
        self.process.ask({"do": "logits", "images": str(images), "out": str(out)})
        return read_images(out)

    def memory(self) -> dict[str, Any]:
        """`peak_mb` of the process so far, `device_mb` on the GPU, `whole` weights that were multiplied as codes."""
        return self.process.ask({"do": "memory"})

    def end(self) -> None:
        """Let the process end."""
        self.process.end()


def run_step(job: Job, step: str) -> None:
    """Run a step of makers.MAKERS in its own process.

    Raises:
        DeploymentError: it failed.
    """
    with Process(job, ["make", step]) as process:
        process.ask()


def measure_roofline(job: Job) -> dict[str, float]:
    """Numbers -> billions of operations a second of the quickest matrix product, in its own process.

    Raises:
        DeploymentError: it failed.
    """
    with Process(job, ["roofline"]) as process:
        return {name: float(value) for name, value in process.ask().items()}
