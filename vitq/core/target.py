"""Export targets: kinds of files and folders that a frozen model can be written as, one module each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitq.core.qmodel import QuantModel
from vitq.core.registry import Registry


@dataclass(frozen=True)
class Request:
    """What a target is given beside the model.

    Attributes:
        out: the file or folder to write.
        data: images as the model takes them, to compare on; None for random ones.
        described: where they come from, for the report.
        metrics: what was measured with the model, for targets that keep it.
    """

    out: Path
    data: Any = None
    described: str = ""
    metrics: dict[str, Any] | None = None


@dataclass(frozen=True)
class Written:
    """What was written, and what it was seen to do.

    Attributes:
        path, bytes: of the file, or of all files of the folder.
        lines: what is worth telling, a sentence each.
        facts: plain data for `--json`.
    """

    path: Path
    bytes: int
    lines: tuple[str, ...]
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"file": str(self.path), "bytes": self.bytes} | self.facts


class Target(ABC):
    """One kind of export."""

    @abstractmethod
    def check(self, out: Path) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            InputError, ArtifactError: a place that cannot be written.
            MissingExtraError: a package that is needed is not installed.
        """

    @abstractmethod
    def write(self, qmodel: QuantModel, request: Request) -> Written:
        """Write it, read it back, compare, and only then put it in place.

        Raises:
            InputError: a model that has no such form; the message names the sites or modules, and what to do.
            ExportError: not frozen, or what was written computes something else.
        """


TARGETS: Registry[Target] = Registry("export target", "vitq.export.targets")


def export_to(qmodel: QuantModel, to: str, out: str | Path, *, data: Any = None, described: str = "") -> Written:
    """Write a frozen model as a target has it, and check what was written. What was there before stays until then.

    Args:
        to: "hf", "compressed-tensors", "torch", ….
        out: the file or folder to write.
        data: images as the model takes them, to compare on; random ones of the example's shape without.
        described: where the images come from, for the report.

    Raises:
        UnknownNameError: no such target.
        InputError, ArtifactError, ExportError, MissingExtraError: as the target says (`Target`).
    """
    target, request = TARGETS[to], Request(Path(out), data, described)
    target.check(request.out)
    return target.write(qmodel, request)
