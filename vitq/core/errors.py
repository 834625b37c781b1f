"""Every error that vitq raises on purpose. Each says what is wrong, where, and what to do.

VitqError
├── InputError            an argument that cannot be used (also a ValueError)
│   ├── UnknownNameError  no such recipe, model, format …; carries near-miss hints
│   ├── DataError         images or labels that cannot be used
│   └── CheckpointError   a weight file that does not fit the model
├── MissingExtraError     an optional package is not installed (also an ImportError)
├── TraceError            the model could not be traced
├── SiteNotFoundError     a requested site does not exist in the model
├── NotFittedError        a quantizer was used before its scale was chosen
├── CompositionError      recipe, modifiers or passes do not fit together
├── ArtifactError         a saved artifact that cannot be written or read
└── ExportError           a model that cannot be exported, or a file that computes something else
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VitqError(Exception):
    """Base of every error raised on purpose."""


class InputError(VitqError, ValueError):
    """An argument that cannot be used."""


class UnknownNameError(InputError):
    """A name that nothing is registered under."""

    def __init__(self, kind: str, name: str, known: Iterable[str], advice: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else f"Known: {', '.join(known)}."
        super().__init__(f"unknown {kind} {name!r}. {hint}{' ' + advice if advice else ''}")


class DataError(InputError):
    """Images or labels that cannot be used."""


class CheckpointError(InputError):
    """A weight file that does not fit the model."""


class MissingExtraError(VitqError, ImportError):
    """An optional package is needed and is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}. Install it with: pip install 'vitq[{extra}]'")


class TraceError(VitqError):
    """The model could not be traced, or does not do again what it did when it was traced."""


class SiteNotFoundError(VitqError):
    """A requested site does not exist in the model."""


class NotFittedError(VitqError):
    """A quantizer was used before its scale was chosen."""


class CompositionError(VitqError):
    """Recipe, modifiers or passes do not fit together."""


class ArtifactError(VitqError):
    """A saved artifact that cannot be written or read."""


class ExportError(VitqError):
    """A model that cannot be exported, or an exported file that computes something else."""
