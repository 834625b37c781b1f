"""DeiT-Tiny with real weights in OpenVINO, as times faster than ONNX Runtime's float: results/openvino.csv.

Every variant runs once per round on the same photos, one thread each, in turn; `value` is the median over rounds of
float ONNX Runtime's seconds over its own, `low` and `high` are quartiles. Shapes are fixed but where a row says free.

    onnxruntime float, openvino float   the float model, exported by torch
    minmax                              vitq's profile openvino; zero-points leave rests behind products
    minmax symmetric                    the same with the recipe's option symmetric=true, which leaves none
    whole, float                        matrix products, in whole numbers and in float
    equal_codes                         of the export's parity, on `images` photos of ablate
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import MODEL, Shared, Steps, parser, provenance, results_folder, text
from torch import Tensor, nn

import vitq
from vitq.data.images import open_images
from vitq.export.runtime_openvino import core, exact, read
from vitq.report.table import append_rows

KEY = ("model", "variant", "bits", "batch", "shapes")
BITS = "w8a8"
BATCHES = (1, 16)
SETTINGS: dict[str, dict[str, Any]] = {"minmax": {}, "minmax symmetric": {"symmetric": True}}
WARM = 3
BASE = "onnxruntime float"


def float_onnx(model: nn.Module, images: Tensor, path: Path) -> bytes:
    """The float model as torch exports it, for any batch size."""
    shapes = ({0: torch.export.Dim("batch")},)
    names: Any = {"input_names": ["images"], "output_names": ["output"]}
    made = torch.onnx.export(model, (images[:2],), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    assert made is not None
    made.save(str(path))
    return path.read_bytes()


def in_onnxruntime(data: bytes, images: Tensor) -> Callable[[], object]:
    """One run of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": images.numpy()})


def in_openvino(data: bytes, images: Tensor, free: bool) -> Callable[[], object]:
    """One run of a file."""
    model = read(data)
    if not free:
        model.reshape(list(images.shape))
    request = core().compile_model(model, "CPU", exact() | {"INFERENCE_NUM_THREADS": 1}).create_infer_request()
    return lambda: request.infer([images.numpy()], share_inputs=True)


def rounds(work: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Seconds of everything, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(count + WARM):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if number >= WARM:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> int:
    """Entry point."""
    options = parser(__doc__, "example: python benchmarks/openvino_speed.py --rounds 100")
    options.add_argument("--rounds", type=int, default=60, help="at batch 1; a sixth of it at batch 16")
    options.add_argument("--images", type=int, default=64, help="photos that parity is checked on")
    args = options.parse_args()
    shared = Shared(args.shared)
    if shared.missing:
        options.error(f"nothing can be measured: {shared.missing}")
    where = {"model": MODEL, "bits": BITS} | shared.weights() | provenance()
    loaded = shared.model()
    calibration = shared.calibration(0).tensor(loaded.preprocess)
    count = 16 if args.quick else max(args.images, max(BATCHES))
    photos = open_images(shared.sample / "ablate", labels="none").sample(count, 0).tensor(loaded.preprocess)
    checked = photos[: 2 if args.quick else args.images]
    steps = Steps(len(SETTINGS) + len(BATCHES))
    files: dict[str, bytes] = {}
    about: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        plain = float_onnx(loaded.model, photos, path)
        for name, given in SETTINGS.items():
            qmodel = vitq.quantize(loaded.model, "minmax", BITS, calibration, options=given)
            made = vitq.export_onnx(qmodel, path, "openvino", data=checked)
            whole, other = (sum(made.products[kind].values()) for kind in ("whole", "float"))
            codes = f"{made.parity.equal_codes:.7f}"
            about[name] = {"whole": whole, "float": other, "equal_codes": codes, "images": made.parity.images}
            files[name] = path.read_bytes()
            steps.step(f"{name}: {whole} of {whole + other} products in whole numbers, {codes} of the codes")
    file = results_folder(args) / "openvino.csv"
    for batch in BATCHES:
        images = photos[:batch]
        work = {BASE: in_onnxruntime(plain, images), "openvino float": in_openvino(plain, images, False)}
        for name, data in files.items():
            work[name] = in_openvino(data, images, False)
            work[f"{name}, free"] = in_openvino(data, images, True)
        taken = rounds(work, 2 if args.quick else max(args.rounds // (1 if batch == 1 else 6), 4))
        for name, seconds in taken.items():
            variant, _, shapes = name.partition(", ")
            ratios = [base / own for base, own in zip(taken[BASE], seconds, strict=True)]
            low, value, high = statistics.quantiles(ratios, n=4)
            row: dict[str, Any] = {"model": MODEL, "variant": variant, "bits": BITS, "batch": batch}
            row |= {"shapes": shapes or "fixed", "value": text(value), "low": text(low), "high": text(high)}
            row |= {"seconds": text(statistics.median(seconds)), "rounds": len(seconds)}
            row |= about.get(variant, {"whole": "", "float": "", "equal_codes": "", "images": ""})
            append_rows(file, [row | where], KEY)
            steps.say(f"batch {batch} {name}: x{value:.2f} [{low:.2f} .. {high:.2f}]")
        steps.step(f"batch {batch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
