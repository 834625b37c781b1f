"""How well a model's features serve other data: a linear probe and nearest neighbours on frozen features.

Shapes:  features (N, d) what goes into the head, the mean over tokens where it takes each of them
Units:   accuracies in percent, differences in percentage points
Source:  the question is GPLQ's, arXiv 2506.11784, section 4.2 (it trains a probe by gradient steps; here its optimum is
         found); nearest neighbours as in DINO, arXiv 2104.14294, section 4.1, with cosines as weights
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitq.calibrate.features import Watched, heads_of
from vitq.core.batches import default_forward
from vitq.core.errors import CompositionError, DataError, InputError, MissingExtraError
from vitq.core.qmodel import QuantModel
from vitq.evaluate.classify import Batch, evaluating
from vitq.evaluate.metrics import PairedDifference, bootstrap_interval, paired_difference, rounded

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the probe's inverse regularization; a fifth of the images chooses
HELD_OUT = 5  # every so many image of the training images, to choose by
ITERATIONS = 1000
READERS = ("probe", "neighbours")

Rows = tuple[Tensor, Tensor]  # features (N, d), labels (N,)


@dataclass(frozen=True)
class Read:
    """What one reader of features gets right, with the float model's and with the quantized model's.

    Attributes:
        top1, top1_float: percent, with 95 % bootstrap intervals over images.
        difference: quantized minus float, on the same images.
        options: what was chosen for each model, such as the probe's regularization.
    """

    reader: str
    top1: float
    top1_interval: tuple[float, float]
    top1_float: float
    top1_float_interval: tuple[float, float]
    difference: PairedDifference
    options: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "reader": self.reader,
            "top1": rounded(self.top1),
            "top1_interval": [rounded(end) for end in self.top1_interval],
            "top1_float": rounded(self.top1_float),
            "top1_float_interval": [rounded(end) for end in self.top1_float_interval],
            "difference": self.difference.to_json(),
            "options": self.options,
        }


def transfer(
    float_model: nn.Module,
    qmodel: QuantModel,
    train: Iterable[Batch],
    test: Iterable[Batch],
    *,
    neighbours: int = 20,
    device: str | torch.device = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> list[Read]:
    """Read the features of both models by a linear probe and by nearest neighbours.

    Args:
        float_model: the model that was quantized.
        train, test: labelled images of any classes; each batch goes through both models.
        neighbours: how many vote.
        on_batch: called with the number of images of each batch.

    Raises:
        DataError, InputError: as `check` and `features_of`.
        CompositionError: the models give no features.
        MissingExtraError: scikit-learn is not installed.
    """
    _sklearn("pipeline")  # before long work
    heads = heads_of(qmodel.graph, qmodel.model)
    models = [Watched(model, heads, default_forward) for model in (float_model, qmodel.model)]
    learned = features_of(models, train, device, on_batch)
    check(learned[0][1], neighbours)
    seen = list(zip(learned, features_of(models, test, device, on_batch), strict=True))
    found: list[Read] = []
    for reader in READERS:
        results = [probe(*rows) if reader == "probe" else vote(*rows, neighbours) for rows in seen]
        (exact, exact_options), (quantized, options) = results
        found.append(
            Read(
                reader,
                100 * float(quantized.double().mean()),
                bootstrap_interval(quantized),
                100 * float(exact.double().mean()),
                bootstrap_interval(exact),
                paired_difference(quantized, exact),
                {"quantized": options, "float": exact_options},
            )
        )
    return found


def check(labels: Tensor, neighbours: int) -> None:
    """Refuse training images that readers cannot learn from, before long work.

    Raises:
        InputError: fewer than one neighbour.
        DataError: fewer than two classes, or fewer images than neighbours.
    """
    if neighbours < 1:
        raise InputError(f"{neighbours} neighbours cannot vote; take one or more")
    if len(labels) < max(neighbours, HELD_OUT):
        raise DataError(f"{len(labels)} training images are fewer than {max(neighbours, HELD_OUT)}; give more")
    if len(labels.unique()) < 2:
        raise DataError("the training images are all of one class; a probe needs at least two")


def features_of(
    models: Sequence[Watched],
    batches: Iterable[Batch],
    device: str | torch.device = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> list[Rows]:
    """Features and labels of images by each model; models are in evaluation mode meanwhile.

    Raises:
        DataError: no images, no labels, or features that are no numbers.
        CompositionError: a model gives no features.
    """
    rows: list[list[Tensor]] = [[] for _ in models]
    labels: list[Tensor] = []
    with ExitStack() as modes:
        for watched in models:
            modes.enter_context(evaluating(watched.model))
        for batch in batches:
            if batch.labels is None:
                raise DataError("the images have no labels; a probe needs class folders, labels.csv or a label column")
            images = batch.images.to(device)
            for watched, own in zip(models, rows, strict=True):
                features, _ = watched(images)
                if not features:
                    raise CompositionError("the model gives no features: it has no head of one layer, and no outputs")
                own.append(torch.cat([t.mean(1) for t in features], 1).cpu())
                if not own[-1].isfinite().all():
                    raise DataError(f"features are NaN or infinite for images from {batch.ids[0]!r} on")
            labels.append(batch.labels)
            if on_batch is not None:
                on_batch(len(batch.labels))
    if not labels:
        raise DataError("there is no image")
    return [(torch.cat(own), torch.cat(labels)) for own in rows]


def probe(train: Rows, test: Rows) -> tuple[Tensor, dict[str, Any]]:
    """Which test images a linear classifier gets right, and its inverse regularization.

    Features are standardized; a fifth of the training images chooses the regularization, then all of them are used.
    """
    chosen = torch.arange(len(train[0])) % HELD_OUT == 0
    inner, outer = (train[0][~chosen], train[1][~chosen]), (train[0][chosen], train[1][chosen])
    scores = [float(_fitted(inner, strength).score(*_arrays(outer))) for strength in STRENGTHS]
    best = STRENGTHS[int(np.argmax(scores))]
    return _right(_fitted(train, best), test), {"C": best}


def vote(train: Rows, test: Rows, neighbours: int) -> tuple[Tensor, dict[str, Any]]:
    """Which test images their nearest training images get right, by cosine."""
    model = _sklearn("neighbors").KNeighborsClassifier(neighbours, metric="cosine", weights="distance")
    model.fit(*_arrays(train))
    return _right(model, test), {"neighbours": neighbours}


def _fitted(rows: Rows, strength: float) -> Any:
    if len(rows[1].unique()) < 2:
        raise DataError("too few images of a second class to choose the probe's regularization by; give more")
    linear = _sklearn("linear_model").LogisticRegression(C=strength, max_iter=ITERATIONS)
    model = _sklearn("pipeline").make_pipeline(_sklearn("preprocessing").StandardScaler(), linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", _sklearn("exceptions").ConvergenceWarning)  # near enough for an accuracy
        return model.fit(*_arrays(rows))


def _right(model: Any, rows: Rows) -> Tensor:
    features, labels = _arrays(rows)
    return torch.from_numpy(model.predict(features) == labels)


def _arrays(rows: Rows) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return rows[0].double().numpy(), rows[1].numpy()


def _sklearn(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"sklearn.{name}")
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "transfer", "reading features") from error
