"""The logits in whatever a classifier returns."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vitq.core.errors import InputError


def logits_of(output: object) -> Tensor:
    """The logits in what a model returns: a tensor, `.logits`, `["logits"]`, or a tuple's first element.

    Raises:
        InputError: none of these.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)):
        found = output[0] if output else None
    if isinstance(found, Tensor):
        return found
    keys = f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    raise InputError(
        f"the model returns {type(output).__name__}{keys}, in which no logits were found. A classifier "
        f"returns a tensor, an object or dict with 'logits', or a tuple that begins with them; wrap yours."
    )
