"""A number format as data: kind, bits, granularity, options. The formulas live in `quantizers/`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitq.core.errors import InputError

Scalar = bool | int | float | str
PER_ROW = "row"  # of a dynamic format: along the dimension that the product sums over
_PER = re.compile(rf"tensor|channel|head|token|{PER_ROW}|group:[1-9]\d*")
FLOAT_FROM = 16  # w4a16 means float activations, as everywhere in the field


@dataclass(frozen=True)
class Format:
    """Number format of one site.

    Attributes:
        kind: registered quantizer: "uniform", "log2", "logsqrt2", …
        bits: code width; at most 2**bits values per scale group.
        per: what shares one scale: the whole "tensor", a "channel", "head" or "token", or a "group:K" of
            K neighbouring channels (for weights: of input channels, within each output channel). Dynamic formats
            have one per "row".
        options: further keyword arguments of the quantizer, sorted by name.

    Raises:
        InputError: bits outside of 2 … 16, or an unknown granularity.
    """

    kind: str
    bits: int
    per: str = "tensor"
    options: tuple[tuple[str, Scalar], ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise InputError(f"format {self.kind!r} with {self.bits} bits: bits must be 2 to 16")
        if not _PER.fullmatch(self.per):
            raise InputError(
                f"unknown granularity {self.per!r}; use tensor, channel, head, token, row or group:K (K >= 1)"
            )
        object.__setattr__(self, "options", tuple(sorted(self.options)))

    @classmethod
    def of(cls, kind: str, bits: int, per: str = "tensor", **options: Scalar) -> Format:
        """Build a format with its options written as keywords."""
        return cls(kind, bits, per, tuple(options.items()))

    def with_bits(self, bits: int) -> Format:
        """The same format at another width."""
        return Format(self.kind, bits, self.per, self.options)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back."""
        data: dict[str, Any] = {"kind": self.kind, "bits": self.bits, "per": self.per}
        return data | ({"options": dict(self.options)} if self.options else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Format:
        """Inverse of `to_json`.

        Raises:
            InputError: unknown or missing fields.
        """
        unknown = set(data) - {"kind", "bits", "per", "options"}
        if unknown or not {"kind", "bits"} <= set(data):
            raise InputError(f"not a format: {dict(data)!r}; it needs kind and bits, and may have per, options")
        return cls.of(data["kind"], data["bits"], data.get("per", "tensor"), **data.get("options", {}))

    def __str__(self) -> str:
        options = "".join(f" {k}={v}" for k, v in self.options)
        return f"{self.kind}{self.bits}/{self.per}{options}"


@dataclass(frozen=True)
class Bits:
    """Widths of weights and activations; 16 means float, None means not said (only in overrides)."""

    weight: int | None
    act: int | None

    @classmethod
    def parse(cls, text: str, *, partial: bool = False) -> Bits:
        """Read `w4a4`, `w4a16` (16 and above mean float); with `partial` also `w4`, `a8` or `float`.

        Raises:
            InputError: not of that form, or a width that no format has.
        """
        cleaned = text.strip().lower()
        if partial and cleaned == "float":
            return cls(FLOAT_FROM, FLOAT_FROM)
        match = re.fullmatch(r"(?:w(\d+))?(?:a(\d+))?", cleaned)
        given = [None if digits is None else int(digits) for digits in match.groups()] if match else []
        if not any(given) or (None in given and not partial):
            near = f"; did you mean {_near(cleaned)}?" if _near(cleaned) else ""
            raise InputError(f"bits {text!r} are not understood; write for example w4a4, w8a8, w4a8 or w4a16{near}")
        for what, width in zip(("weight", "activation"), given, strict=True):
            if width is not None and (width < 2 or 8 < width < FLOAT_FROM):
                raise InputError(f"bits {text!r}: {what}s have 2 to 8 bits, or 16 for float; got {width}")
        return cls(*(None if width is None else min(width, FLOAT_FROM) for width in given))

    def __str__(self) -> str:
        return "".join(f"{k}{v}" for k, v in (("w", self.weight), ("a", self.act)) if v is not None)


def _near(text: str) -> str:
    digits = re.findall(r"\d+", text)
    return f"w{digits[0]}a{digits[1]}" if len(digits) == 2 and text != f"w{digits[0]}a{digits[1]}" else ""
