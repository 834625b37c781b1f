"""`--to hf`: a folder that `from_pretrained` of transformers loads after `import vitq`, and `vitq.load` as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitq.artifact import check_destination
from vitq.artifact.save import save_as
from vitq.core.errors import ExportError, MissingExtraError
from vitq.core.qmodel import QuantModel
from vitq.core.target import TARGETS, Request, Target, Written
from vitq.data.families_hf import quiet
from vitq.export.hf import form_of, named
from vitq.export.same import Sample


class HuggingFace(Target):
    """A Hugging Face folder."""

    def check(self, out: Path) -> None:
        """Refuse a folder that exists."""
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("transformers", "hf", "an export to Hugging Face") from error
        check_destination(out)

    def write(self, qmodel: QuantModel, request: Request) -> Written:
        """Outputs of what transformers loads must be equal to the bit."""
        sample = Sample.of(qmodel, request)
        source = named(qmodel)
        form = form_of(source, lambda folder: _check(source, folder, sample))
        written = save_as(source, request.out, form, metrics=request.metrics)
        name = type(qmodel.model).__name__
        lines = (
            f"{request.out}: {written['bytes'] / 1e6:.2f} MB, for {name}.from_pretrained after `import vitq`",
            f"loaded with transformers, outputs are those of the simulated model to the bit ({sample.described})",
        )
        return Written(request.out, written["bytes"], lines, {"architecture": name, "data": sample.described})


def _check(qmodel: QuantModel, folder: Path, sample: Sample) -> None:
    import transformers

    with quiet(transformers):
        try:
            model: Any = getattr(transformers, type(qmodel.model).__name__).from_pretrained(folder)
        except Exception as error:  # whatever a library raises
            raise ExportError(
                f"the folder does not load again: {error}. transformers builds models anew from their configuration: "
                f"was this one changed after that, or made with another attn_implementation than the usual?"
            ) from error
    sample.must_equal(model.to(sample.device), "the model that transformers loads")


TARGETS.register("hf")(HuggingFace())
