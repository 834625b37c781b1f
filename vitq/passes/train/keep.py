"""The state of a training run in one file, so that it goes on where it was stopped, to the same bits.

A file holds tensors by name, and as text in its header: what they are of (the fingerprint) and the course of the run.
It is put in the place of the one before in one step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vitq.core.errors import ArtifactError
from vitq.core.files import write_bytes

STATE = "vitq_training"  # the key in the header
VERSION = 1


class Keeper:
    """Writes and reads the state of one run.

    Args:
        path: of the file, None to keep nothing.
        fingerprint: what the run is of, in parts that are named when they differ.
    """

    def __init__(self, path: Path | None, fingerprint: Mapping[str, str]) -> None:
        self.path, self.fingerprint = path, dict(fingerprint)

    def write(self, tensors: Mapping[str, Tensor], course: Mapping[str, Any]) -> None:
        """Put this state in the place of the one before.

        Raises:
            ArtifactError: it cannot be written; the one before is still there.
        """
        if self.path is None:
            return
        told = {"version": VERSION, "fingerprint": self.fingerprint, "course": course}
        data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {STATE: json.dumps(told)})
        try:
            write_bytes(self.path, data)
        except OSError as error:
            raise ArtifactError(
                f"{self.path} cannot be written: {error.strerror or error}; the state before it is kept, make room "
                f"and go on with resume"
            ) from error

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, course), None where nothing was kept.

        Raises:
            ArtifactError: a damaged file, or one of another model, recipe, data or settings.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                told = json.loads((file.metadata() or {})[STATE])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            version, kept, course = told["version"], dict(told["fingerprint"]), dict(told["course"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{self.path} is no state of a training run, or damaged: {error}; delete it to begin anew"
            ) from error
        if version != VERSION:
            raise ArtifactError(f"{self.path} is of another version of vitq; delete it to begin anew")
        other = sorted(
            name for name in kept.keys() | self.fingerprint.keys() if kept.get(name) != self.fingerprint.get(name)
        )
        if other:
            raise ArtifactError(
                f"{self.path} is of a run with another {', '.join(other)}; give what it was begun with, or delete it "
                f"to begin anew"
            )
        return tensors, course


def state_of(params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, and what the optimizer knows of them."""
    found: dict[str, Tensor] = {}
    for name, parameter in params.items():
        found[f"param|{name}"] = parameter.data
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{key}|{name}"] = value
    return found


@torch.no_grad()
def put_back(
    tensors: Mapping[str, Tensor], params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Inverse of `state_of`."""
    for full, value in tensors.items():
        key, name = full.split("|", 1)
        parameter = params[name]
        if key == "param":
            parameter.data.copy_(value)
        else:  # the optimizer counts its steps on the CPU
            optimizer.state[parameter][key] = value.clone() if key == "step" else value.to(parameter.device)
