"""Train the two Fashion-MNIST models of vitq/data/zoo and write them, with their images, into the package.

    make zoo                                   data from the Debian package dataset-fashion-mnist
    python tools/train_zoo.py --data FOLDER    a folder with the four idx .gz files

One thread or two of a CPU, no GPU. Interrupted, it goes on from the last whole epoch. 300 calibration and 1,000
validation images are taken out of the training set first; the 2,000 test images are drawn from the official test
set, and are looked at once, at the end.

A small convolutional network is trained first, and the transformers learn from its probabilities as well as from the
labels, as DeiT does (Touvron et al. 2021, section 4).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitq.core.files import write_text
from vitq.data.zoo.fashion import CLASSES, IMAGE_SIZE, empty_swin, empty_vit

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "vitq" / "data" / "zoo" / "files"
PACKAGE = "dataset-fashion-mnist"
PARTS = {"train": "train", "test": "t10k"}
CALIBRATION, VALIDATION, TEST = 300, 1_000, 2_000
SEED = 20
BATCH = 64
SMOOTHING = 0.1  # of the labels, where they are all that there is
GUIDED = 0.5  # weight of the teacher's probabilities in the target; the labels have the rest
TEMPERATURE = 2.0  # of the teacher's probabilities
WARMUP = 0.1  # share of the steps
PADDING = 1  # pixels; the things are centred and fill the picture
AS_THEY_ARE = 1 / 3  # share of the epochs, the last ones, in which images are neither shifted nor mirrored


@dataclass(frozen=True)
class Job:
    """One model and how it is trained."""

    build: Callable[[], nn.Module]
    epochs: int
    rate: float
    decay: float = 0.05


def empty_teacher() -> nn.Module:
    """(N, 3, 28, 28) -> (N, 10): five convolutions of 3 x 3, on 14 x 14 and 7 x 7 positions."""

    def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *convolution(3, 24, 2), *convolution(24, 48), *convolution(48, 48), nn.MaxPool2d(2),
        *convolution(48, 96), *convolution(96, 96), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(96, len(CLASSES)),
    ).to(memory_format=torch.channels_last)  # fmt: skip


TEACHER = "teacher"  # not written, only its checkpoint is
JOBS = {
    TEACHER: Job(empty_teacher, 10, 3e-3),
    "fashion_vit": Job(empty_vit, 16, 2e-3),
    "fashion_swin": Job(empty_swin, 14, 2e-3),
}


@dataclass(frozen=True)
class Images:
    """pixels (N, 28, 28) uint8, labels (N,) int64, rows (N,): the position of each in the official file."""

    pixels: Tensor
    labels: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: Tensor) -> Images:
        return Images(self.pixels[positions], self.labels[positions], self.rows[positions])


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"


# Data


def find_data(given: Path | None, scratch: Path) -> Path:
    """The folder of the idx files: the one given, that of the installed Debian package, or a fetched one."""
    if given is not None:
        return given
    listed = run("dpkg", "-L", PACKAGE)
    archive = next((line for line in listed.splitlines() if line.endswith("train-images-idx3-ubyte.gz")), None)
    if archive is not None:
        return Path(archive).parent
    say(f"fetching the Debian package {PACKAGE} (31 MB)")
    run("apt-get", "download", PACKAGE, folder=scratch)
    if not any(scratch.glob("*.deb")):  # apt may never have been told what there is; that needs its owner's rights
        run("apt-get", "update")
        run("apt-get", "download", PACKAGE, folder=scratch)
    packed = next(scratch.glob("*.deb"), None)
    if packed is None:
        sys.exit(
            f"the Debian package {PACKAGE} could not be fetched. Install it, or name a "
            "folder with the four idx .gz files of Fashion-MNIST: --data FOLDER"
        )
    run("dpkg", "-x", str(packed), str(scratch))
    return next(scratch.rglob("train-images-idx3-ubyte.gz")).parent


def run(*words: str, folder: Path | None = None) -> str:
    """What a command prints, or "" where it fails or is not there."""
    try:
        done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def read_idx(path: Path) -> Tensor:
    """An idx file of bytes as a uint8 tensor: two zero bytes, 8 for bytes, rank, sizes, values."""
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, 4).astype(int)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if data[:3] != b"\0\0\x08" or values.size != math.prod(shape):
        sys.exit(f"{path} is no idx file of bytes, or is cut off")
    return torch.from_numpy(values.reshape(shape).copy())


def read_part(folder: Path, part: str) -> Images:
    name = PARTS[part]
    pixels = read_idx(folder / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz").long()
    return Images(pixels, labels, torch.arange(len(labels)))


def balanced(labels: Tensor, count: int, seed: int) -> Tensor:
    """Positions of count images, the same number of each class, drawn by seed, in ascending order."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=draw)
    each = count // len(CLASSES)
    chosen = [order[labels[order] == index][:each] for index in range(len(CLASSES))]
    return torch.cat(chosen).sort().values


