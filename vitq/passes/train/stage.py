"""Train quantizers, and weights with them, by what the float model makes of the same examples.

Formula: x^ = s (clip(round(x / s) + z, 0, 2^b - 1) - z), rounding passed over by the gradient
         loss = features |(f - f_float) V|^2 + labels CE(y, out) + logits KL(out_float || out), means over examples
         f (d) what goes into the head, V (d, k) main directions of f_float
Source:  quantizers  LSQ, Esser et al., arXiv 1902.08153, equations 1 to 3
         features    GPLQ, arXiv 2506.11784, section 3.2

Differs from LSQ in that gradients of scales are not divided by the root of how many values share them: AdamW, which is
used, does not see factors of gradients. The model stays in evaluation mode: nothing is dropped, and statistics of batch
norms stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.core.batches import Batches
from vitq.core.errors import CompositionError, DataError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES
from vitq.core.roles import WEIGHT
from vitq.core.training import Draw, Training, TrainingPass
from vitq.passes.train.keep import Keeper
from vitq.passes.train.loop import Course, Group, Loop
from vitq.passes.train.recompute import recomputed
from vitq.passes.train.teacher import Teacher, Watched
from vitq.quantizers.base import Quantizer

LEAST = 0.01  # of its first value: a scale stays above
LOOKED_AT = 4096  # examples for the main directions
WEIGHTS = ("float", "learn", "fixed")


@PASSES.register("train")
@final
class Train(TrainingPass):
    """Train the scales of activations, and the model's parameters.

    Args:
        weights: "float" (trained without their quantizers, which must be fitted after), "learn" (trained as they are
            quantized, with their scales), "fixed" (not trained, quantized).
        rate: of the parameters, constant.
        scale_rate: of scales, in parts of each scale's own size (its first value).
        features: weight of the distance to the float model's features, along their main directions.
        variance: share of the features' variance that the main directions have; 1 takes all directions.
        labels: weight of the cross-entropy, where examples have labels.
        logits: weight of the divergence from the float model's class probabilities.
    """

    name = "train"
    slot = "tune"
    needs = frozenset({WEIGHT_SCALES, ACT_SCALES})
    keeps_float_output = False
    cost = "for each epoch a forward and a backward of the examples, and a forward of the float model"

    def __init__(
        self,
        weights: str = "float",
        rate: float = 5e-6,
        scale_rate: float = 1e-3,
        features: float = 1.0,
        variance: float = 0.6,
        labels: float = 1.0,
        logits: float = 0.0,
    ) -> None:
        if weights not in WEIGHTS:
            raise CompositionError(f"pass 'train': unknown weights {weights!r}; use one of {', '.join(WEIGHTS)}")
        if rate < 0 or scale_rate < 0 or not rate + scale_rate > 0 or not 0 < variance <= 1:
            raise CompositionError("pass 'train': needs rates of which one is above zero, and 0 < variance <= 1")
        if min(features, labels, logits) < 0 or not max(features, labels, logits) > 0:
            raise CompositionError("pass 'train': one of features, labels and logits must be above zero, none below")
        self.weights, self.rate, self.scale_rate = weights, rate, scale_rate
        self.variance, self.parts = variance, {"features": features, "labels": labels, "logits": logits}
        if weights == "float":
            self.drops = frozenset({WEIGHT_SCALES})

    def check(self, qmodel: QuantModel, data: Batches | None) -> None:
        """Refuse to work without examples, or without anything to learn from."""
        if self.training is None and (data is None or data.count == 0):
            raise DataError("training needs images; give data= (or --train)")
        labelled = self.training is not None and self.training.examples.labelled
        if not (self.parts["features"] or self.parts["logits"] or labelled):
            raise DataError(
                "the loss is the cross-entropy alone, and the examples have no labels; give labels, or another loss"
            )

    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Train.

        Raises:
            CompositionError: the model has neither features before a head nor logits for the loss.
        """
        assert data is not None
        if self.weights == "float" and all(site.role == WEIGHT for site in qmodel.sites()):
            qmodel.log[self.name] = {"steps": 0, "why": "activations are in float: there is nothing to train"}
            return
        training = self.training or Training.on(data)
        device = next(qmodel.model.parameters()).device
        teacher = Teacher(qmodel, data.forward, training.examples, training.epochs)
        basis = None
        if self.parts["features"]:
            basis = teacher.basis(training.examples, self.variance, LOOKED_AT, training.micro_batch)
        loss = Distance(Watched(qmodel, data.forward), teacher, basis, self._weights_of(training, basis is not None))
        weights = qmodel.sites(WEIGHT)
        if self.weights == "float":
            qmodel.set_state("off", weights)
        groups = self._groups(qmodel)
        loop = Loop(groups, loss, training, qmodel.plan.seed, device)
        with recomputed(qmodel, training.recompute):
            course = loop.run(Keeper(training.file, self._fingerprint(qmodel, training)), progress)
        for site in qmodel.sites():
            qmodel.quantizers[site].freeze()
        for site in weights if self.weights == "float" else ():
            qmodel.quantizers[site].unfit()
        qmodel.log[self.name] = report(course, training, loss)

    def _weights_of(self, training: Training, has_features: bool) -> dict[str, float]:
        there = {"features": has_features, "labels": training.examples.labelled, "logits": True}
        return {name: weight for name, weight in self.parts.items() if weight and there[name]}

    def _groups(self, qmodel: QuantModel) -> list[Group]:
        """What is trained: parameters, and scales of which each has its own size."""
        groups = []
        if self.weights != "fixed" and self.rate:
            free = {name: p for name, p in qmodel.model.named_parameters() if p.requires_grad}
            groups.append(Group(self.rate, free))
        for site in qmodel.sites() if self.scale_rate else ():
            quantizer = qmodel.quantizers[site]
            is_weight = site.role == WEIGHT
            if not isinstance(quantizer, Quantizer) or (is_weight and self.weights != "learn"):
                continue
            quantizer.learn()
            for name in quantizer.learned:
                scale = getattr(quantizer, name)
                full = f"{site.id}|{name}"
                rate = self.scale_rate * float(scale.detach().abs().mean())
                groups.append(Group(rate, {full: scale}, {full: LEAST * scale.detach().clone()}))
        return groups

    def _fingerprint(self, qmodel: QuantModel, training: Training) -> dict[str, str]:
        settings = (training.epochs, training.batch_size, training.micro_batch, training.precision, training.recompute)
        digest = hashlib.sha256()
        for name, value in qmodel.model.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        plan = hashlib.sha256(str(qmodel.plan).encode()).hexdigest()
        return {
            "model": digest.hexdigest(),
            "recipe": plan,
            "data": training.examples.digest(),
            "settings": str(settings),
        }


