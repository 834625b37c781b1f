"""vitq transfer: how well the features of an artifact serve other data, beside those of its float model."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer

from vitq.artifact import load
from vitq.cli import app as a
from vitq.cli import work
from vitq.cli.console import Say, check_outputs, command, write_json
from vitq.cli.evaluate import float_of, without_calibration
from vitq.core.errors import DataError, InputError
from vitq.data.folder import check_same_classes
from vitq.data.images import ImageSet, without_overlap
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
    skip_bad: a.SkipBad = False,
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
    preprocess = work.preprocess_of(qmodel, target)
    train_images = without_calibration(qmodel, work.labelled(data, None, skip_bad), data, say)
    if test is None:
        train_images, test_images = set_apart(train_images, seed)
    else:
        check_same_classes(data, test)
        test_images = without_calibration(qmodel, work.labelled(test, None, skip_bad), test, say)
        test_images, left_out = without_overlap(train_images, test_images)
        if left_out:
            say.note(f"{len(left_out)} images of {test} are among those of {data}, too; they are left out of the test")
    assert train_images.labels is not None
    assert test_images.labels is not None
    check(train_images.labels, neighbours)
    unknown = set(test_images.labels.tolist()) - set(train_images.labels.tolist())
    if unknown:
        raise DataError(f"among the test images are classes that {data} has not: {sorted(unknown)[:5]}")
    float_model = float_of(qmodel, checkpoint, trust_code, say).to(where)
    with say.task("features of both models", len(train_images) + len(test_images)) as task:
        found = read_features(
            float_model,
            qmodel,
            train_images.batches(preprocess, batch_size, skip_bad=skip_bad),
            test_images.batches(preprocess, batch_size, skip_bad=skip_bad),
            neighbours=neighbours,
            device=where,
            on_batch=task.advance,
        )
    train_images = work.say_skipped(train_images, data, say)
    test_images = work.say_skipped(test_images, test or data, say)
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


def set_apart(images: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """Images to learn from, and one of SHARE to test on, drawn by the seed.

    Raises:
        DataError: too few for both.
    """
    if len(images) < SHARE:
        raise DataError(f"{len(images)} images are too few to learn from and to test on; give {SHARE} or more")
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    count = len(images) // SHARE
    return images.subset(sorted(order[count:])), images.subset(sorted(order[:count]))
