"""vitq bench: an artifact where it runs, beside float and beside what peers make of the same model."""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from vitq.artifact import load
from vitq.bench.deployments import ALL, DEPLOYMENTS, choose
from vitq.bench.job import ARTIFACT, CALIBRATION, IMAGES, WEIGHTS, Job, filled, write_images, write_weights
from vitq.bench.result import CPU, Measured
from vitq.cli import app as a
from vitq.cli import work
from vitq.cli.bench_run import Bench, table
from vitq.cli.console import Say, check_outputs, command, write_json
from vitq.cli.evaluate import float_of, without_calibration
from vitq.core.batches import example_from
from vitq.core.errors import InputError
from vitq.core.qmodel import QuantModel
from vitq.data.images import ImageSet, open_images
from vitq.data.preprocess import Preprocess
from vitq.evaluate.cost import count_macs
from vitq.evaluate.machine import commit, machine
from vitq.report.bench_plot import Place, accuracy_latency, need_matplotlib
from vitq.report.plot import write as write_figure

SAMPLE = 32  # calibration images for peers, where those of the artifact are not among --data
BUSY = 1.2  # seconds on the clock over those on the processor; 1 where nothing else runs
NAMES = ", ".join(deployment.name for deployment in DEPLOYMENTS)


@a.app.command()
@command
def bench(
    target: Annotated[str, typer.Argument(metavar="DIR", help="An artifact.")],
    eval_data: Annotated[
        str | None,
        typer.Option(
            "--eval", help=f"Images to measure accuracy on; agreement with float, without labels. {a.DATA_HELP}"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to calibrate peers on: the very ones of the artifact where they are among these, else "
            f"{SAMPLE} of them."
        ),
    ] = None,
    checkpoint: a.Checkpoint = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Images of a call. Repeatable; 1 and 16 unless given.")
    ] = None,
    deployments: Annotated[str, typer.Option(help=f"{ALL}, or names with commas between: {NAMES}.")] = ALL,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every deployment; fewer than 5 give no verdict.")] = 15,
    seconds: Annotated[float, typer.Option(min=0.0, help="Least time of a turn: calls are repeated until then.")] = 0.2,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of every runtime on the CPU; as many as torch takes unless given.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images of --eval, by the seed 0.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of accuracy against latency, .png or .svg.")] = None,
    trust_code: a.TrustCode = False,
    json: a.Json = None,
    quiet: a.Quiet = False,
) -> None:
    """Measure latency, throughput, load time, memory, size and accuracy of an artifact where it runs.

    Beside it: the float model in torch, ONNX Runtime and OpenVINO, and the int8 that ONNX Runtime, NNCF and torchao
    make of it. Each runs in a process of its own; they take turns, so that whatever else the machine does meets all
    alike. What cannot run here is listed with the reason, and what fails does not stop the others.

    The verdict is faster, same or slower than float, with an interval over rounds; unclear asks for more rounds. What
    is simulated (the values of whole numbers, in float32) is no deployment and is never called fast.

        vitq bench out/ --checkpoint deit_tiny.safetensors --data calib/ --eval val/ --json bench.json --plot bench.png

        vitq bench out/ --deployments vitq_ort,onnxruntime --batch 1 --batch 8 --threads 1
    """
    say = Say(quiet)
    check_outputs(json, plot)
    batches = tuple(sorted(set(batch or (1, 16))))
    if batches[0] < 1:
        raise InputError(f"--batch {batches[0]}: a call needs at least one image")
    if plot is not None:
        need_matplotlib()
        if eval_data is None:
            raise InputError("--plot shows accuracy against latency: name images with --eval")
    chosen = choose([name.strip() for name in deployments.split(",") if name.strip()])
    where = work.choose_device(device)
    if not work.is_artifact(target):
        raise InputError(f"{target} is no artifact: quantize or train a model first")
    qmodel = load(target, trust_code=trust_code)
    preprocess = work.preprocess_of(qmodel, target)
    if not (isinstance(qmodel.example, dict) and "tensor" in qmodel.example):
        raise InputError(f"{target} does not take one tensor of images, which is what bench can feed")
    scored = _scored(qmodel, eval_data, limit, say) if eval_data is not None else None
    calibration = _calibration(qmodel, data, say) if data is not None else None
    model = float_of(qmodel, checkpoint, trust_code, say)
    facts = machine() | {"commit": commit()}
    with tempfile.TemporaryDirectory(prefix="vitq.") as folder:
        count = threads or torch.get_num_threads()
        job = Job(str(Path(folder).resolve()), dict(qmodel.source or {}), trust_code, count, str(where), batches)
        job.write()
        job.path(ARTIFACT).symlink_to(Path(target).resolve(), target_is_directory=True)
        write_weights(job.path(WEIGHTS), model)
        images = _images(qmodel, preprocess, scored, calibration, batches[-1])
        write_images(job.path(IMAGES), images)
        if calibration is not None:
            write_images(job.path(CALIBRATION), calibration.tensor(preprocess))
        with torch.no_grad():
            macs = count_macs(partial(model, images[:1]))
        run = Bench(job, chosen, say)
        try:
            run.make(qmodel)
            run.start()
            accuracy = run.accuracies(scored, preprocess) if scored is not None else {}
            rows, roofline = run.measure(rounds, seconds, macs, accuracy)
        finally:
            run.end()
    facts |= {"threads": count, "device": str(where), "load_after": machine()["load_before"]}
    _tell(rows, run.not_run, facts, roofline, say)
    result = {
        "model": target,
        "machine": facts,
        "rounds": rounds,
        "seconds_per_turn": seconds,
        "batches": list(batches),
        "macs": macs,
        "roofline_gops": roofline,
        "evaluation": Path(eval_data).name if eval_data is not None else None,
        "deployments": [row.to_json() for row in rows],
        "not_run": run.not_run,
    }
    if plot is not None:
        _draw(rows, plot, Path(target).name, say)
    write_json(json, result)


