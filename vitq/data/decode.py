"""Encoded bytes to RGB images, as timm's and torchvision's ImageFolder decode them."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vitq.core.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
ADVICE = "Repair or remove it, or leave such images out with skip_bad=True."


def decode(data: bytes, name: str, *, upright: bool = False) -> Image:
    """RGB image of encoded bytes.

    Args:
        upright: turn it as the camera's rotation tag says. The loaders of classifiers do not; boxes need it.

    Raises:
        DataError: empty, truncated or not an image; says name.
    """
    from PIL import Image, ImageOps

    if not data:
        raise DataError(f"image {name!r} is empty (0 bytes). {ADVICE}")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image) if upright else image)
    except Exception as error:  # PIL's decoders raise many types
        raise DataError(f"image {name!r} cannot be read ({_reason(error)}). {ADVICE}") from error


def to_rgb(image: Image) -> Image:
    """Grayscale, CMYK, palette and alpha images as RGB; transparency is dropped."""
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # The same colours by way of RGBA; the direct way warns.
        image = image.convert("RGBA")
    return image.convert("RGB")


def verify(data: bytes | Path, name: str) -> None:
    """Raise DataError, saying name, if bytes or a file do not start like an image. Decodes no pixels."""
    from PIL import Image

    try:
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
    except OSError as error:
        raise DataError(f"image {name!r} cannot be read ({error.strerror}). {ADVICE}") from error
    if not size:
        raise DataError(f"image {name!r} is empty (0 bytes). {ADVICE}")
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            image.verify()
    except Exception as error:  # PIL's decoders raise many types
        raise DataError(f"image {name!r} cannot be read ({_reason(error)}). {ADVICE}") from error


def digest(item: Any) -> str:
    """sha256, as hex, of encoded bytes, of a tensor's values or of a PIL image's pixels."""
    if isinstance(item, bytes):
        return hashlib.sha256(item).hexdigest()
    if isinstance(item, Tensor):
        return hashlib.sha256(item.contiguous().numpy().tobytes()).hexdigest()
    return hashlib.sha256(f"{item.mode} {item.size}".encode() + item.tobytes()).hexdigest()


def _reason(error: Exception) -> str:
    # PIL quotes the address of the buffer; the name is said already.
    text = re.split(r" <_io| '", str(error))[0].strip()
    return text or type(error).__name__
