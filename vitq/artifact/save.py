"""Write an artifact: everything is checked first, and an old one stays until the new one is whole."""

from __future__ import annotations

import dataclasses
import errno
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitq.artifact import schema
from vitq.artifact.card import model_card
from vitq.artifact.schema import CARD, CONFIG, TENSORS
from vitq.core.errors import ArtifactError
from vitq.core.files import NAME_PART, write_folder
from vitq.core.qmodel import QuantModel
from vitq.core.roles import WEIGHT
from vitq.quantizers.base import Quantizer
from vitq.quantizers.common import AnyQuantizer
from vitq.quantizers.packing import pack

PACKABLE_BITS = 8


@dataclasses.dataclass(frozen=True)
class Form:
    """What another library wants of the folder.

    Attributes:
        config: the text of config.json, for the artifact's own.
        tensors: further tensors of model.safetensors (wrapped.NOTICE).
        files: further files, name -> text.
        how: Python that loads the folder, for the model card; None for the usual.
        check: is called with the folder before it is put in place; what it raises keeps it from that.
    """

    config: Callable[[str], str] = str
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    how: str | None = None
    check: Callable[[Path], object] = lambda folder: None


def check_destination(path: str | Path, *, force: bool = False) -> None:
    """Refuse a destination that cannot be written, before any work.

    Raises:
        ArtifactError: it exists and `force` is not set, or it is not ours to replace, or not writable.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_dir():
            raise ArtifactError(f"{path} is a file; choose a folder")
        here = Path(os.path.realpath(path))
        if here == Path.cwd() or here in Path.cwd().parents or here.is_mount():
            raise ArtifactError(
                f"{path} is the current folder, one above it, or a mount point, which cannot be replaced in one step; "
                f"choose a folder below it, such as {path / 'quantized'}"
            )
        if path.is_dir() and any(path.iterdir()):
            if not force:
                raise ArtifactError(f"{path} exists; choose another folder, or replace it with force=True (--force)")
            if not (path / CONFIG).is_file() or not (path / TENSORS).is_file():
                raise ArtifactError(f"{path} is not an artifact, so it is not replaced; choose another folder")
        # Permissions, read-only file systems and folders that are files: trying finds them all.
        parent = next(p for p in here.parents if p.exists())
        os.rmdir(tempfile.mkdtemp(prefix=f".{here.name[:NAME_PART]}.", dir=parent))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}; choose another folder") from error


def save(
    qmodel: QuantModel, path: str | Path, *, force: bool = False, metrics: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write a frozen model. An old artifact stays as it is until the new one is whole.

    Args:
        metrics: what was measured, kept in the artifact.

    Returns:
        `bytes` (of all files), `effective_bits`.

    Raises:
        ArtifactError: not frozen, a destination that exists without `force`, or a failed write.
    """
    return save_as(qmodel, path, Form(), force=force, metrics=metrics)


def save_as(
    qmodel: QuantModel,
    path: str | Path,
    form: Form,
    *,
    force: bool = False,
    metrics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """As `save`, in a form that another library reads, too."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    check_destination(path, force=force)
    if not qmodel.frozen:
        raise ArtifactError("only a frozen model can be saved; call qmodel.freeze() first")
    tensors, packed = _tensors(qmodel)
    written: dict[str, Any] = {}

    def fill(folder: Path) -> None:
        digests = {schema.BOUND: schema.binding(schema.describe(qmodel, packed, "", {}))}
        save_file(tensors | dict(form.tensors), folder / TENSORS, metadata=digests)
        config = schema.describe(qmodel, packed, schema.sha256_of(folder / TENSORS), dict(metrics or {}))
        (folder / CONFIG).write_text(form.config(schema.dump(config)), encoding="utf-8")
        card = model_card(config, (folder / TENSORS).stat().st_size, form.how)
        (folder / CARD).write_bytes(card.encode("utf-8", errors="replace"))
        for name, text in form.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        form.check(folder)
        written["bytes"] = sum(f.stat().st_size for f in folder.iterdir())

    try:
        write_folder(path, fill, replace=force)
    except (OSError, SafetensorError) as error:
        if not force and getattr(error, "errno", None) in (errno.ENOTEMPTY, errno.EEXIST):
            raise ArtifactError(
                f"{path} was filled by another process in the meantime; choose another folder, or replace it with "
                f"force=True (--force)"
            ) from error
        raise ArtifactError(f"{path} could not be written: {error}; what was there before is unchanged") from error
    return written | {"effective_bits": qmodel.effective_bits()}


def _tensors(qmodel: QuantModel) -> tuple[dict[str, Tensor], dict[str, schema.Packed]]:
    tensors: dict[str, Tensor] = {}
    packed: dict[str, schema.Packed] = {}
    coded: set[int] = set()
    for site in qmodel.sites():
        quantizer = qmodel.quantizers[site]
        assert isinstance(quantizer, AnyQuantizer)
        for field, value in quantizer.params().items():
            tensors[f"site/{site.id}/{field}"] = _smallest(value.detach().cpu())
        weight = qmodel.weight(site)
        if site.role == WEIGHT and weight is not None and quantizer.bits <= PACKABLE_BITS:
            assert isinstance(quantizer, Quantizer)
            codes = quantizer.encode(weight.detach())
            tensors[f"codes/{site.id}"] = pack(codes, quantizer.bits)
            if not torch.equal(quantizer.decode(codes).to(weight.dtype), weight):
                raise ArtifactError(
                    f"{site.id}: its values are not those of its codes, so the artifact would compute something else; "
                    f"were weights changed, or cast to another type, after the model was frozen?"
                )
            dtype = str(weight.dtype).removeprefix("torch.")
            packed[site.id] = schema.Packed(str(site.param), quantizer.bits, list(weight.shape), dtype)
            coded.add(id(weight))
    # Tied parameters come under several names; codes serve all of them.
    params = {n: p for n, p in qmodel.model.named_parameters(remove_duplicate=False) if id(p) in coded}
    # A model of transformers holds its quantizers itself, so that they move along with it.
    inside = tuple(f"{name}." for name, module in qmodel.model.named_modules() if module is qmodel.quantizers)
    for name, value in qmodel.model.state_dict().items():
        if name not in params and not name.startswith(inside):
            tensors[f"state/{name}"] = value.detach().cpu().contiguous().clone()
    for number, rewrite in enumerate(qmodel.rewrites):
        for name, value in rewrite.tensors.items():
            tensors[f"rewrite/{number}/{name}"] = value.detach().cpu().contiguous().clone()
    return tensors, packed


def _smallest(value: Tensor) -> Tensor:
    """Whole numbers in the narrowest integers that hold them; everything else as float32."""
    if bool((value != value.round()).any()):
        return value.contiguous().clone()
    for dtype in (torch.uint8, torch.int16, torch.int32):
        limits = torch.iinfo(dtype)
        if value.min() >= limits.min and value.max() <= limits.max:
            return value.to(dtype).contiguous()
    return value.contiguous().clone()