def without(images: Images, positions: Tensor) -> Images:
    keep = torch.ones(len(images), dtype=torch.bool)
    keep[positions] = False
    return images.take(keep.nonzero().flatten())


def split(folder: Path) -> dict[str, Images]:
    """train, valid and calib of the official training set, disjoint; test of the official test set.

    An image that occurs twice in the official files is left out of training if a held-out one equals it.
    """
    rest, official = read_part(folder, "train"), read_part(folder, "test")
    test = official.take(balanced(official.labels, TEST, SEED))
    parts = {"test": test}
    for part, count in (("calib", CALIBRATION), ("valid", VALIDATION)):
        positions = balanced(rest.labels, count, SEED)
        parts[part] = rest.take(positions)
        rest = without(rest, positions)
    held = {row.numpy().tobytes() for part in parts.values() for row in part.pixels}
    twins = [index for index, row in enumerate(rest.pixels) if row.numpy().tobytes() in held]
    parts["train"] = without(rest, torch.tensor(twins, dtype=torch.long))
    say(", ".join(f"{len(images)} {part}" for part, images in parts.items()) + f"; {len(twins)} twins left out")
    return parts


def normalized(pixels: Tensor) -> Tensor:
    """(N, 28, 28) uint8 as the models take it: (N, 3, 28, 28) in [-1, 1]."""
    scaled = (pixels.float() / 255 - 0.5) / 0.5
    return scaled.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


