"""Running classifiers over batches, alone and in pairs."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitq.core.errors import DataError, InputError, VitqError
from vitq.core.logits import logits_of
from vitq.evaluate.classify import evaluate_classifier, evaluate_pair


@dataclass(frozen=True)
class Batch:
    images: Tensor
    labels: Tensor | None
    ids: list[str]


class Linear(nn.Module):
    """A classifier whose logits are easy to compute by hand."""

    def __init__(self, classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        weight = torch.randn(classes, 12, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


def data(n: int = 50, size: int = 8, classes: int = 10, labelled: bool = True) -> list[Batch]:
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, 2, 2, generator=draw)
    labels = torch.randint(0, classes, (n,), generator=draw)
    ids = [f"{i}.jpg" for i in range(n)]
    return [
        Batch(images[i : i + size], labels[i : i + size] if labelled else None, ids[i : i + size])
        for i in range(0, n, size)
    ]


def by_hand(model: nn.Module, batches: list[Batch]) -> np.ndarray:
    with torch.no_grad():
        return torch.cat([model(batch.images) for batch in batches]).numpy()


def test_top1_and_top5_equal_those_of_sorted_logits() -> None:
    model, batches = Linear(), data()
    found = evaluate_classifier(model, batches)
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None]).numpy()
    best = np.argsort(-by_hand(model, batches), axis=1)
    hits = best == labels[:, None]
    assert found.images == 50
    assert found.top1 == pytest.approx(100 * hits[:, 0].mean())
    assert found.top5 == pytest.approx(100 * hits[:, :5].any(axis=1).mean())
    assert found.top1 is not None
    assert found.top1_interval is not None
    assert found.top1_interval[0] <= found.top1 <= found.top1_interval[1]
    assert found.predictions.ids == [f"{i}.jpg" for i in range(50)]
    assert found.predictions.predicted.tolist() == best[:, 0].tolist()
    assert found.predictions.labels.tolist() == labels.tolist()


def test_the_batch_size_changes_nothing() -> None:
    results = [evaluate_classifier(Linear(), data(size=size)).to_json() for size in (1, 7, 50)]
    assert results[0] == results[1] == results[2]


def test_logits_are_kept_only_on_request() -> None:
    model, batches = Linear(), data()
    assert evaluate_classifier(model, batches).logits is None
    kept = evaluate_classifier(model, batches, keep_logits=True).logits
    assert kept is not None
    assert kept.numpy() == pytest.approx(by_hand(model, batches))


def test_top5_of_three_classes_counts_all_three() -> None:
    found = evaluate_classifier(Linear(classes=3), data(classes=3))
    assert found.top5 == 100


def test_without_labels_there_are_predictions_and_no_accuracy() -> None:
    found = evaluate_classifier(Linear(), data(labelled=False))
    assert (found.top1, found.top5, found.top1_interval) == (None, None, None)
    assert found.predictions.labels.eq(-1).all()
    assert json.dumps(found.to_json(), allow_nan=False)


def test_progress_counts_images_for_one_model_and_for_two() -> None:
    counts: list[int] = []
    evaluate_classifier(Linear(), data(20), on_batch=counts.append)
    evaluate_pair(Linear(), Linear(), data(20), on_batch=counts.append)
    assert counts == [8, 16, 20, 8, 16, 20]


def test_the_model_is_in_evaluation_mode_and_its_flags_are_put_back() -> None:
    model = nn.Sequential(Linear(), nn.Dropout(), nn.BatchNorm1d(10)).train()
    model[2].eval()
    first, second = (evaluate_classifier(model, data()).to_json() for _ in range(2))
    assert first == second
    assert [module.training for module in model.modules()] == [True, True, True, False]
    with pytest.raises(DataError):
        evaluate_classifier(model, [])
    assert model.training


def test_no_gradients_are_recorded_and_what_a_model_caches_can_be_trained_on() -> None:
    cached: list[Tensor] = []

    def model(images: Tensor) -> Tensor:
        weight = torch.eye(12, requires_grad=True)
        cached.append(images.flatten(1) @ weight)
        return cached[-1]

    evaluate_classifier(model, data(8))
    assert not cached[0].requires_grad
    (cached[0] * torch.ones(12, requires_grad=True)).sum().backward()  # type: ignore[no-untyped-call]


def test_half_precision_logits_are_understood() -> None:
    found = evaluate_classifier(lambda images: Linear()(images).bfloat16(), data(), keep_logits=True)
    assert found.logits is not None
    assert found.logits.dtype == torch.float32


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: SimpleNamespace(logits=x, hidden_states=None),
        lambda x: {"loss": None, "logits": x},
        lambda x: OrderedDict(logits=x),
        lambda x: (x, "attention"),
        lambda x: [x],
    ],
)
def test_logits_are_found_in_what_models_return(wrap: object) -> None:
    logits = torch.zeros(2, 3)
    assert logits_of(wrap(logits)) is logits  # type: ignore[operator]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "NoneType"),
        ({"last_hidden_state": torch.zeros(1)}, "dict with the keys last_hidden_state"),
        ((), "tuple"),
        ((None, torch.zeros(1)), "tuple"),
        (SimpleNamespace(logits=None), "SimpleNamespace"),
    ],
)
def test_an_output_without_logits_is_named(output: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        logits_of(output)


def test_a_label_beyond_the_classes_says_both_numbers_and_the_image() -> None:
    with pytest.raises(DataError, match=r"'\d+\.jpg' has label [4-9], but the model has 4 classes"):
        evaluate_classifier(Linear(classes=4), data(classes=10))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_scores_name_the_first_image(value: float) -> None:
    batches = data()
    batches[2].images[3:5, 0, 0, 0] = value

    def model(images: Tensor) -> Tensor:
        return images.flatten(1)

    with pytest.raises(VitqError, match=r"the model returns NaN or Inf for '19\.jpg'"):
        evaluate_classifier(model, batches)
    with pytest.raises(VitqError, match=r"the quantized model .* '19\.jpg'"):
        evaluate_pair(lambda images: model(images).nan_to_num(0, 1, 0), model, batches)


def test_a_class_ruled_out_by_minus_infinity_is_allowed() -> None:
    def model(images: Tensor) -> Tensor:
        logits: Tensor = Linear()(images)
        return logits.index_fill(1, torch.tensor([0]), -torch.inf)

    found = evaluate_pair(model, model, data())
    assert found.logit_kl == 0


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no images"),
        ([*data(8), data(8)[0]], r"'0\.jpg' occurs twice"),
        ([data(16)[0], data(16, labelled=False)[1]], "some batches have labels"),
        ([Batch(torch.zeros(2, 3, 2, 2), None, ["a"])], "2 images has 1 ids and no labels"),
        ([Batch(torch.zeros(2, 3, 2, 2), torch.zeros(3), ["a", "b"])], r"labels of shape \(3,\)"),
    ],
)
def test_data_that_do_not_fit_together_are_refused(batches: list[Batch], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_classifier(Linear(), batches)


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(8, 3, 2, 2\) for 8 images"):
        evaluate_classifier(lambda images: images, data(8))
    with pytest.raises(InputError, match="10 classes, the quantized one 11"):
        evaluate_pair(Linear(), Linear(classes=11), data())


def test_a_pair_is_two_evaluations_of_the_same_batches_read_once() -> None:
    read: list[int] = []

    def once() -> Iterator[Batch]:
        for batch in data():
            read.append(len(batch.ids))
            yield batch

    a, b = Linear(seed=0), Linear(seed=1)
    found = evaluate_pair(a, b, once())
    assert sum(read) == 50
    assert found.float.to_json() == evaluate_classifier(a, data()).to_json()
    assert found.quantized.to_json() == evaluate_classifier(b, data()).to_json()


def test_what_a_pair_says_follows_from_the_logits() -> None:
    a, b = Linear(seed=0), Linear(seed=0)
    with torch.no_grad():
        b.weight.add_(0.3 * torch.randn(b.weight.shape, generator=torch.Generator().manual_seed(2)))
    batches = data(200)
    labels = np.concatenate([batch.labels.numpy() for batch in batches if batch.labels is not None])
    p, q = by_hand(a, batches).astype(np.float64), by_hand(b, batches).astype(np.float64)
    found = evaluate_pair(a, b, batches)
    right_a, right_b = p.argmax(1) == labels, q.argmax(1) == labels
    assert found.recovery == pytest.approx(right_b.mean() / right_a.mean())
    assert found.agreement == pytest.approx(100 * (p.argmax(1) == q.argmax(1)).mean())
    log_p, log_q = (z - np.log(np.exp(z).sum(axis=1, keepdims=True)) for z in (p, q))
    assert found.logit_kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(100 * (right_b.mean() - right_a.mean()))
    assert found.difference.b_only == (right_a & ~right_b).sum()


def test_a_model_paired_with_itself_loses_nothing() -> None:
    model = Linear().train()
    found = evaluate_pair(model, model, data())
    assert (found.recovery, found.agreement, found.logit_kl) == (1, 100, 0)
    assert model.training


def test_a_pair_without_labels_still_has_agreement_and_kl() -> None:
    found = evaluate_pair(Linear(seed=0), Linear(seed=1), data(labelled=False))
    assert found.recovery is None
    assert found.difference is None
    assert found.logit_kl > 0
    assert 0 <= found.agreement < 100


def test_recovery_of_a_float_model_that_is_never_right_is_undefined() -> None:
    batches = [Batch(torch.zeros(4, 3, 2, 2), torch.full((4,), 5), list("abcd"))]
    found = evaluate_pair(Linear(), Linear(), batches)
    assert found.recovery is None
    assert found.to_json()["recovery"] is None


def test_json_of_a_pair_is_strict_and_has_the_agreed_names() -> None:
    found = evaluate_pair(Linear(seed=0), Linear(seed=1), data()).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    names = {"images", "top1", "top5", "top1_interval", "top1_float", "top5_float", "top1_interval_float"}
    assert set(found) == names | {"recovery", "agreement", "logit_kl", "difference"}
