"""The model card that goes with an artifact."""

from __future__ import annotations

from typing import Any

from vitq.artifact.schema import ArtifactConfig


def model_card(config: ArtifactConfig, tensor_bytes: int, how: str | None = None) -> str:
    """Markdown that says what this is, how accurate it is, and how to load it.

    Args:
        how: Python that loads the folder, where `vitq.load` is not the usual way.
    """
    source = config.source or {}
    recipe = config.plan["recipe"]
    named = source.get("name") or source.get("spec")
    by_name = source.get("kind") in ("timm", "hf", "torchvision", "zoo")
    lines = [
        f"# {named or 'Vision Transformer'}, {recipe['name']}, {config.plan['bits']}",
        "",
        f"Quantized with vitq {config.vitq_version} by the recipe `{recipe['name']}` ({recipe['paper']}).",
        f"Weights take {config.effective_bits['weight']} bits each with their scales; `model.safetensors` has "
        f"{tensor_bytes:,} bytes.",
        f"All accuracies below are *{config.kind}*: codes and scales are those of an integer run, the arithmetic "
        f"is float32.",
        "",
        *_metrics(config.metrics),
        "## Load",
        "",
        "```python",
        how or f'import vitq\n\nqmodel = vitq.load("path/to/this/folder"{"" if by_name else ", model=architecture"})',
        "```",
        "",
        "## Calibration",
        "",
        *(f"- {key}: {value}" for key, value in config.provenance.items() if not isinstance(value, (list, dict))),
        "",
    ]
    if recipe["note"]:
        lines += ["## Note", "", recipe["note"], ""]
    return "\n".join(lines)


def _metrics(metrics: dict[str, Any]) -> list[str]:
    rows = [(k, v) for k, v in metrics.items() if isinstance(v, (int, float, str)) and not isinstance(v, bool)]
    if not rows:
        return []
    return ["## Measured", "", "| what | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows), ""]
