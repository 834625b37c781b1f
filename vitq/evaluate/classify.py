"""Top-1 and top-5 of one classifier, or of a float one and its quantized copy in one run.

Shapes:  images  (B, C, H, W) float, already preprocessed      labels  (B,) int64      logits  (B, classes)
Units:   top-1, top-5, agreement and interval ends in percent; recovery is a ratio; logit KL in nats
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitq.core.errors import DataError, InputError, VitqError
from vitq.core.logits import logits_of
from vitq.evaluate.metrics import (
    PairedDifference,
    bootstrap_interval,
    logit_kl,
    paired_difference,
    rounded,
    rounded_small,
    topk_correct,
)
from vitq.evaluate.predictions import UNKNOWN_LABEL, Predictions

Model = Callable[[Tensor], object]
# PairResult has a field named float, which hides the builtin in its annotations.
Number = float


class Batch(Protocol):
    """What is needed of a batch: images (B, C, H, W), labels (B,) or None, and B ids."""

    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def ids(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class ClassifyResult:
    """How one model classifies. Without labels, top1, top5 and top1_interval are None.

    Attributes:
        images: how many.
        top1, top5: percent; with fewer than 5 classes, top5 counts all of them.
        top1_interval: 95 % percentile bootstrap over images, percent.
        predictions: image by image.
        logits: float32 (images, classes) on the CPU, if they were to be kept.
    """

    images: int
    top1: float | None
    top5: float | None
    top1_interval: tuple[float, float] | None
    predictions: Predictions
    logits: Tensor | None = None

    def to_json(self) -> dict[str, Any]:
        interval = self.top1_interval
        return {
            "images": self.images,
            "top1": rounded(self.top1),
            "top5": rounded(self.top5),
            "top1_interval": interval and [rounded(end) for end in interval],
        }


@dataclass(frozen=True)
class PairResult:
    """A float model and its quantized copy on the same images.

    Attributes:
        float, quantized: each on its own.
        recovery: quantized top-1 / float top-1; None without labels, or where float is 0.
        agreement: percent of the images on which both predict the same class.
        logit_kl: mean over images of KL(float || quantized) of the class probabilities, nats.
        difference: quantized minus float, percentage points; None without labels.
    """

    float: ClassifyResult
    quantized: ClassifyResult
    recovery: Number | None
    agreement: Number
    logit_kl: Number
    difference: PairedDifference | None

    def to_json(self) -> dict[str, Any]:
        return {
            **self.quantized.to_json(),
            **{f"{key}_float": value for key, value in self.float.to_json().items() if key != "images"},
            "recovery": rounded(self.recovery),
            "agreement": rounded(self.agreement),
            "logit_kl": rounded_small(self.logit_kl),
            "difference": self.difference and self.difference.to_json(),
        }


def evaluate_classifier(
    model: Model,
    batches: Iterable[Batch],
    *,
    on_batch: Callable[[int], None] | None = None,
    device: str | torch.device = "cpu",
    keep_logits: bool = False,
) -> ClassifyResult:
    """Run the model in evaluation mode over all batches; its training flags are put back after.

    Args:
        model: takes images; its output must be understood by `logits_of`. Must be on `device`.
        batches: all with labels, or all without.
        on_batch: called after each batch with the number of images done so far.

    Raises:
        DataError: no images, an id occurs twice, or labels that do not fit images or classes.
        VitqError: NaN or +Inf logits; names the first image that has them.
        InputError: an output that holds no (B, classes) logits.
    """
    tally = _Tally(keep_logits)
    with evaluating(model):
        for batch in batches:
            tally.add(batch, _logits(model, batch, device, "the model"))
            if on_batch is not None:
                on_batch(len(tally.ids))
    return tally.result()


def evaluate_pair(
    float_model: Model,
    quantized_model: Model,
    batches: Iterable[Batch],
    *,
    on_batch: Callable[[int], None] | None = None,
    device: str | torch.device = "cpu",
    keep_logits: bool = False,
) -> PairResult:
    """Evaluate both models in one run: every batch goes through both, so data cannot differ.

    Arguments and errors as in `evaluate_classifier`; on_batch counts each image once.
    """
    first, second = _Tally(keep_logits), _Tally(keep_logits)
    kl_sum = 0.0
    with evaluating(float_model), evaluating(quantized_model):
        for batch in batches:
            expected = _logits(float_model, batch, device, "the float model")
            logits = _logits(quantized_model, batch, device, "the quantized model")
            if logits.shape != expected.shape:
                raise InputError(
                    f"the float model has {expected.shape[1]} classes, the quantized one {logits.shape[1]}."
                )
            first.add(batch, expected)
            second.add(batch, logits)
            kl_sum += float(logit_kl(expected, logits).sum())
            if on_batch is not None:
                on_batch(len(first.ids))
    reference, quantized = first.result(), second.result()
    a, b = quantized.predictions, reference.predictions
    return PairResult(
        float=reference,
        quantized=quantized,
        recovery=quantized.top1 / reference.top1 if quantized.top1 is not None and reference.top1 else None,
        agreement=100 * float((a.predicted == b.predicted).double().mean()),
        logit_kl=kl_sum / quantized.images,
        difference=paired_difference(a.correct, b.correct) if first.labelled else None,
    )


@dataclass
class _Tally:
    """What is kept of each batch, on the CPU."""

    keep_logits: bool
    labelled: bool = False
    ids: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    labels: list[Tensor] = field(default_factory=list)
    predicted: list[Tensor] = field(default_factory=list)
    top5: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def add(self, batch: Batch, logits: Tensor) -> None:
        labelled = batch.labels is not None
        if self.ids and labelled != self.labelled:
            raise DataError("some batches have labels and others have none; give all of them, or none.")
        self.labelled = labelled
        for each in batch.ids:
            if each in self.seen:
                raise DataError(f"image {each!r} occurs twice in the evaluation data.")
            self.seen.add(each)
        if batch.labels is None:
            self.labels.append(torch.full((len(logits),), UNKNOWN_LABEL))
        else:
            labels = batch.labels.cpu().long()
            _check_labels(labels, logits.shape[1], batch.ids)
            self.labels.append(labels)
            self.top5.append(topk_correct(logits, labels, min(5, logits.shape[1])))
        self.ids.extend(batch.ids)
        self.predicted.append(logits.argmax(dim=1))
        if self.keep_logits:
            self.logits.append(logits)

    def result(self) -> ClassifyResult:
        if not self.ids:
            raise DataError("there are no images to evaluate on.")
        predictions = Predictions(self.ids, torch.cat(self.labels), torch.cat(self.predicted))
        correct = predictions.correct
        return ClassifyResult(
            images=len(self.ids),
            top1=100 * float(correct.double().mean()) if self.labelled else None,
            top5=100 * float(torch.cat(self.top5).double().mean()) if self.labelled else None,
            top1_interval=bootstrap_interval(correct) if self.labelled else None,
            predictions=predictions,
            logits=torch.cat(self.logits) if self.keep_logits else None,
        )


def _logits(model: Model, batch: Batch, device: str | torch.device, name: str) -> Tensor:
    """Logits of one batch, float32 (B, classes) on the CPU, checked."""
    count = len(batch.images)
    if len(batch.ids) != count or (batch.labels is not None and batch.labels.shape != (count,)):
        labels = "no labels" if batch.labels is None else f"labels of shape {tuple(batch.labels.shape)}"
        raise DataError(f"a batch of {count} images has {len(batch.ids)} ids and {labels}.")
    logits = logits_of(model(batch.images.to(device)))
    if logits.ndim != 2 or len(logits) != count or not logits.shape[1]:
        raise InputError(
            f"{name} returns logits of shape {tuple(logits.shape)} for {count} images; "
            f"a classifier returns ({count}, classes)."
        )
    logits = logits.float().cpu()
    # -Inf is a class that is ruled out; NaN and +Inf are no scores at all.
    bad = (logits.isnan() | (logits == torch.inf)).any(dim=1)
    if bool(bad.any()):
        image = batch.ids[int(bad.nonzero()[0])]
        raise VitqError(f"{name} returns NaN or Inf for {image!r}. Check its weights, scales and this image.")
    return logits


def _check_labels(labels: Tensor, classes: int, ids: Sequence[str]) -> None:
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{ids[at]!r} has label {int(labels[at])}, but the model has {classes} classes, "
            f"0 to {classes - 1}. Is this the data the model was trained for?"
        )


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """In evaluation mode and without gradients; training flags are put back after."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    # inference_mode would leave tensors that autograd refuses in whatever the model caches.
    with torch.no_grad():
        try:
            if isinstance(model, nn.Module):
                model.eval()
            yield
        finally:
            if isinstance(model, nn.Module) and flags[0]:
                # An overridden train() may do more than set flags, and some flags may differ from it.
                model.train()
            for module, flag in zip(modules, flags, strict=True):
                module.training = flag
