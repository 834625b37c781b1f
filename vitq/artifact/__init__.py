"""Artifacts: a folder with packed codes, scales, the plan, and where everything came from.

    model.safetensors   codes/<site>          packed codes of a weight (quantizers/packing.py)
                        site/<site>/<field>   scales and zero-points
                        state/<name>          everything else of the model's state, as it is
                        rewrite/<n>/<name>    tensors of the n-th rewrite
    config.json         the rest (`ArtifactConfig`), with a digest of the tensors and of itself
    README.md           a model card

No pickle, no code: loading builds the architecture by its name, or takes one as `model=`.
docs/decisions/artifact_schema.md has the reasons.
"""

from vitq.artifact.load import load as load
from vitq.artifact.save import check_destination as check_destination
from vitq.artifact.save import save as save
