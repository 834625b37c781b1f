"""The config.json of a Hugging Face folder, with the artifact's document in its `quantization_config`.

The document is one text inside of it, so that no library that reads and writes such files can change a value. What
stands beside it (recipe, bits) is for people, and must say the same.
"""

from __future__ import annotations

import json
from typing import Any

from vitq.core.errors import ArtifactError

METHOD = "vitq"  # the quant_method, by which transformers finds who loads the model
ENTRY = "quantization_config"
DOCUMENT = "document"
# A tensor of this name, which transformers lists if it does not know vitq, is in model.safetensors beside an artifact's
# own ones. With it, tensors without a slash in their names are for transformers, and loading leaves them aside.
NOTICE = "quantized_by_vitq.import_vitq_before_from_pretrained"


def entry_of(document: str) -> dict[str, Any]:
    """What is the `quantization_config` of an artifact's config.json (schema.dump)."""
    data = json.loads(document)
    return {
        "quant_method": METHOD,
        "recipe": data["plan"]["recipe"]["name"],
        "bits": data["plan"]["bits"],
        "vitq_version": data["vitq_version"],
        DOCUMENT: json.dumps(data, sort_keys=True, separators=(",", ":")),
    }


def is_wrapped(data: Any) -> bool:
    """Whether this is a Hugging Face config.json whose quantization is ours."""
    entry = data.get(ENTRY) if isinstance(data, dict) else None
    return isinstance(entry, dict) and entry.get("quant_method") == METHOD


def document_in(entry: dict[str, Any]) -> dict[str, Any]:
    """The artifact's document in a `quantization_config`, as JSON values.

    Raises:
        ArtifactError: it is missing, cannot be read, or what stands beside it says something else.
    """
    try:
        data = json.loads(entry[DOCUMENT])
        expected = entry_of(entry[DOCUMENT])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"the {ENTRY} of this model has no artifact in it ({type(error).__name__}: {error}); it is damaged: "
            f"save or export the model again"
        ) from error
    edited = sorted(name for name in expected if name != DOCUMENT and entry.get(name) != expected[name])
    if edited:
        raise ArtifactError(f"the {ENTRY} of this model was edited: {', '.join(edited)} differ from its {DOCUMENT!r}")
    assert isinstance(data, dict)  # entry_of looked names up in it
    return data
