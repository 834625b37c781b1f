"""export_openvino: a frozen model as OpenVINO's own files, an xml and a bin, made of the ONNX file of its profile."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from vitq.core.batches import split
from vitq.core.errors import ExportError, InputError
from vitq.core.files import write_together
from vitq.core.qmodel import QuantModel
from vitq.export.marked import OPSET
from vitq.export.onnx import Checked, Exported, check_request, checked
from vitq.export.parity import BATCH
from vitq.export.runtime import feeds_of, told_by

PROFILE = "openvino"
SUFFIX = ".xml"


def export_openvino(qmodel: QuantModel, path: str | Path, *, data: Any = None, described: str = "") -> Exported:
    """Write a frozen model for OpenVINO: an xml file, and its weights in a bin file of the same name.

    The ONNX file of the profile "openvino" is made and checked as `export_onnx` does; what OpenVINO makes of it is
    written, if that gives the same outputs to the bit. Files that were there stay until then.

    Args:
        path: of the xml file.
        data, described: as in `export_onnx`.

    Raises:
        InputError, MissingExtraError, ExportError: as `export_onnx`; a path that does not end in .xml.
    """
    path = Path(path)
    check_ir_request(path)
    made = checked(qmodel, PROFILE, data, described)
    with tempfile.TemporaryDirectory(prefix="vitq.") as folder:
        xml = Path(folder) / f"model{SUFFIX}"
        _convert(made.data, xml)
        _same_outputs(made, xml)
        products = made.runtime.count_products(str(xml), made.one_input)
        written = {path.with_suffix(".bin"): xml.with_suffix(".bin").read_bytes(), path: xml.read_bytes()}
    write_together(written)  # the bin first: a reader that finds the new xml finds it, too
    size = sum(map(len, written.values()))
    return Exported(path, size, PROFILE, OPSET, made.runtime.name, made.parity, products, made.notes)


def check_ir_request(path: Path) -> None:
    """Refuse what cannot work before anything is loaded; raises as `export_openvino`."""
    if path.suffix != SUFFIX:
        raise InputError(f"OpenVINO's files are an xml and a bin; name the first, such as {path.with_suffix(SUFFIX)}")
    check_request(path, PROFILE)


def _convert(data: bytes, xml: Path) -> None:
    import openvino

    from vitq.export.runtime_openvino import NAME, read

    with told_by(NAME):
        model = read(data)
        # Float operands of 4- and 8-bit weights stay float: OpenVINO reads this where it loads the file.
        model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        openvino.save_model(model, xml, compress_to_fp16=False)


def _same_outputs(made: Checked, xml: Path) -> None:
    first, second = made.runtime.session(made.data), made.runtime.session(str(xml))
    batch = next(iter(split(made.batch, BATCH)))
    wanted, got = (list(s.run(feeds_of(s.inputs, batch)).values()) for s in (first, second))
    if len(wanted) != len(got) or not all(map(torch.equal, wanted, got)):
        raise ExportError(
            "OpenVINO computes something else with its own file than with the ONNX file that it was made of. No file "
            "was written. Export with --to onnx --profile openvino, and report the model"
        )