class Distance:
    """The loss.

    Args:
        student: the quantized model.
        basis: (d, k) directions along which features are compared.
        weights: part -> its weight.
    """

    def __init__(self, student: Watched, teacher: Teacher, basis: Tensor | None, weights: dict[str, float]) -> None:
        self.student, self.teacher, self.basis, self.weights = student, teacher, basis, weights
        self.parts = tuple(weights)
        if not weights:
            raise CompositionError(
                "training: this model has no head whose input could be compared with the float model's"
            )

    def __call__(self, inputs: Any, labels: Tensor | None, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Its parts, summed over these examples."""
        wanted, float_logits = self.teacher(inputs, draws)
        features, logits = self.student(inputs)
        parts: dict[str, Tensor] = {}
        if "features" in self.weights:
            assert features is not None
            assert wanted is not None
            assert self.basis is not None
            parts["features"] = ((features - wanted) @ self.basis).square().sum()
        if {"labels", "logits"} & self.weights.keys() and (logits is None or float_logits is None):
            raise CompositionError(
                "training: the model returns no logits (B, classes), which labels and logits compare"
            )
        if "labels" in self.weights and logits is not None and labels is not None:
            parts["labels"] = F.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")
        if "logits" in self.weights and logits is not None and float_logits is not None:
            log_p, log_q = float_logits.float().log_softmax(1), logits.float().log_softmax(1)
            parts["logits"] = (log_p.exp() * (log_p - log_q)).sum()
        return {name: self.weights[name] * value for name, value in parts.items()}


def report(course: Course, training: Training, loss: Distance) -> dict[str, Any]:
    """How a run went, for the artifact."""
    told: dict[str, Any] = {
        "examples": len(training.examples),
        "epochs": training.epochs,
        "batch_size": training.batch_size,
        "steps": course.step,
        "loss": loss.weights,
        "directions": None if loss.basis is None else loss.basis.shape[1],
        "curve": course.curve,
    }
    if course.diverged is not None:
        told |= {"diverged": course.diverged, "kept": course.good}
    return told
