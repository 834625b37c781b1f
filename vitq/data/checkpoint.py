"""Weight files: read without running code, matched to a model, refused with the keys that do not fit.

Formats: .safetensors, and .pth .pt .bin through torch.load(weights_only=True).
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitq.core.errors import CheckpointError

WRAPPERS = ("model", "state_dict", "model_ema", "module")  # tried in this order, may be nested
PREFIXES = ("module.", "model.", "_orig_mod.")
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SHOWN = 5  # names per kind in a message


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_finite(state: Mapping[str, Tensor], where: str = "the weights") -> None:
    """Raise CheckpointError, naming the tensors, if any value is NaN or infinite."""
    bad = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all()
    ]
    if bad:
        raise CheckpointError(
            f"{where}: NaN or Inf in {len(bad)} tensor(s): {some(bad)}. "
            "The file is damaged or its training diverged; use another checkpoint."
        )


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name, on the CPU, wrappers like {'model': ...} taken off.

    Raises:
        CheckpointError: no such file, a truncated one, one that holds code, or one without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file {str(path)!r}. Check the path given with --checkpoint.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _unwrap(_read_torch(path), path)
    raise CheckpointError(f"{path.name}: unknown kind of checkpoint. Known: .safetensors, {', '.join(TORCH_SUFFIXES)}.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except Exception as error:  # the reader raises its own type for damage and OSError for the rest
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> Any:
    try:
        # Training scripts keep their arguments beside the weights; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated zip, a foreign file, a pickled object: many types
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise CheckpointError(
                f"{path.name}: holds Python objects besides tensors, and vitq never unpickles code. "
                "Where you trust it, load it yourself and save model.state_dict() as .safetensors."
            ) from error
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return CheckpointError(
        f"{path.name}: cannot be read as a checkpoint ({reason}). "
        "The file is truncated or of another kind; copy or download it again."
    )


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
            if tensors:
                return tensors
            raise CheckpointError(
                f"{path.name}: no weights found; its top-level keys are {some(map(str, content)) or 'none'}. "
                f"Expected names of tensors, or one of the wrappers {', '.join(WRAPPERS)}."
            )
        content = inner
    raise CheckpointError(
        f"{path.name}: holds a {type(content).__name__}, not named tensors. Save model.state_dict() instead."
    )


def _strip_prefixes(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """The renaming of state, by taking prefixes off, that fits the most wanted names; as it is in a tie."""
    best, frontier = state, [state]
    for _ in range(len(PREFIXES)):
        frontier = [
            {name.removeprefix(prefix): tensor for name, tensor in candidate.items()}
            for candidate in frontier
            for prefix in PREFIXES
            if any(name.startswith(prefix) for name in candidate)
        ]
        for candidate in frontier:
            if len(wanted & candidate.keys()) > len(wanted & best.keys()):
                best = candidate
    return best


def load_checkpoint(model: nn.Module, path: str | Path, *, num_classes: int | None = None) -> dict[str, str]:
    """Copy the weights of a file into model, in place; nothing is changed unless everything fits.

    Args:
        num_classes: the classes model was built for, so that a head of another size is named as such.

    Returns:
        {'file': name without its folder, 'sha256': hex}, to record where the weights came from.

    Raises:
        CheckpointError: unreadable file, names or shapes that do not fit, NaN or Inf.
    """
    path = Path(path)
    own = model.state_dict()
    state = _strip_prefixes(read_checkpoint(path), set(own))
    # Older files carry tables (Swin's masks and indices) that the model now computes itself.
    computed = {name for name, _ in model.named_buffers()} - own.keys()
    state = {name: tensor for name, tensor in state.items() if name not in computed}

    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    if wrong and not missing and not unexpected:
        _check_head(path, own, state, wrong, num_classes)
    if missing or unexpected or wrong:
        shapes = [f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in wrong]
        parts = [
            f"{len(names)} {kind}: {some(names)}"
            for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
            if names
        ]
        raise CheckpointError(
            f"{path.name} does not fit {type(model).__name__}. {'; '.join(parts)}. "
            "Give the model name that the weights were saved from."
        )
    check_finite(state, path.name)
    model.load_state_dict(state)
    return {"file": path.name, "sha256": sha256_file(path)}


def _check_head(
    path: Path,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    wrong: list[str],
    num_classes: int | None,
) -> None:
    """Raise CheckpointError about the class count, if that alone explains every wrong shape."""
    pairs = [(tuple(state[name].shape), tuple(own[name].shape)) for name in wrong]
    counts = {given[0] for given, _ in pairs if given}
    only_head = all(given[1:] == built[1:] and built[:1] == (num_classes,) for given, built in pairs)
    if num_classes is not None and only_head and len(counts) == 1:
        count = counts.pop()
        raise CheckpointError(
            f"{path.name} has a head of {count} classes ({some(wrong)}), the model was built for "
            f"{num_classes}. Build it with num_classes={count}, or give a checkpoint of {num_classes}."
        )
