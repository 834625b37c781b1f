"""The rows of `vitq leaderboard`: which of them are there, and measuring the others one by one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitq.cli import work
from vitq.cli.console import Say
from vitq.core.batches import Batches
from vitq.core.errors import DataError, InputError, VitqError
from vitq.core.version import __version__
from vitq.data.images import Batch, ImageSet, open_images
from vitq.evaluate import fingerprint
from vitq.evaluate.classify import ClassifyResult, evaluate_classifier
from vitq.evaluate.leaderboard import (
    FAILED,
    FLOAT,
    KEY,
    MEASURED,
    OK,
    Entry,
    Ground,
    accuracy_cells,
    macs_in_forwards,
    measure,
)
from vitq.evaluate.machine import commit, machine
from vitq.pipeline import resolve
from vitq.report.board import Board, changed
from vitq.report.published import OFFICIAL, PAPER, beside, told

IN_MEMORY = 2**30  # bytes of evaluation images that are kept decoded; more are decoded again for every row
CODE = ("code_sha256", "torch")
PARTS = {
    "weights_sha256": "the weights",
    "plan_sha256": "the recipe",
    "calibration_sha256": "the calibration images",
    "evaluation_sha256": "the evaluation images",
    "device": "the device",
    "code_sha256": "vitq's code",
    "torch": "torch",
}
COUNT = "to be counted"
Todo = tuple[Entry | None, str]  # None is the float model; why it is not there


@dataclass(frozen=True)
class Asked:
    """What a run was asked for, beside the rows."""

    model: str
    checkpoint: Path | None
    calib: str
    calib_size: int
    evaluation: str
    images: int | None
    seeds: tuple[int, ...]
    batch_size: int
    keep: bool
    count_macs: bool


class Run:
    """One call of the command: a model, images, and the file with the rows.

    Raises:
        InputError: a model that cannot be loaded.
        DataError: too few images, unreadable ones, no labels, or none that was not calibrated on.
    """

    def __init__(self, asked: Asked, device: torch.device, board: Board, say: Say) -> None:
        self.asked, self.board, self.device, self.say = asked, board, device, say
        if asked.calib_size < 1:
            raise InputError(f"--calib-size {asked.calib_size}: at least one image is needed")
        pool = open_images(asked.calib, labels="none")
        self.samples = {seed: pool.sample(asked.calib_size, seed) for seed in asked.seeds}
        for sample in self.samples.values():
            sample.check()
        open_images(asked.evaluation)  # is it there? Before a model is fetched
        self.loaded = loaded = work.open_model(asked.model, asked.checkpoint, device, say)
        self.preprocess = work.need_preprocess(loaded.preprocess, asked.model)
        self.calibrated = {seed: sample.digests() for seed, sample in self.samples.items()}
        self.evaluation, digests = self._unseen()
        prepared = self.preprocess.to_dict()
        self.shared = {
            "weights_sha256": fingerprint.weights_digest(loaded.model, loaded.source),
            "evaluation_sha256": fingerprint.images_digest(self.evaluation, digests, prepared),
            "device": device.type,
            "torch": torch.__version__,
        }
        self.ground = Ground(loaded.model, loaded.source, prepared, self._batches, device)
        self.calibration = lru_cache(maxsize=1)(self._calibration)

    def _unseen(self) -> tuple[ImageSet, list[str]]:
        """The evaluation images, less those that any seed calibrates on, and their digests."""
        asked = self.asked
        images = work.labelled(asked.evaluation, self.loaded.num_classes, skip_bad=False)
        seen = {digest for digests in self.calibrated.values() for digest in digests}
        digests = images.digests()
        kept = [index for index, digest in enumerate(digests) if digest not in seen]
        if len(kept) < len(images):
            self.say.note(
                f"{len(images) - len(kept)} images of {asked.evaluation} are calibrated on; they are left out"
            )
        if asked.images is not None and asked.images > len(kept):
            raise DataError(f"--images {asked.images}: {asked.evaluation} has {len(kept)} that are not calibrated on")
        if not kept:
            raise DataError(f"{asked.evaluation}: every image is calibrated on; give others")
        if asked.images is not None:
            order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
            kept = [kept[index] for index in sorted(order[: asked.images].tolist())]
        return images.subset(kept), [digests[index] for index in kept]

    def _calibration(self, seed: int) -> Batches:
        asked = self.asked
        found = work.calibration(asked.calib, asked.calib_size, seed, self.preprocess, self.device, False, self.say)
        return found[0]

    def _batches(self) -> Iterable[Batch]:
        if len(self.evaluation) * math.prod(self.preprocess.input_size) * 4 <= IN_MEMORY:
            return self._decoded
        return self.evaluation.batches(self.preprocess, self.asked.batch_size)

    @cached_property
    def _decoded(self) -> list[Batch]:
        return list(self.evaluation.batches(self.preprocess, self.asked.batch_size))

    # -- which rows -------------------------------------------------------------------------------------

    def cells(self, entry: Entry | None) -> dict[str, str]:
        """The columns that identify a row."""
        if entry is None:
            return dict.fromkeys(KEY, "") | {"model": self.asked.model, "recipe": FLOAT}
        return entry.cells(self.asked.model)

    def key(self, entry: Entry | None) -> tuple[str, ...]:
        """The same as a key."""
        return self.board.key_of(self.cells(entry))

    def fingerprint(self, entry: Entry | None) -> dict[str, str]:
        """What the row depends on."""
        own = {"plan_sha256": "", "calibration_sha256": "", "code_sha256": fingerprint.code_digest()}
        if entry is not None:
            plan = resolve(entry.recipe, entry.bits, options=dict(entry.options), seed=entry.seed)
            sample, digests = self.samples[entry.seed], self.calibrated[entry.seed]
            own = {
                "plan_sha256": fingerprint.data_digest(plan.to_json()),
                "calibration_sha256": fingerprint.images_digest(sample, digests, self.ground.preprocess),
                "code_sha256": fingerprint.code_digest(entry.recipe),
            }
        return self.shared | own

    def why(self, entry: Entry | None) -> str:
        """Why a row must be measured, or "" if it is there."""
        key = self.key(entry)
        old = self.board.rows.get(key)
        if old is None:
            return "new"
        if old["status"] == FAILED:
            return "again: it failed"
        parts = [name for name in PARTS if not (self.asked.keep and name in CODE)]
        if other := changed(old, self.fingerprint(entry), parts):
            return f"again: {' and '.join(PARTS[name] for name in other)} changed"
        if self.board.correct(key) is None:
            return "again: which images it got right is not known"
        return COUNT if self._counts(entry) and not old["macs"] else ""

    def todo(self, entries: Sequence[Entry]) -> list[Todo]:
        """Every row that is not there, the float model's first."""
        return [(entry, why) for entry in (None, *entries) if (why := self.why(entry))]

    # -- measuring --------------------------------------------------------------------------------------

    def measure(self, todo: Sequence[Todo]) -> None:
        """Measure and write row by row. What goes wrong in one is written into it, and the next one begins.

        Raises:
            VitqError: the float model cannot be evaluated, or a row cannot be written.
        """
        start, done = time.perf_counter(), 0  # of the rows that are quantized
        for number, (entry, why) in enumerate(todo):
            left = (time.perf_counter() - start) / max(done, 1) * (len(todo) - number)
            about = f"; about {clock(left)} left" if done else ""
            self.say.note(f"row {number + 1} of {len(todo)}: {entry or FLOAT} ({why}){about}")
            if entry is None:
                self._add(None, accuracy_cells(self._float), self._float.predictions.correct)
                start = time.perf_counter()
                continue
            done += 1
            if why == COUNT:
                self._count(entry)
            else:
                self._row(entry)

    @cached_property
    def _float(self) -> ClassifyResult:
        with self.say.counted("evaluating the float model", len(self.evaluation)) as tell:
            return evaluate_classifier(
                self.loaded.model, self.ground.batches(), on_batch=tell, device=self.device, keep_logits=True
            )

    def _row(self, entry: Entry) -> None:
        reference = self._float
        try:
            data = self.calibration(entry.seed)
            evaluating = self.say.counted("evaluating", len(self.evaluation))
            cells, correct = measure(entry, self.ground, data, reference, self.say, evaluating)
        except Exception as error:  # whatever a recipe does to a model: the other rows are not to blame
            self.say.note(f"{entry} failed: {reason_of(error)}")
            self._add(entry, {"status": FAILED, "reason": reason_of(error)}, None)
        else:
            self._add(entry, cells, correct)
            if self._counts(entry):
                self._count(entry)

    def _counts(self, entry: Entry | None) -> bool:
        """Whether multiply-accumulates shall be counted: once for all seeds."""
        return self.asked.count_macs and entry is not None and entry.seed == self.asked.seeds[0]

    def _count(self, entry: Entry) -> None:
        try:
            macs = macs_in_forwards(entry, self.ground, self.calibration(entry.seed), self.say)
        except Exception as error:  # what runs may not run where it is watched
            self.say.note(f"{entry} could not be counted: {reason_of(error)}")
        else:
            self.board.change(self.key(entry), macs=macs)

    def _add(self, entry: Entry | None, cells: dict[str, Any], correct: Tensor | None) -> None:
        rows = [] if entry is None or entry.options else beside(entry.name, self.asked.model, entry.bits)
        where = {
            "kind": "float" if entry is None else "simulated",
            "calibration": "" if entry is None else Path(self.asked.calib).name,
            "calibration_images": "" if entry is None else self.asked.calib_size,
            "evaluation": Path(self.asked.evaluation).name,
        }
        known = {"paper": told(rows, PAPER), "official": told(rows, OFFICIAL), "status": OK, "reason": ""}
        code = {"version": __version__, "commit": commit()}
        row = self.cells(entry) | dict.fromkeys(MEASURED, "") | known | cells | where | self.fingerprint(entry)
        self.board.add(row | code | machine(), correct)


def reason_of(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, VitqError) else f"{type(error).__name__}: {text}"


def clock(seconds: float) -> str:
    """90 as 1m30s, an hour and more as 1h02m."""
    whole = int(seconds)
    return f"{whole // 3600}h{whole // 60 % 60:02d}m" if whole >= 3600 else f"{whole // 60}m{whole % 60:02d}s"
