"""Reading frozen features, against readers written here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

import vitq
from vitq.calibrate.features import Watched, heads_of
from vitq.core.batches import default_forward
from vitq.core.errors import DataError, MissingExtraError
from vitq.data.zoo import build_zoo, seeded_images
from vitq.evaluate.transfer import STRENGTHS, features_of, probe, transfer, vote


@dataclass
class Some:
    images: Tensor
    labels: Tensor | None
    ids: list[str]


def batches(images: Tensor, labels: Tensor | None, size: int = 5) -> Iterator[Some]:
    for at in range(0, len(images), size):
        some = None if labels is None else labels[at : at + size]
        yield Some(images[at : at + size], some, [str(n) for n in range(at, min(at + size, len(images)))])


def clouds(count: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Four classes in eight dimensions, of very different scales."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    centres = np.random.default_rng(9).normal(size=(4, 8))
    rows = (centres[labels] + spread * rng.normal(size=(count, 8))) * np.logspace(-2, 2, 8) + 5
    return torch.from_numpy(rows).float(), torch.from_numpy(labels)


def linear(train: tuple[Tensor, Tensor], test: Tensor, strength: float) -> np.ndarray[Any, Any]:
    """Classes by the minimum of sum of cross-entropies + |W|^2 / (2 C), features standardized."""
    x, y = train[0].double().numpy(), train[1].numpy()
    mean, size = x.mean(0), x.std(0)
    x, t = (x - mean) / size, (test.double().numpy() - mean) / size

    def loss(flat: np.ndarray[Any, Any]) -> float:
        w = flat.reshape(4, 9)
        out = x @ w[:, :8].T + w[:, 8]
        top = out.max(1)
        total = (np.log(np.exp(out - top[:, None]).sum(1)) + top - out[np.arange(len(y)), y]).sum()
        return float(total + (w[:, :8] ** 2).sum() / (2 * strength))

    w = minimize(loss, np.zeros(36), method="L-BFGS-B", options={"maxiter": 2000}).x.reshape(4, 9)
    return np.asarray((t @ w[:, :8].T + w[:, 8]).argmax(1))


def test_the_probe_is_the_best_linear_classifier() -> None:
    train, test = clouds(200, 0, 1.5), clouds(300, 1, 1.5)
    right, options = probe(train, test)
    wanted = linear(train, test[0], options["C"]) == test[1].numpy()
    assert (right.numpy() != wanted).mean() <= 0.01
    assert 0.3 < right.double().mean() < 0.99, "else anything would do"


def test_the_regularization_is_chosen_on_images_that_the_probe_has_not_seen() -> None:
    train, test = clouds(100, 0, 4.0), clouds(50, 1, 4.0)
    held = np.arange(100) % 5 == 0
    inner = train[0][~held], train[1][~held]
    scores = [float((linear(inner, train[0][held], c) == train[1][held].numpy()).mean()) for c in STRENGTHS]
    _, options = probe(train, test)
    assert scores[STRENGTHS.index(options["C"])] >= max(scores) - 0.051  # one image more or less


def test_neighbours_vote_by_their_cosines() -> None:
    (x, y), (t, labels) = clouds(120, 2), clouds(60, 3)
    a, b = (v.double() / v.double().norm(dim=1, keepdim=True) for v in (x, t))
    far = 1 - b @ a.T
    predicted = []
    for row in far:
        near = row.argsort()[:7]
        votes = torch.zeros(4, dtype=torch.float64)
        votes.index_add_(0, y[near], 1 / row[near])
        predicted.append(int(votes.argmax()))
    right, options = vote((x, y), (t, labels), 7)
    assert torch.equal(right, torch.tensor(predicted) == labels)
    assert options == {"neighbours": 7}


def test_features_are_what_goes_into_the_head() -> None:
    model, images = build_zoo("seeded_vit"), seeded_images(12)
    model.train()
    seen: list[Tensor] = []
    graph = vitq.quantize(model, "minmax", "w8a8", images).graph
    handle = model.get_submodule("head").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    watched = Watched(model, heads_of(graph, model), default_forward)
    ((found, labels),) = features_of([watched], batches(images, torch.arange(12)))
    handle.remove()
    torch.testing.assert_close(found, torch.cat(seen))
    assert labels.tolist() == list(range(12))
    assert model.training, "its mode is put back"
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.get_submodule("head")(found), model(images), rtol=1e-4, atol=1e-4)


def test_both_models_are_read_alike_and_each_is_read() -> None:
    model, images = build_zoo("seeded_vit"), seeded_images(60)
    labels = (images.mean((1, 2, 3)) > images.mean()).long()
    qmodel = vitq.quantize(model, "minmax", "w2a2", images[:8])
    counted: list[int] = []
    given = (batches(images[at], labels[at]) for at in (slice(40), slice(40, 60)))
    reads = transfer(model, qmodel, *given, neighbours=5, on_batch=counted.append)
    assert sum(counted) == 60
    assert [read.reader for read in reads] == ["probe", "neighbours"]

    def rows(net: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        handle = net.get_submodule("head").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            net(images)
        handle.remove()
        return seen[0]

    exact, quantized = rows(model), rows(qmodel.model)
    assert not torch.allclose(exact, quantized, atol=1e-2), "else either could be read for the other"
    for found, read in ((probe, reads[0]), (lambda *r: vote(*r, 5), reads[1])):
        own, theirs = (found((r[:40], labels[:40]), (r[40:], labels[40:]))[0] for r in (quantized, exact))
        assert (read.top1, read.top1_float) == (5.0 * int(own.sum()), 5.0 * int(theirs.sum()))
        assert (read.difference.a_only, read.difference.b_only) == (
            int((own & ~theirs).sum()),
            int((theirs & ~own).sum()),
        )


@pytest.mark.parametrize(
    ("count", "labels", "told"),
    [
        (0, torch.arange(0), "no image"),
        (30, None, "no labels"),
        (30, torch.zeros(30, dtype=torch.long), "one class"),
        (12, torch.arange(12) % 2, "fewer than 20"),
    ],
)
def test_what_cannot_be_read_is_refused(count: int, labels: Tensor | None, told: str) -> None:
    model, images = build_zoo("seeded_vit"), seeded_images(30)
    qmodel = vitq.quantize(model, "minmax", "w8a8", images[:4])
    with pytest.raises(DataError, match=told):
        transfer(model, qmodel, batches(images[:count], labels), batches(images[:count], labels))


def test_features_that_are_no_numbers_are_refused() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) / 0

    with pytest.raises(DataError, match="NaN"):
        features_of([Watched(Broken(), [], default_forward)], batches(seeded_images(2), torch.arange(2)))


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.neighbors", None)
    with pytest.raises(MissingExtraError, match=r"vitq\[transfer\]"):
        vote(clouds(30, 0), clouds(5, 1), 3)