def augmented(pixels: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image shifted by up to PADDING pixels, and mirrored half of the time; and (N,) bool, which are mirrored."""
    count = len(pixels)
    padded = F.pad(pixels, (PADDING,) * 4)
    axis = torch.arange(IMAGE_SIZE)
    shift = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=draw)
    mirror = torch.rand(count, 1, generator=draw) < 0.5
    y, x = axis + shift[0], torch.where(mirror, axis.flip(0), axis) + shift[1]
    return padded[torch.arange(count)[:, None, None], y[:, :, None], x[:, None, :]], mirror.flatten()


# Training


def accuracy(model: nn.Module, images: Images) -> float:
    """Top-1 in percent."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for pixels, labels in zip(images.pixels.split(250), images.labels.split(250), strict=True):
            right += int((model(normalized(pixels)).argmax(1) == labels).sum())
    return 100 * right / len(images)


def rate_at(step: int, steps: int, peak: float) -> float:
    """A linear rise over WARMUP of the steps, then half a cosine down to zero."""
    rise = max(1, int(WARMUP * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def initialize(model: nn.Module) -> None:
    """Weights to start from, in place.

    timm's standard deviation of 0.02 suits widths of several hundred; at 64 signals would start far too small.
    Sine and cosine positions tell neighbours from the first step on; they are trained like any parameter.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    if isinstance(model, VisionTransformer):
        side = model.patch_embed.grid_size
        with torch.no_grad():
            model.pos_embed[:, model.num_prefix_tokens :] = build_sincos2d_pos_embed(list(side), model.embed_dim)


def targets_of(data: Images, teacher: nn.Module | None) -> tuple[Tensor, Tensor]:
    """What a model is to answer for each image as it is, and for its mirror image: probabilities, (N, 10) each."""
    hard = F.one_hot(data.labels, len(CLASSES)).float()
    if teacher is None:
        smooth = hard * (1 - SMOOTHING) + SMOOTHING / len(CLASSES)
        return smooth, smooth
    found = []
    with torch.inference_mode():
        for pixels in (data.pixels, data.pixels.flip(-1)):
            logits = torch.cat([teacher(normalized(part)) for part in pixels.split(250)])
            found.append(GUIDED * (logits / TEMPERATURE).softmax(1) + (1 - GUIDED) * hard)
    return found[0], found[1]


def train(
    name: str, job: Job, parts: dict[str, Images], checkpoints: Path, teacher: nn.Module | None = None
) -> nn.Module:
    """The trained model. A checkpoint after each epoch makes a second start go on there, to the same weights."""
    torch.manual_seed(SEED)
    model = job.build()
    initialize(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": job.decay}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=job.rate, fused=True)
    data = parts["train"]
    plain, mirrored = targets_of(data, teacher)
    batches = len(data) // BATCH
    path = checkpoints / f"{name}.pt"
    first = 0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        if state["epochs"] == job.epochs:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["epoch"]
            say(f"{name}: going on after epoch {first}")
    start = told = time.perf_counter()
    for epoch in range(first, job.epochs):
        draw = torch.Generator().manual_seed(1_000 * SEED + epoch)
        order = torch.randperm(len(data), generator=draw)
        model.train()
        total = 0.0
        for number in range(batches):
            chosen = order[number * BATCH : (number + 1) * BATCH]
            pixels, target = data.pixels[chosen], plain[chosen]
            if epoch < (1 - AS_THEY_ARE) * job.epochs:
                pixels, flipped = augmented(pixels, draw)
                target = torch.where(flipped[:, None], mirrored[chosen], target)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(epoch * batches + number, job.epochs * batches, job.rate)
            loss = F.cross_entropy(model(normalized(pixels)), target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
            if time.perf_counter() - told > 30:
                told = time.perf_counter()
                done = (epoch - first) * batches + number + 1
                left = (told - start) / done * ((job.epochs - first) * batches - done)
                say(f"{name} epoch {epoch + 1}/{job.epochs}: {number + 1}/{batches}, {clock(left)} left")
        found = accuracy(model, parts["valid"])
        spent = clock(time.perf_counter() - start)
        say(f"{name} epoch {epoch + 1}/{job.epochs}: loss {total / batches:.4f}, valid {found:.2f} %, {spent}")
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1,
            "epochs": job.epochs,
        }
        replace(path, lambda temporary, state=state: torch.save(state, temporary))  # type: ignore[misc]
    return model.eval()


# Output


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside path, then put it in its place: the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_images(folder: Path, part: str, images: Images) -> None:
    """fashion_<part>.npz: images (N, 28, 28) uint8, labels (N,) uint8, rows (N,) int32."""
    arrays = {
        "images": images.pixels.numpy(),
        "labels": images.labels.numpy().astype(np.uint8),
        "rows": images.rows.numpy().astype(np.int32),
    }
    replace(folder / f"fashion_{part}.npz", lambda path: np.savez_compressed(path, **arrays))


def write_model(folder: Path, name: str, model: nn.Module) -> nn.Module:
    """Write float16 weights, and give the model with these weights back."""
    rounded = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    path = folder / f"{name}.safetensors"
    replace(path, lambda temporary: save_file(rounded, temporary))
    model.load_state_dict(load_file(path))  # which copies into float32
    return model.eval()


def main() -> None:
    """Train what is asked for, and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with the four idx .gz files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=FILES, help="folder to write to (default: that of the package)")
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "out" / "zoo", help="folder for epoch checkpoints")
    parser.add_argument("--only", choices=sorted(JOBS), help="train one model only")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="vitq-zoo-") as scratch:
        parts = split(find_data(args.data, Path(scratch)))
    for part in ("calib", "test"):
        write_images(args.out, part, parts[part])
    teacher = train(TEACHER, JOBS[TEACHER], parts, args.checkpoints)
    for name, job in JOBS.items():
        if name == TEACHER or args.only not in (None, name):
            continue
        start = time.perf_counter()
        model = write_model(args.out, name, train(name, job, parts, args.checkpoints, teacher))
        result = {
            "model": name,
            "epochs": job.epochs,
            "valid_top1": round(accuracy(model, parts["valid"]), 2),
            "test_top1": round(accuracy(model, parts["test"]), 2),
            "test_images": TEST,
            "seconds": round(time.perf_counter() - start),
        }
        write_text(args.out / f"{name}.json", json.dumps(result, indent=1) + "\n")
        say(json.dumps(result))


if __name__ == "__main__":
    main()
