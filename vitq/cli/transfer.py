"""vitq transfer: how well the features of an artifact serve other data, beside those of its float model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np
import typer

from vitq.artifact import load
from vitq.cli import app as a
from vitq.cli import work
from vitq.cli.console import Say, check_outputs, command, write_json
from vitq.cli.evaluate import float_of, without_calibration
from vitq.core.errors import DataError, InputError
from vitq.data.images import Batch, ImageSet, open_images
from vitq.data.preprocess import Preprocess
from vitq.evaluate.transfer import check
from vitq.evaluate.transfer import transfer as read_features

SHARE = 5  # one of so many images is kept for the test, where no others are named


@a.app.command()
@command
def transfer(
    target: Annotated[str, typer.Argument(metavar="DIR", help="An artifact.")],
    data: Annotated[str, typer.Option(help=f"Labelled images of any classes, to learn from. {a.DATA_HELP}")],
    test: Annotated[
        str | None, typer.Option(help="Labelled images of the same classes, to test on; a fifth of --data without.")
    ] = None,
    checkpoint: a.Checkpoint = None,
    neighbours: Annotated[int, typer.Option(help="How many nearest images vote.")] = 20,
    seed: a.Seed = 0,
    device: a.Device = "auto",
    batch_size: a.BatchSize = 50,
    trust_code: a.TrustCode = False,
    json: a.Json = None,
    quiet: a.Quiet = False,
) -> None:
    """Fit a linear probe and nearest neighbours on frozen features, of the artifact and of its float model.

    The question is whether a quantized model is still as good for other tasks. Features are what goes into the head;
    both models are read alike, on the same images, and the difference is paired.

        vitq transfer out/ --checkpoint deit_tiny.safetensors --data flowers/train --test flowers/test

        vitq transfer out/ --data zoo:fashion_test
    """
    say = Say(quiet)
    check_outputs(json)
    if not work.is_artifact(target):
        raise InputError(f"{target} is no artifact: quantize or train a model first")
    where = work.choose_device(device)
    qmodel = load(target, trust_code=trust_code).to(where)
    preprocess = work.need_preprocess(Preprocess.from_dict(qmodel.preprocess) if qmodel.preprocess else None, target)
    train_images = without_calibration(qmodel, labelled(data), data, say)
    if test is None:
        train_images, test_images = halves(train_images, seed)
    else:
        test_images = without_calibration(qmodel, labelled(test), test, say)
    assert train_images.labels is not None
    assert test_images.labels is not None
    check(train_images.labels, neighbours)
    unknown = set(test_images.labels.tolist()) - set(train_images.labels.tolist())
    if unknown:
        raise DataError(f"among the test images are classes that {data} has not: {sorted(unknown)[:5]}")
    float_model = float_of(qmodel, checkpoint, trust_code, say).to(where)

    def batches(images: ImageSet) -> Iterator[Batch]:
        return images.batches(preprocess, batch_size)

    total = 2 * (len(train_images) + len(test_images))
    with say.task("features of both models", total) as task:
        found = read_features(
            float_model,
            qmodel,
            lambda: batches(train_images),
            lambda: batches(test_images),
            neighbours=neighbours,
            device=where,
            on_batch=task.advance,
        )
    for read in found:
        say.result(
            f"{read.reader}: top-1 {read.top1:.2f} %, float {read.top1_float:.2f} % (difference "
            f"{read.difference.mean:+.2f} [{read.difference.low:+.2f}, {read.difference.high:+.2f}]) on "
            f"{len(test_images)} images, after {len(train_images)}"
        )
    write_json(
        json,
        {
            "model": target,
            "kind": "simulated",
            "data": data,
            "training_images": len(train_images),
            "test_images": len(test_images),
            "seed": seed,
            "readers": [read.to_json() for read in found],
        },
    )


def labelled(data: str) -> ImageSet:
    """Images with labels of whatever classes.

    Raises:
        DataError: no labels, or unreadable images.
    """
    images = open_images(data)
    if images.labels is None:
        raise DataError(f"{data} has no labels; a probe needs class folders, labels.csv or a label column")
    images.check()
    return images


def halves(images: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """Images to learn from and to test on, drawn by the seed.

    Raises:
        DataError: too few for both.
    """
    if len(images) < SHARE:
        raise DataError(f"{len(images)} images are too few to learn from and to test on; give {SHARE} or more")
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    count = len(images) // SHARE
    return images.subset(sorted(order[count:])), images.subset(sorted(order[:count]))
