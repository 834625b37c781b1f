"""The stages of `vitq bench`: files are made, processes started, accuracies and latencies measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vitq.bench.deployments import BASE, INTEGER, PACKED, SIMULATED, Deployment
from vitq.bench.errors import DeploymentError
from vitq.bench.job import Job, write_images
from vitq.bench.process import Running, measure_roofline, run_step
from vitq.bench.result import CPU, WALL, Measured, latencies
from vitq.bench.timing import take_turns
from vitq.cli.console import Say
from vitq.core.errors import VitqError
from vitq.core.qmodel import QuantModel
from vitq.data.images import ImageSet
from vitq.data.preprocess import Preprocess
from vitq.evaluate.metrics import bootstrap_interval, paired_difference, rounded
from vitq.evaluate.predictions import UNKNOWN_LABEL, Predictions
from vitq.export.onnx import export_onnx
from vitq.export.openvino_ir import export_openvino
from vitq.export.runtime import runtime_named

ONNX_FILE = ".onnx"
CHECKED = 8  # images on which an export is compared with the simulated model


@dataclass
class Bench:
    """One run.

    Attributes:
        job: what its processes share.
        deployments: that were asked for.
        not_run: name -> why it was not measured, or no further.
        kinds: name -> (kind, numbers), as far as is known.
        whole: name -> products that were seen to be of whole numbers.
    """

    job: Job
    deployments: list[Deployment]
    say: Say
    not_run: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, tuple[str, str]] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)

    def left(self) -> list[Deployment]:
        """Those that nothing has stopped yet."""
        return [deployment for deployment in self.deployments if deployment.name not in self.not_run]

    def stop(self, name: str, why: str) -> None:
        """Go on without a deployment."""
        self.not_run[name] = why
        self.say.note(f"{name}: {why}")
        if (running := self.running.pop(name, None)) is not None:
            running.end()

    def make(self, qmodel: QuantModel) -> None:
        """Write the files of all deployments; steps that several need, once."""
        for deployment in self.deployments:
            self.kinds[deployment.name] = (deployment.kind, deployment.numbers)
            if missing := deployment.missing(self.job):
                self.not_run[deployment.name] = missing
        done: dict[str, str] = {}
        with self.say.task("making the files of deployments", len(self.left())) as task:
            for deployment in self.left():
                for step in deployment.makes:
                    if step not in done:
                        done[step] = self._failed_step(step)
                    if done[step]:
                        self.stop(deployment.name, f"{step} failed: {done[step]}")
                        break
                else:
                    self._finish(qmodel, deployment)
                task.advance()

    def _failed_step(self, step: str) -> str:
        try:
            run_step(self.job, step)
        except DeploymentError as error:
            return str(error)
        return ""

    def _finish(self, qmodel: QuantModel, deployment: Deployment) -> None:
        """Write the file of vitq's own export, and look at what its runtime makes of a file."""
        path = self.job.path(deployment.file)
        try:
            if deployment.profile:
                images = self.job.images()[:CHECKED]
                if path.suffix == ONNX_FILE:
                    made = export_onnx(qmodel, path, deployment.profile, data=images)
                else:
                    made = export_openvino(qmodel, path, data=images)
                self.whole[deployment.name] = sum(made.products["whole"].values())
            elif deployment.kind == INTEGER and path.suffix == ONNX_FILE:
                found = runtime_named("ort").count_products(path.read_bytes(), None)
                self.whole[deployment.name] = sum(found["whole"].values())
        except VitqError as error:
            self.stop(deployment.name, f"its file cannot be made: {error}")

    def start(self) -> None:
        """Load every deployment in a process of its own, one after the other."""
        with self.say.task("loading", len(self.left())) as task:
            for deployment in self.left():
                try:
                    self.running[deployment.name] = Running(deployment, self.job)
                except DeploymentError as error:
                    self.stop(deployment.name, f"cannot be loaded: {error}")
                task.advance()

    def accuracies(self, images: ImageSet, preprocess: Preprocess) -> dict[str, dict[str, Any]]:
        """Name -> top-1 where there are labels, and agreement with torch's float model, on the same images."""
        size, file = self.job.batches[-1], self.job.path("evaluation.safetensors")
        predicted: dict[str, list[torch.Tensor]] = {name: [] for name in self.running}
        ids: list[str] = []
        with self.say.counted("evaluating", len(images)) as tell:
            for batch in images.batches(preprocess, size):
                write_images(file, batch.images)
                ids += batch.ids
                for name, running in list(self.running.items()):
                    try:
                        logits = running.logits(file)
                        _check(logits, len(batch.images))
                    except DeploymentError as error:
                        self.stop(name, f"fails on images: {error}")
                        continue
                    predicted[name].append(logits.argmax(dim=1))
                tell(len(ids))
        labels = images.labels if images.labels is not None else torch.full((len(ids),), UNKNOWN_LABEL)
        found = {name: Predictions(ids, labels, torch.cat(predicted[name])) for name in self.running}
        return {name: _accuracy(own, found.get(BASE), images.labels is not None) for name, own in found.items()}

    def measure(
        self, rounds: int, seconds: float, macs: int, accuracy: Mapping[str, Mapping[str, Any]]
    ) -> tuple[list[Measured], dict[str, float]]:
        """Latencies in turns, and memory; and the roofline, measured before.

        Raises:
            VitqError: no deployment is left.
        """
        try:
            roofline = measure_roofline(self.job)
        except DeploymentError as error:
            self.say.note(f"no roofline: {error}")
            roofline = {}
        batches = self.job.batches
        with self.say.task("timing", len(self.running) * len(batches) * (rounds + 1)) as task:
            timings = take_turns(self.running, batches, rounds, seconds, on_turn=task.advance)
        for name, why in timings.failed.items():
            self.stop(name, f"fails while it is timed: {why}")
        memory: dict[str, dict[str, Any]] = {}
        for name, running in list(self.running.items()):
            try:
                memory[name] = running.memory()
            except DeploymentError as error:
                self.stop(name, f"fails at the end: {error}")
                continue
            if memory[name]["whole"] is not None:
                self.whole[name] = int(memory[name]["whole"])
            self.kinds[name] = seen_kind(self.running[name].deployment, self.whole.get(name))
        kinds = {name: self.kinds[name] for name in self.running}
        clock = CPU if (self.job.threads, self.job.device) == (1, "cpu") else WALL
        if not kinds:
            raise VitqError("nothing could be measured: " + "; ".join(f"{n}: {why}" for n, why in self.not_run.items()))
        rows = latencies(timings, batches, kinds, roofline, macs, clock)
        return [self._row(running, rows[name], memory[name], accuracy.get(name, {})) for name, running in
                self.running.items()], roofline  # fmt: skip

    def _row(self, running: Running, rows: Any, memory: dict[str, Any], accuracy: Mapping[str, Any]) -> Measured:
        deployment = running.deployment
        kind, numbers = self.kinds[deployment.name]
        peak = float(memory["peak_mb"])
        return Measured(
            deployment, kind, numbers, rows, running.load_seconds, peak, peak - running.before_mb,
            memory["device_mb"], deployment.bytes_on_disk(self.job), accuracy, self.whole.get(deployment.name),
        )  # fmt: skip

    def end(self) -> None:
        """Let all processes end."""
        for running in self.running.values():
            running.end()


