"""What the benchmarks share: the files they measure on, where a number comes from, and progress with time left."""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitq.data.images import ImageSet, open_images
from vitq.data.source import LoadedModel, load_model
from vitq.evaluate.classify import ClassifyResult
from vitq.evaluate.metrics import mean_over_seeds

Pair = tuple[float, float]  # ours, reference
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
MODEL = "deit_tiny_patch16_224"
IMAGES = 32  # calibration images: all of one list
SPLITS = ("ablate", "report")
WRITTEN_BY_BENCHMARKS = ("results", "README.md", "docs/zoo.md", "docs/methods")


@dataclass(frozen=True)
class Shared:
    """The folder of weights, photos and stored predictions; nothing of it is in the repository."""

    path: Path

    @property
    def missing(self) -> str:
        """Why it cannot be used, or ""."""
        needed = (self.checkpoint, self.sample / "calib", self.peers)
        lacks = [part.relative_to(self.path).as_posix() for part in needed if not part.exists()]
        return f"{self.path} lacks {', '.join(lacks)}; name the folder with --shared" if lacks else ""

    @property
    def checkpoint(self) -> Path:
        return self.path / "models" / f"{MODEL}.safetensors"

    @property
    def sample(self) -> Path:
        return self.path / "data" / "imagenet_sample"

    @property
    def peers(self) -> Path:
        return self.path / "reference" / "peer_predictions"

    def model(self) -> LoadedModel:
        """DeiT-Tiny with real weights."""
        return load_model(MODEL, self.checkpoint)

    def calibration(self, seed: int) -> ImageSet:
        """The images that official code was calibrated on with this seed, in its order."""
        return open_images(self.peers / f"calibration_seed{seed}.txt", root=self.sample)

    def photos(self, count: int, loaded: LoadedModel) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """(calibration photos, as many others, where all that comes from) for errors on what was not looked at."""
        calibration = self.calibration(0).subset(range(count)).tensor(loaded.preprocess)
        split = open_images(self.sample / "ablate", num_classes=loaded.num_classes)
        others = split.subset(range(0, len(split), len(split) // count)).tensor(loaded.preprocess)
        where = {"kind": "simulated", "calibration": f"{count} of calibration_seed0.txt", "seed": 0}
        where |= {"evaluation": f"{len(others)} of imagenet_sample/ablate"} | self.weights() | provenance()
        return calibration, others, where

    def weights(self) -> dict[str, str]:
        """Which weights, for a results row."""
        digest = hashlib.sha256(self.checkpoint.read_bytes()).hexdigest()
        return {"weights": self.checkpoint.name, "weights_sha256": digest[:12]}


class Steps:
    """Lines on stderr: how far, and how long it will take at the pace so far."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.perf_counter()

    def say(self, text: str) -> None:
        """A line that is no step."""
        print(f"        {text}", file=sys.stderr, flush=True)

    def step(self, text: str) -> None:
        """One more step is done."""
        self.done += 1
        left = (time.perf_counter() - self.start) / self.done * (self.total - self.done)
        print(f"[{self.done:2d}/{self.total}] {text}; {clock(left)} left", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """90 as 1m30s."""
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Classes, without gradients."""
    with torch.no_grad():
        return cast(Tensor, model(x)).argmax(1)


def float_forward(model: nn.Module, x: Tensor) -> float:
    """Seconds of the stock model on one batch: inference mode, median of 5."""
    with torch.inference_mode():
        model(x)
        return statistics.median(timed(partial(model, x)) for _ in range(5))


def medians(pairs: Sequence[Pair]) -> dict[str, str]:
    """Of both sides, for the row."""
    ours, reference = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"seconds": f"{ours:.5g}", "reference_seconds": f"{reference:.5g}"}


def text(value: float) -> str:
    """Whole numbers in full, others to five digits."""
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def top(found: ClassifyResult) -> dict[str, Any]:
    """Top-1 with its interval, and top-5."""
    json = found.to_json()
    low, high = json["top1_interval"]
    return {"top1": json["top1"], "top1_low": low, "top1_high": high, "top5": json["top5"]}


def bootstrap(values: Tensor) -> tuple[float, float, float]:
    """Mean of (seeds, images) and its 95 % interval over resampled images, for these very seeds, in percent."""
    mean, low, high = mean_over_seeds(values, draw_seeds=False)
    return round(mean, 4), round(low, 4), round(high, 4)


def fresh(words: list[str]) -> str:
    """What a new interpreter prints."""
    return subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True).stdout


def resident(field: str) -> float:
    """VmHWM (peak) or VmRSS (now) of this process, MiB. On Linux, ru_maxrss starts at the parent's peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def parser(doc: str | None, epilog: str, *, shared: bool = True, quick: bool = True) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=(doc or "").split("\n")[0], epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if shared:
        text = "folder with models/, data/ and reference/ (default: ../shared beside the repository)"
        made.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help=text)
    made.add_argument("--out", type=Path, help="folder of the CSV files (default: results/; a new one for --quick)")
    if quick:
        made.add_argument("--quick", action="store_true", help="few images, one go: shows that it runs, no more")
    return made


def results_folder(args: argparse.Namespace) -> Path:
    """Where to write; numbers of a quick run never come among the real ones by accident."""
    if args.out is not None:
        return Path(args.out)
    if not args.quick:
        return RESULTS
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="vitq-quick-"))
    print(f"--quick: results go to {folder}", file=sys.stderr)
    return folder


def use_all_cores() -> int:
    """One thread per core that this process may use, or as many as OMP_NUM_THREADS says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", cores)))
    return cores


@cache
def provenance() -> dict[str, object]:
    """Code and machine of this run, as at its first call."""
    cores = use_all_cores()
    return {
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": cores,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else "",
    }


def commit() -> str:
    """Short hash, with +dirty if anything differs from it other than what benchmarks write."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", *(f":(exclude){name}" for name in WRITTEN_BY_BENCHMARKS))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+dirty" if changed else "")


def cpu_model() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    import platform

    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*words: str) -> str:
    run = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    return run.stdout.strip()