def _scored(qmodel: QuantModel, data: str, limit: int | None, say: Say) -> ImageSet:
    """The images of the evaluation, without those that were calibrated on."""
    classes = (qmodel.source or {}).get("num_classes")
    images = open_images(data, num_classes=classes if isinstance(classes, int) else None)
    images.check()
    images = without_calibration(qmodel, images, data, say)
    return images.sample(limit, seed=0) if limit is not None and limit < len(images) else images


def _calibration(qmodel: QuantModel, data: str, say: Say) -> ImageSet:
    """The images that the artifact was calibrated on, where they are among these."""
    images = open_images(data, labels="none")
    images.check()
    unseen = set(work.not_calibrated(qmodel, images))
    seen = [position for position in range(len(images)) if position not in unseen]
    if len(seen) == len(qmodel.provenance.get("calibration_sha256", ())) > 0:
        say.note(f"peers are calibrated on the {len(seen)} images that the artifact was calibrated on")
        return images.subset(seen)
    count = min(SAMPLE, len(images))
    say.note(f"the images that the artifact was calibrated on are not all in {data}; peers get {count} of it")
    return images.sample(count, seed=0)


def _images(
    qmodel: QuantModel, preprocess: Preprocess, scored: ImageSet | None, calibration: ImageSet | None, count: int
) -> Tensor:
    """What is fed while it is timed: images that there are, else random ones."""
    found = scored if scored is not None else calibration
    if found is not None:
        return filled(found.subset(range(min(count, len(found)))).tensor(preprocess), count)
    assert isinstance(qmodel.example, dict)
    _, *shape = qmodel.example["tensor"]
    images: Tensor = example_from({"tensor": [count, *shape], "dtype": qmodel.example["dtype"]})
    return images


def _tell(
    rows: list[Measured], not_run: dict[str, str], facts: dict[str, Any], roofline: dict[str, float], say: Say
) -> None:
    say.table(table(rows))
    for row in rows:
        say.result(f"{row.deployment.name} ({row.kind}): {row.verdict}")
    for name, why in not_run.items():
        say.result(f"{name}: not measured: {why}")
    peaks = ", ".join(f"{numbers} {gops:.0f}" for numbers, gops in roofline.items())
    load = f"load {facts['load_before']} before and {facts['load_after']} after"
    say.result(f"{facts['cpu']}, {facts['threads']} threads, {load}")
    say.result(f"roofline, billions of operations a second: {peaks or 'not measured'}")
    slowed = [one.wall / one.cpu for row in rows for one in row.latencies if one.clock == CPU and one.cpu > 0]
    if slowed and (busy := statistics.median(slowed)) > BUSY:
        say.result(f"the machine was busy: calls took {busy:.1f} times as long as they had the processor")


def _draw(rows: list[Measured], plot: Path, title: str, say: Say) -> None:
    labelled = all(row.accuracy["top1"] is not None for row in rows)
    if not labelled and any("agreement" not in row.accuracy for row in rows):
        say.note("no plot: there are no labels, and no float model of torch to agree with")
        return
    places = []
    for row in rows:
        value = row.accuracy["top1"] if labelled else row.accuracy["agreement"]
        low, high = row.accuracy["top1_interval"] if labelled else (value, value)
        for latency in row.latencies:
            ms = [1000 * found for found in (latency.seconds, latency.low, latency.high)]
            name, kind = row.deployment.name, row.kind
            places.append(Place(name, kind, latency.batch, ms[0], ms[1], ms[2], value, low, high))
    measure = "top-1, %" if labelled else "predicts as torch's float model, %"
    write_figure(accuracy_latency(places, measure, title), plot)
    say.note(f"plot in {plot}")
