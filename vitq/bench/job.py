"""What the processes of one bench share: a folder of files, and how they are to run.

job.json                  this record
artifact                  a link to the artifact's folder
float.safetensors         weights of the float model
images.safetensors        images (B, C, H, W) float32 as the model takes them, B the largest batch
calibration.safetensors   images (N, C, H, W), where peers are calibrated
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitq.artifact import load
from vitq.core.files import write_text
from vitq.core.qmodel import QuantModel
from vitq.data.source import build_model

RECORD = "job.json"
ARTIFACT = "artifact"
WEIGHTS = "float.safetensors"
IMAGES = "images.safetensors"
CALIBRATION = "calibration.safetensors"


@dataclass(frozen=True)
class Job:
    """One bench.

    Attributes:
        folder: absolute, of the files above and of those that deployments are loaded from.
        source: record of the float model, from which it is built again.
        trust_code: allow a source that runs the function of a Python file.
        threads: of every runtime on the CPU.
        device: "cpu", "cuda" …
        batches: images at a time, ascending.
    """

    folder: str
    source: Mapping[str, Any]
    trust_code: bool
    threads: int
    device: str
    batches: tuple[int, ...]

    def path(self, name: str) -> Path:
        """A file of the folder."""
        return Path(self.folder) / name

    def write(self) -> None:
        """Leave the record in the folder, for the other processes."""
        write_text(self.path(RECORD), json.dumps(asdict(self)) + "\n")

    @staticmethod
    def read(folder: str) -> Job:
        """What `write` left."""
        found = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
        return Job(**{**found, "batches": tuple(found["batches"])})

    def float_model(self) -> nn.Module:
        """The float model on the CPU, from its weights in the folder."""
        from safetensors.torch import load_model

        model = build_model(self.source, trust_code=self.trust_code)
        load_model(model, str(self.path(WEIGHTS)))
        return model.eval()

    def quantized_model(self) -> QuantModel:
        """The artifact, on the CPU."""
        return load(self.path(ARTIFACT).resolve(), trust_code=self.trust_code)

    def images(self, name: str = IMAGES) -> Tensor:
        """Images of a file of the folder, float32 on the CPU."""
        return read_images(self.path(name))


def write_weights(path: Path, model: nn.Module) -> None:
    """All weights and buffers; those that are shared, once."""
    from safetensors.torch import save_model

    save_model(model, str(path))


def write_images(path: Path, images: Tensor) -> None:
    """Images, or what a model makes of them, as a file for another process."""
    from safetensors.torch import save_file

    save_file({"images": images.contiguous()}, str(path))


def read_images(path: Path) -> Tensor:
    """What `write_images` wrote."""
    from safetensors.torch import load_file

    return load_file(str(path))["images"]


def filled(images: Tensor, batch: int) -> Tensor:
    """As many images as a batch has: the first ones, or the last one again and again."""
    missing = batch - len(images)
    return images[:batch] if missing <= 0 else torch.cat([images, images[-1:].repeat(missing, 1, 1, 1)])
