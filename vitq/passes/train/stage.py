"""Train quantizers, and weights with them, by what the float model makes of the same examples.

Formula: x^ = s (clip(round(x / s) + z, 0, 2^b - 1) - z), rounding passed over by the gradient
         loss = features |(f - f_float) V|^2 + labels CE(y, out) + logits KL(out_float || out), means over examples
         f (d) what goes into the head (without a head of one layer: the outputs), V (d, k) main directions of f_float
         outputs that are no logits (B, classes) have half the squared distance in place of the divergence
         where training comes with a loss of the model's own (a detector's), that one in its place: own.py
Source:  quantizers  LSQ, Esser et al., arXiv 1902.08153, equations 1 to 3
         features    GPLQ, arXiv 2506.11784, section 3.2

Differs from LSQ in that gradients of scales are not divided by the root of how many values share them: AdamW, which is
used, does not see factors of gradients. The model stays in evaluation mode: nothing is dropped, and statistics of batch
norms stay.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.calibrate.features import Watched, heads_of
from vitq.calibrate.sensitivity import divergence
from vitq.core.batches import Batches, device_of, first_of, moved
from vitq.core.digest import of_tensors
from vitq.core.errors import CompositionError, DataError, InputError
from vitq.core.progress import Progress
from vitq.core.qmodel import QuantModel
from vitq.core.recipe import ACT_SCALES, PASSES, WEIGHT_SCALES
from vitq.core.roles import WEIGHT
from vitq.core.training import Draw, Training, TrainingPass
from vitq.passes.train.keep import Keeper
from vitq.passes.train.loop import Course, Group, Loop, Loss, crew
from vitq.passes.train.own import Own
from vitq.passes.train.recompute import recomputed
from vitq.passes.train.teacher import Teacher
from vitq.quantizers.base import Quantizer

LEAST = 0.01  # of its first value: a scale stays above
WEIGHTS = ("float", "learn", "fixed", "outliers")
Autocast = Callable[[], AbstractContextManager[Any]]


@PASSES.register("train")
@final
class Train(TrainingPass):
    """Train the scales of activations, and the model's parameters.

    Args:
        weights: "float" (trained without their quantizers, which must be fitted after), "learn" (trained as they are
            quantized, with their scales), "fixed" (not trained, quantized), "outliers" (of weights that are quantized
            the largest are trained, as they are quantized, and nothing else of the model).
        outliers: share of each weight's entries that are.
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
        outliers: float = 0.005,
    ) -> None:
        if weights not in WEIGHTS:
            raise CompositionError(f"pass 'train': unknown weights {weights!r}; use one of {', '.join(WEIGHTS)}")
        if rate < 0 or scale_rate < 0 or not rate + scale_rate > 0 or not 0 < variance <= 1:
            raise CompositionError("pass 'train': needs rates of which one is above zero, and 0 < variance <= 1")
        if min(features, labels, logits) < 0 or not max(features, labels, logits) > 0:
            raise CompositionError("pass 'train': one of features, labels and logits must be above zero, none below")
        if not 0 < outliers <= 1:
            raise CompositionError(f"pass 'train': outliers is a share above 0 and at most 1, not {outliers}")
        self.weights, self.rate, self.scale_rate, self.outliers = weights, rate, scale_rate, outliers
        self.variance, self.parts = variance, {"features": features, "labels": labels, "logits": logits}
        if weights == "float":
            self.drops = frozenset({WEIGHT_SCALES})

    def check(self, qmodel: QuantModel, data: Batches | None) -> None:
        """Refuse to work without examples, something to train, or anything to learn from."""
        if data is None or data.count == 0:
            raise DataError("training needs calibration images, too; give data= (or --calib, --train)")
        if self._idle(qmodel):
            return
        mine = crew(where(qmodel))
        if not self._trained(qmodel):
            raise CompositionError("training: there is nothing to train: parameters are frozen or their rates are 0")
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in qmodel.model.parameters()):
            raise InputError(
                "training takes models in float32: steps are smaller than half precision resolves; use model.float()"
            )
        if self.training is not None and self.training.loss is not None:
            self._refuse_begun(self.training, mine)
            self._try(qmodel, self.training)
            return
        labelled = self.training is not None and self.training.examples.labelled
        if self.parts["labels"] and not (self.parts["features"] or self.parts["logits"] or labelled):
            raise DataError(
                "the loss is the cross-entropy alone, and the examples have no labels; give labels, or another loss"
            )
        batch = next(iter(data))
        if self.training is None:
            Training.on(Batches.of([batch]))  # refuses batches that cannot be divided
        else:
            self._refuse_begun(self.training, mine)
        self._look(qmodel, data, first_of(batch), labelled)

    @staticmethod
    def _refuse_begun(training: Training, mine: Any) -> None:
        if training.begun and mine.is_main_process:
            raise InputError(f"{training.file} is of a run that was begun; resume it, or delete the file")

    @torch.no_grad()
    def _try(self, qmodel: QuantModel, training: Training) -> None:
        """The model's own loss of one example, which raises what is wrong with it."""
        inputs, labels = next(training.examples.stream([[(0, 0)]]))
        assert training.loss is not None
        own = Own(float_copy(qmodel), training.loss, qmodel.plan.seed, nullcontext)
        own(moved(inputs, where(qmodel)), moved(labels, where(qmodel)), [(0, 0)])

    @torch.no_grad()
    def _look(self, qmodel: QuantModel, data: Batches, one: Any, labelled: bool) -> None:
        """Refuse a model that returns nothing that the loss compares, by one forward."""
        features, outputs = Watched(qmodel.model, heads_of(qmodel.graph, qmodel.model), data.forward)(one)
        if self.parts["labels"] and labelled and (not outputs or outputs[0].ndim != 2):
            raise CompositionError(
                "training: the examples have labels, and the model returns no logits (B, classes) to compare with "
                "them; train without labels, or with the option labels=0"
            )
        lacks = [
            name for name, found in (("features", features), ("logits", outputs)) if self.parts[name] and not found
        ]
        if lacks:
            raise CompositionError(
                f"training: the model returns nothing by example that {' and '.join(lacks)} could be compared on. A "
                f"detector brings a loss of its own: vitq train --task, or Training(loss=…)"
            )

    def run(self, qmodel: QuantModel, data: Batches | None, progress: Progress) -> None:
        """Train.

        Raises:
            DataError: a label that is no class of the model.
        """
        assert data is not None
        told: dict[str, Any] = {"steps": 0, "why": "activations are in float: there is nothing to train"}
        if not self._idle(qmodel):
            told = self._train(qmodel, data, progress)
        qmodel.log.setdefault(self.name, []).append(told)

    def _train(self, qmodel: QuantModel, data: Batches, progress: Progress) -> dict[str, Any]:
        training, device = self.training or Training.on(data), where(qmodel)
        fingerprint = self._fingerprint(qmodel, training)
        autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=training.precision == "bf16")
        loss, told = self._loss(qmodel, data, training, autocast, progress)
        sites = qmodel.sites(WEIGHT)
        if self.weights == "float":
            qmodel.set_state("off", sites)
        measure = partial(training.measure, qmodel.model) if training.measure else None
        loop = Loop(self._groups(qmodel), loss, training, qmodel.plan.seed, device, measure)
        with recomputed(qmodel, training.recompute):
            course = loop.run(Keeper(training.file, fingerprint), progress)
        for site in qmodel.sites():
            qmodel.quantizers[site].freeze()
        for site in sites if self.weights == "float" else ():
            qmodel.quantizers[site].unfit()
        told |= report(course, training)
        if training.latent is not None and loop.crew.is_main_process:
            told["latent"] = dict(training.latent(float_copy(qmodel)))
        return told

    def _loss(
        self, qmodel: QuantModel, data: Batches, training: Training, autocast: Autocast, progress: Progress
    ) -> tuple[Loss, dict[str, Any]]:
        """What is made small, and what the artifact is told about it."""
        if training.loss is not None:
            own = Own(qmodel.model, training.loss, qmodel.plan.seed, autocast)
            return own, {"loss": "of the model's own", "parts": list(own.parts)}
        heads, device = heads_of(qmodel.graph, qmodel.model), where(qmodel)
        teacher = None
        if self.parts["features"] or self.parts["logits"]:
            watched = Watched(self.teacher or float_copy(qmodel), heads, data.forward)
            teacher = Teacher(watched, training, device, progress)
        bases = teacher.bases(self.variance, qmodel.plan.seed) if teacher and self.parts["features"] else []
        weights = {name: w for name, w in self.parts.items() if w and (name != "labels" or training.examples.labelled)}
        student = Watched(qmodel.model, heads, data.forward)
        told: dict[str, Any] = {"loss": weights, "directions": [basis.shape[1] for basis in bases]}
        if teacher is not None:
            told["targets"] = {"bytes": teacher.needed, "kept": teacher.kept is not None}
        return Distance(student, teacher, bases, weights, autocast), told

    def _idle(self, qmodel: QuantModel) -> bool:
        """Whether weights are to be trained for activations that are in float."""
        return self.weights == "float" and all(site.role == WEIGHT for site in qmodel.sites())

    def _trained(self, qmodel: QuantModel) -> list[str]:
        """Names of what is trained: parameters, and sites whose scales are."""
        free = [name for name, p in qmodel.model.named_parameters() if p.requires_grad]
        if self.weights == "outliers":
            weights = {site.param for site in qmodel.sites(WEIGHT)}
            free = [name for name in free if name in weights]
        scales = [site.id for site in qmodel.sites() if site.role != WEIGHT or self.weights == "learn"]
        return (free if self.weights != "fixed" and self.rate else []) + (scales if self.scale_rate else [])

    def _groups(self, qmodel: QuantModel) -> list[Group]:
        names = set(self._trained(qmodel))
        free = {name: p for name, p in qmodel.model.named_parameters() if name in names}
        scales: dict[str, nn.Parameter] = {}
        for site in qmodel.sites():
            quantizer = qmodel.quantizers[site]
            if site.id not in names or not isinstance(quantizer, Quantizer):
                continue
            quantizer.rounded = None  # codes that a pass chose are not those of weights that move
            quantizer.learn()
            scales |= {f"{site.id}|{name}": getattr(quantizer, name) for name in quantizer.learned}
        sizes = {name: scale.detach().abs().clone() for name, scale in scales.items()}
        least = {name: LEAST * size for name, size in sizes.items()}
        moving = self._outliers(qmodel, free) if self.weights == "outliers" else {}
        groups = [Group(self.rate, free, moving), Group(self.scale_rate, scales, sizes, least)]
        return [group for group in groups if group.params]

    @torch.no_grad()
    def _outliers(self, qmodel: QuantModel, free: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """1 at the entries that are trained; the others are put where their codes are, so that they keep these."""
        moving: dict[str, Tensor] = {}
        for site in qmodel.sites(WEIGHT):
            name, quantizer = site.param or "", qmodel.quantizers[site]
            if name not in free or not isinstance(quantizer, Quantizer):
                continue
            weight = free[name]
            size = weight.abs().flatten()
            largest = size.topk(max(1, round(self.outliers * len(size)))).indices
            moving[name] = torch.zeros_like(size).index_fill_(0, largest, 1.0).view_as(weight)
            held = quantizer.quantized(weight) if quantizer.rounded is None else quantizer.rounded
            weight.copy_(torch.where(moving[name] > 0, weight, held))
            quantizer.rounded = None
        return moving

    def _fingerprint(self, qmodel: QuantModel, training: Training) -> dict[str, str]:
        loss = () if training.loss is None else (type(training.loss).__qualname__, *training.loss.parts)
        sizes = (training.epochs, training.batch_size, training.micro_batch)
        settings = (*sizes, training.precision, training.recompute, *loss)
        plan = hashlib.sha256(str(qmodel.plan).encode()).hexdigest()
        return {
            "recipe": plan,
            "model or calibration": of_tensors(qmodel.state_dict().items()),  # scales are what calibration images made
            "data": training.examples.digest(),
            "settings": str(settings),
        }


def where(qmodel: QuantModel) -> torch.device:
    """Where the model is.

    Raises:
        InputError: on several devices.
    """
    found = device_of(qmodel.model)
    if found is None:
        raise InputError("training takes a model on one device; for several, start as many processes")
    return found


def float_copy(qmodel: QuantModel) -> nn.Module:
    """The model as it is, with its quantizers off."""
    own = copy.deepcopy(qmodel)
    own.set_state("off")
    return own.model


class Distance:
    """The loss.

    Args:
        student: the quantized model.
        teacher: None where labels are all that is compared with.
        bases: for each head (d, k) directions along which its features are compared.
        weights: part -> its weight.
        autocast: what the student runs in; the rest is float32.
    """

    def __init__(
        self,
        student: Watched,
        teacher: Teacher | None,
        bases: list[Tensor],
        weights: dict[str, float],
        autocast: Autocast,
    ) -> None:
        self.student, self.teacher, self.bases, self.weights = student, teacher, bases, weights
        self.parts, self.autocast = tuple(weights), autocast

    def __call__(self, inputs: Any, labels: Tensor | None, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Its parts, summed over these examples; features are compared in the mean over tokens."""
        wanted, float_outputs = self.teacher(inputs, draws) if self.teacher else ([], [])
        with self.autocast():
            features, outputs = self.student(inputs)
        parts: dict[str, Tensor] = {}
        if "features" in self.weights:
            pairs = zip(features, wanted, self.bases, strict=True)
            far = [((f - to) @ basis).square().sum() / f.shape[1] for f, to, basis in pairs]
            parts["features"] = torch.stack(far).sum()
        if "labels" in self.weights and labels is not None:
            classes, (low, high) = outputs[0].shape[1], torch.stack(labels.aminmax()).tolist()
            if not 0 <= low <= high < classes:
                raise DataError(f"labels are {low} to {high}, and the model has {classes} classes")
            parts["labels"] = F.cross_entropy(outputs[0], labels, reduction="sum")
        if "logits" in self.weights:
            both = zip(outputs, float_outputs, strict=True)
            parts["logits"] = torch.stack([divergence(out, to) for out, to in both]).sum()
        return {name: self.weights[name] * value for name, value in parts.items()}


def report(course: Course, training: Training) -> dict[str, Any]:
    """How a run went, for the artifact."""
    told: dict[str, Any] = {
        "start": course.start,
        "examples": len(training.examples),
        "epochs": training.epochs,
        "batch_size": training.batch_size,
        "steps": course.step,
        "curve": course.curve,
        "measured": course.measured,
    }
    if course.diverged is not None:
        told |= {"diverged": course.diverged, "kept": course.good}
    return told
