"""export_onnx: a frozen model as one ONNX file that its runtime was seen to compute the same codes with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitq.core.batches import example_from, first_of, leading_size, split
from vitq.core.errors import ExportError, InputError, UnknownNameError
from vitq.core.files import write_bytes
from vitq.core.qmodel import QuantModel
from vitq.core.roles import WEIGHT
from vitq.core.site import Site
from vitq.export.lower import PROFILES, Profile, lower_marks
from vitq.export.marked import OPSET, to_marked
from vitq.export.parity import Parity, check_parity
from vitq.export.runtime import Products, Runtime, need_packages, runtime_named
from vitq.export.weights import stored_bits
from vitq.quantizers.dynamic import DynamicQuantizer

SEEDED = 8  # inputs that are drawn where no images are given


@dataclass(frozen=True)
class Exported:
    """What was written, and what it was seen to do.

    Attributes:
        path, bytes: of the file; of an xml file with the bin file beside it.
        profile, opset: what it was written for.
        runtime: what ran it.
        parity: beside the simulated model.
        products: of the graph as that runtime runs it, `whole` and `float`: operator -> how many.
        notes: what else is worth knowing.
    """

    path: Path
    bytes: int
    profile: str
    opset: int
    runtime: str
    parity: Parity
    products: Products
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "file": str(self.path),
            "bytes": self.bytes,
            "profile": self.profile,
            "opset": self.opset,
            "runtime": self.runtime,
            "parity": self.parity.to_json(),
            "products": self.products,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Checked:
    """An ONNX file that is not written yet, and that holds.

    Attributes:
        data: its bytes.
        batch: inputs that it was run on.
        runtime: what ran it.
        parity: what was seen.
        notes: what else is worth knowing.
    """

    data: bytes
    batch: Any
    runtime: Runtime
    parity: Parity
    notes: tuple[str, ...]

    @property
    def one_input(self) -> Any:
        """To count products on."""
        return next(iter(split(self.batch, 1)))


def export_onnx(
    qmodel: QuantModel,
    path: str | Path,
    profile: str = "ort",
    *,
    data: Any = None,
    opset: int = OPSET,
    described: str = "",
) -> Exported:
    """Write a frozen model as one ONNX file, and check it in its runtime. A file that was there stays until then.

    Args:
        profile: "ort" for ONNX Runtime, whole numbers next to products; "openvino" for OpenVINO, the same in signed
            bytes; "reference" for local functions of standard operators in float32 throughout.
        data: images as the model takes them, to check parity on; random ones of the example's shape without.
        opset: of ONNX; OPSET is the first that can hold the file.
        described: where the images come from, for the report.

    Raises:
        InputError: an unknown profile, an opset too old, a folder that is not there, or a format without levels of its
            own (parity mode of a recipe).
        MissingExtraError: onnx, onnxscript or the profile's runtime is not installed.
        ExportError: not frozen, torch cannot export it, or the file computes something else; there is no file then, or
            the old one.
    """
    path = Path(path)
    check_request(path, profile, opset)
    made = checked(qmodel, profile, data, described)
    write_bytes(path, made.data)
    products = made.runtime.count_products(made.data, made.one_input)
    return Exported(path, len(made.data), profile, OPSET, made.runtime.name, made.parity, products, made.notes)


def checked(qmodel: QuantModel, profile: str, data: Any, described: str) -> Checked:
    """Make the file of a profile and run it beside the simulated model; raises as `export_onnx`."""
    runtime = runtime_named(PROFILES[profile].runtime)
    need_packages(runtime)
    check_model(qmodel, PROFILES[profile])
    if data is None:
        data, described = seeded(qmodel.example), f"{SEEDED} random inputs"
    import onnx_ir

    model = to_marked(qmodel, first_of(data))
    lower_marks(model, qmodel, PROFILES[profile])
    try:
        written = onnx_ir.serde.serialize_model(model).SerializeToString()
    except ValueError as error:
        raise ExportError(f"the model does not fit one ONNX file of 2 GB: {error}") from error
    parity = check_parity(qmodel, written, data, described or f"{leading_size(data)} images given", runtime)
    return Checked(written, data, runtime, parity, _notes(qmodel))


def check_request(path: Path, profile: str, opset: int = OPSET) -> None:
    """Refuse what cannot work before anything is loaded; raises as `export_onnx`."""
    if profile not in PROFILES:
        raise UnknownNameError("export profile", profile, PROFILES)
    if opset != OPSET:
        raise InputError(
            f"opset {opset}: files are written for opset {OPSET}, the first with 4-bit weights; leave it out"
        )
    check_place(path, "model.onnx")


def check_place(path: Path, such_as: str) -> None:
    """Refuse a place where no file can be written.

    Args:
        such_as: a name for the file.

    Raises:
        InputError: a folder, or in one that is not there or cannot be written to.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file, such as {path / such_as}")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist; make it first, or write somewhere else")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"the folder {path.parent} cannot be written to; write somewhere else")