def seen_kind(deployment: Deployment, whole: int | None) -> tuple[str, str]:
    """(kind, numbers) of a deployment, as its products turned out to be.

    Args:
        whole: products that were seen to be of whole numbers; None where nobody looked.
    """
    if deployment.kind == INTEGER and whole == 0:
        return (PACKED if deployment.profile else SIMULATED), "float32"
    return deployment.kind, deployment.numbers


def _check(logits: torch.Tensor, count: int) -> None:
    if logits.ndim != 2 or len(logits) != count:
        raise DeploymentError(f"it gives {tuple(logits.shape)} for {count} images, no logits of classes")
    if bool(logits.isnan().any()):
        raise DeploymentError("it gives NaN")


def _accuracy(own: Predictions, base: Predictions | None, labelled: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"images": len(own.ids), "top1": None, "top1_interval": None}
    if labelled:
        found["top1"] = rounded(100 * float(own.correct.double().mean()))
        found["top1_interval"] = [rounded(end) for end in bootstrap_interval(own.correct)]
    if base is not None:
        found["agreement"] = rounded(100 * float((own.predicted == base.predicted).double().mean()))
        if labelled and own is not base:
            found["difference"] = paired_difference(own.correct, base.correct).to_json()
    return found


def table(rows: Sequence[Measured]) -> list[dict[str, object]]:
    """Rows for the screen."""
    told = []
    for row in rows:
        cells: dict[str, object] = {"deployment": row.deployment.name, "kind": row.kind}
        for latency in row.latencies:
            spread = f"{1000 * latency.low:.2f}-{1000 * latency.high:.2f}"
            cells[f"{latency.clock} ms, batch {latency.batch}"] = f"{1000 * latency.seconds:.2f} ({spread})"
            share = latency.of_roofline
            cells[f"roof {latency.batch}"] = "" if share is None else f"{100 * share:.0f} %"
        cells["img/s"] = f"{max(latency.images_per_second for latency in row.latencies):.1f}"
        cells |= {"load s": f"{row.load_seconds:.2f}", "own MiB": f"{row.own_mb:.0f}"}
        cells["MB"] = f"{row.bytes_on_disk / 1e6:.2f}"
        if row.accuracy:
            cells["top-1 %" if row.accuracy["top1"] is not None else "as float %"] = _told(row.accuracy)
        told.append(cells)
    return told


def _told(accuracy: Mapping[str, Any]) -> str:
    if accuracy["top1"] is None:
        return f"{accuracy['agreement']:.2f}" if "agreement" in accuracy else ""
    low, high = accuracy["top1_interval"]
    return f"{accuracy['top1']:.2f} [{low:.2f}, {high:.2f}]"
