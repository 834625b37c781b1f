"""One deployment in a process of its own: `python -m vitq.bench.worker FOLDER load RUNTIME FILE [PROVIDER]`.

It loads, runs the smallest batch once, and answers lines of JSON on standard output, one for each on standard input:

    (nothing)                           {load_seconds, before_mb}      once, at the start
    {do: time, batch, calls}            {calls: [[wall, CPU], ...]}    seconds of each
    {do: logits, images, out}           {}                             files; see job.write_images
    {do: memory}                        {peak_mb, device_mb, whole}

or {error}. `python -m vitq.bench.worker FOLDER make STEP` runs a step of makers.MAKERS and answers {} or {error};
`… FOLDER roofline` answers {numbers: billions of operations a second}. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from vitq.bench.job import Job, filled, read_images, write_images
from vitq.core.memory import peak_rss_mb, rss_mb


class Loaded:
    """A runner with its batches."""

    def __init__(self, job: Job, runtime: str, file: str, provider: str) -> None:
        from vitq.bench.runners import RUNTIMES

        self.job, self.images = job, job.images()
        self.fed: dict[int, Any] = {}
        _import_of(runtime)
        self.before_mb = rss_mb()
        start = time.perf_counter()
        self.runner = RUNTIMES[runtime](job, job.path(file), provider)
        self.runner.run(self.batch(job.batches[0]))
        self.load_seconds = time.perf_counter() - start

    def batch(self, size: int) -> Any:
        """A batch as the runtime takes it, made once."""
        if size not in self.fed:
            self.fed[size] = self.runner.feed(filled(self.images, size))
        return self.fed[size]

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What one line asks for."""
        if asked["do"] == "time":
            return {"calls": self.timed(asked["batch"], asked["calls"])}
        if asked["do"] == "logits":
            write_images(Path(asked["out"]), self.logits(read_images(Path(asked["images"]))))
            return {}
        return self.memory()

    def timed(self, size: int, calls: int) -> list[tuple[float, float]]:
        """Seconds of each call on the clock, and of this process's threads on the CPU."""
        fed, found = self.batch(size), []
        for _ in range(calls):
            start, cpu = time.perf_counter(), time.process_time()
            self.runner.run(fed)
            found.append((time.perf_counter() - start, time.process_time() - cpu))
        return found

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W), in whole batches of the largest size."""
        size = self.job.batches[-1]
        parts = []
        for part in images.split(size):
            result = self.runner.run(self.runner.feed(filled(part, size)))
            parts.append(self.runner.logits(result)[: len(part)].clone())
        return torch.cat(parts)

    def memory(self) -> dict[str, Any]:
        """Peaks so far."""
        on_device = getattr(self.runner, "device_mb", lambda: None)()
        whole = getattr(self.runner, "whole_products", lambda: None)()
        return {"peak_mb": peak_rss_mb(), "device_mb": on_device, "whole": whole}


def _import_of(runtime: str) -> None:
    """Import the packages of a runtime, which is no part of loading a model."""
    import importlib

    found = {"onnxruntime": "onnxruntime", "openvino": "openvino", "openvino_bf16": "openvino", "torchao": "torchao"}
    importlib.import_module(found.get(runtime, "torch"))
    if runtime.startswith(("torch", "vitq")):
        importlib.import_module("timm")


def _serve(loaded: Loaded, tell: Callable[[dict[str, Any]], None]) -> None:
    tell({"load_seconds": loaded.load_seconds, "before_mb": loaded.before_mb})
    for line in sys.stdin:
        try:
            tell(loaded.answer(json.loads(line)))
        except Exception as error:
            tell({"error": reason(error)})


def reason(error: BaseException) -> str:
    """Its kind, and its first line."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def main(words: list[str]) -> None:
    """Entry point."""
    answers: IO[str] = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not come among the answers

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    folder, what, *rest = words
    try:
        job = Job.read(folder)
        torch.set_num_threads(job.threads)
        if what == "make":
            from vitq.bench.makers import MAKERS

            MAKERS[rest[0]](job)
            tell({})
        elif what == "roofline":
            from vitq.bench.roofline import roofline

            tell({name: point.gops for name, point in roofline(job.device).items()})
        else:
            loaded = Loaded(job, *rest, *[""] * (3 - len(rest)))
    except Exception as error:
        tell({"error": reason(error)})
        return
    if what == "load":
        _serve(loaded, tell)


if __name__ == "__main__":
    main(sys.argv[1:])