def check_model(qmodel: QuantModel, profile: Profile) -> None:
    """Refuse a model that has no integer form, or none in a profile.

    Raises:
        InputError: it is not float32, takes a list of images, or a site's format does not fit its bits or the profile.
        ExportError: not frozen.
    """
    if not qmodel.frozen:
        raise ExportError("only a frozen model can be exported; call qmodel.freeze() first")
    other = {str(p.dtype) for p in qmodel.parameters() if p.is_floating_point()} - {"torch.float32"}
    if other:
        raise InputError(f"export takes float32 models, this one has {', '.join(sorted(other))}; export model.float()")
    if isinstance(qmodel.example, dict) and "list" in qmodel.example:
        raise InputError(
            "this model takes a list of images of their own sizes, as torchvision's detectors do; one tensor of a free "
            "batch size is what is exported. Quantize and export its backbone as a model by itself"
        )
    for site in qmodel.sites():
        quantizer = qmodel.quantizers[site]
        if isinstance(quantizer, DynamicQuantizer):
            if not profile.dynamic:
                raise InputError(
                    f"{site.id}: the format {qmodel.formats[site.id].kind} is dynamic, and {profile.name} rounds its "
                    f"arithmetic otherwise here and there; use --profile ort or reference, or quantize with a static "
                    f"format there"
                )
        elif not quantizer.exportable:
            raise InputError(
                f"{site.id}: {quantizer} uses a paper's own arithmetic (parity mode), which does not fit "
                f"{quantizer.bits}-bit codes; quantize without it (parity=false) to export"
            )


def seeded(description: Any) -> Any:
    """A batch of random inputs of the example's shape."""
    match description:
        case {"tensor": [_, *shape], "dtype": str(kind)}:
            return example_from({"tensor": [SEEDED, *shape], "dtype": kind})
        case {"dict": dict(items)}:
            return {name: seeded(item) for name, item in items.items()}
        case {"tuple": [*items]} | {"list": [*items]}:
            return tuple(seeded(item) for item in items)
    return example_from(description)


def _notes(qmodel: QuantModel) -> tuple[str, ...]:
    notes = []
    widened: dict[tuple[int, int], int] = {}
    for site in qmodel.sites(WEIGHT):
        bits = qmodel.quantizers[site].bits
        if stored_bits(bits) != bits:
            widened[(bits, stored_bits(bits))] = widened.get((bits, stored_bits(bits)), 0) + 1
    for (bits, stored), count in sorted(widened.items()):
        notes.append(f"{count} weights of {bits} bits are stored as {stored}-bit numbers, which ONNX has")
    dynamic = [site for site in qmodel.sites() if isinstance(qmodel.quantizers[site], DynamicQuantizer)]
    if dynamic:
        notes.append(
            f"{len(dynamic)} sites have a dynamic format ({_kinds(qmodel, dynamic)}): exported as its arithmetic"
        )
    return tuple(notes)


def _kinds(qmodel: QuantModel, sites: list[Site]) -> str:
    return ", ".join(sorted({qmodel.formats[site.id].kind for site in sites}))
