"""`--to compressed-tensors`: a Hugging Face folder in the schema of that package, which it packs and unpacks itself."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitq.artifact import check_destination
from vitq.artifact.schema import CONFIG, TENSORS
from vitq.core.batches import default_forward
from vitq.core.errors import ExportError, InputError, MissingExtraError
from vitq.core.files import write_folder
from vitq.core.qmodel import QuantModel
from vitq.core.roles import WEIGHT
from vitq.core.target import TARGETS, Request, Target, Written
from vitq.data.families_hf import hf_source, quiet
from vitq.data.source import build_model
from vitq.export.hf import config_of, named, processor_files
from vitq.export.linear_schemes import LinearScheme, linear_schemes
from vitq.export.lower import PROFILES
from vitq.export.onnx import check_model
from vitq.export.same import Sample, outputs_of

NAME = "compressed-tensors"
SAME_CODES = 0.999  # of an input's codes; the package rounds after it has added the zero-point


class CompressedTensors(Target):
    """A folder that transformers loads with the package compressed-tensors, without vitq."""

    def check(self, out: Path) -> None:
        """Refuse a folder that exists."""
        try:
            import compressed_tensors.compressors  # noqa: F401 - needs transformers, too
        except ImportError as error:
            raise MissingExtraError(NAME, NAME, f"an export to {NAME}") from error
        check_destination(out)

    def write(self, qmodel: QuantModel, request: Request) -> Written:
        """Decompressed by the package, weights must be equal to the bit; inputs in 99.9 % of their codes."""
        check_model(qmodel, PROFILES["reference"])
        source = named(qmodel)
        schemes, decoded = linear_schemes(qmodel)
        sample = Sample.of(qmodel, request)
        _check_architecture(qmodel, sample)
        shares = _input_shares(qmodel, sample, schemes)
        inputs = sum(scheme.input is not None for scheme in schemes.values())
        facts: dict[str, Any] = {
            "linears": len(schemes),
            "inputs": inputs,
            "decoded": decoded,
            "data": sample.described,
        }
        tensors = _tensors(qmodel, schemes)
        total = 0

        def fill(folder: Path) -> None:
            nonlocal total
            from safetensors.torch import save_file

            save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
            (folder / CONFIG).write_text(
                json.dumps(config_of(source.model), indent=2, sort_keys=True), encoding="utf-8"
            )
            _add_schema(folder, schemes)
            for name, text in processor_files(source).items():
                (folder / name).write_text(text, encoding="utf-8")
            facts["agree"] = _check_loaded(qmodel, folder, sample, schemes)
            total = sum(file.stat().st_size for file in folder.iterdir())

        write_folder(request.out, fill, replace=False)
        lines = [
            f"{request.out}: {total / 1e6:.2f} MB, {len(schemes)} linear layers, {inputs} of them with input scales",
            "decompressed by the package, all weights are equal to the bit",
        ]
        if shares:
            facts["equal_codes"] = min(shares.values())
            lines.append(
                f"at least {facts['equal_codes']:.4%} of the codes of every input are equal ({sample.described}); "
                f"{facts['agree']:.1%} of the largest outputs are at the same place"
            )
        else:
            lines.append(f"outputs are those of the simulated model to the bit ({sample.described})")
        if widened := sum(scheme.widened for scheme in schemes.values()):
            lines.append(f"{widened} weights of fewer bits take a byte per code: their zero-points are not zero")
        if decoded:
            lines.append(
                f"{len(decoded)} weights of other layers are stored as decoded floats: {', '.join(decoded[:4])}"
            )
        return Written(request.out, total, tuple(lines), facts)


def _check_architecture(qmodel: QuantModel, sample: Sample) -> None:
    """Whether a new model with the decoded weights is this one: a rewrite may have added something to it."""
    fresh: Any = build_model(hf_source(qmodel.model, qmodel.source)).to(sample.device)
    state = qmodel.model.state_dict()
    plain = copy.deepcopy(qmodel)
    plain.set_state("off", [site for site in plain.sites() if site.role != WEIGHT])
    same = set(state) == set(fresh.state_dict())
    if same:
        fresh.load_state_dict(state)
        found, expected = outputs_of(fresh, sample.batch), outputs_of(plain, sample.batch)
        same = len(found) == len(expected) and all(map(torch.equal, found, expected))
    if not same:
        rewrites = sorted({rewrite.name for rewrite in qmodel.rewrites})
        raise InputError(
            f"this model is no longer what {type(qmodel.model).__name__} builds: the recipe changed it "
            f"({', '.join(rewrites) or 'or it was changed before'}), and without vitq nobody replays that; use a "
            f"recipe that leaves the model as it is (minmax, percentile), or `vitq export --to hf`"
        )


def _input_shares(qmodel: QuantModel, sample: Sample, schemes: Mapping[str, LinearScheme]) -> dict[str, float]:
    """Site -> share of the values of an input that the package quantizes to the same, given what the site is given.

    Raises:
        ExportError: one is below SAME_CODES, or a value is off by more than one step.
    """
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    shares: dict[str, list[tuple[int, int]]] = {}

    def compare(scheme: LinearScheme, site: str) -> Any:
        assert scheme.input is not None
        args = QuantizationArgs(**scheme.input.args)
        scale = scheme.input.scale.to(sample.device)
        zero_point = None if scheme.input.zero_point is None else scheme.input.zero_point.to(sample.device)

        def look(_: Any, given: tuple[Tensor], value: Tensor) -> None:
            theirs = fake_quantize(given[0], scale, zero_point, args)
            if float((theirs - value).abs().max()) > 1.01 * float(scale):
                raise ExportError(f"{site}: {NAME} gives values more than one step away")
            shares.setdefault(site, []).append((int((theirs == value).sum()), value.numel()))

        return look

    quantizers: Any = qmodel.quantizers
    hooks = [
        quantizers[site].register_forward_hook(compare(schemes[site.owner], site.id))
        for site in qmodel.sites()
        if site.role != WEIGHT
    ]
    try:
        with torch.no_grad():
            default_forward(qmodel, sample.batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = {site: sum(same for same, _ in uses) / sum(of for _, of in uses) for site, uses in shares.items()}
    for site, share in found.items():
        if share < SAME_CODES:
            raise ExportError(f"{site}: {NAME} gives another code for {1 - share:.2%} of the values")
    return found


def _tensors(qmodel: QuantModel, schemes: Mapping[str, LinearScheme]) -> dict[str, Tensor]:
    """All tensors of the file: the package's own packing of the layers it knows, and the state of the rest."""
    from compressed_tensors.compressors import BaseCompressor

    state = {name: value.detach().cpu().contiguous().clone() for name, value in qmodel.model.state_dict().items()}
    for name, scheme in schemes.items():
        packer: Any = BaseCompressor.get_value_from_registry(scheme.format)
        local = {"weight": state.pop(f"{name}.weight"), **scheme.weight.tensors("weight")}
        packed: dict[str, Tensor] = packer.compress(local, _scheme(scheme, [name]))
        packed |= {} if scheme.input is None else scheme.input.tensors("input")
        state |= {f"{name}.{key}": value.contiguous() for key, value in packed.items()}
    return state


def _scheme(scheme: LinearScheme, targets: list[str]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(
        targets=targets,
        weights=QuantizationArgs(**scheme.weight.args),
        input_activations=None if scheme.input is None else QuantizationArgs(**scheme.input.args),
        format=scheme.format,
    )


def _add_schema(folder: Path, schemes: Mapping[str, LinearScheme]) -> None:
    """`quantization_config`, built and written by the package, so that it is valid by its own rules."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig

    groups: dict[Any, tuple[LinearScheme, list[str]]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme.key, (scheme, []))[1].append(name)
    formats = sorted({scheme.format for scheme in schemes.values()})
    config: Any = QuantizationConfig(
        config_groups={f"group_{n}": _scheme(*found) for n, found in enumerate(groups.values())},
        format=formats[0] if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
    )
    ModelCompressor(quantization_config=config).update_config(str(folder))


def _check_loaded(qmodel: QuantModel, folder: Path, sample: Sample, schemes: Mapping[str, LinearScheme]) -> float:
    """Load the folder as anybody would, and compare; gives the share of largest outputs at the same place.

    Raises:
        ExportError: a weight or input scale is another one, or outputs differ though no input is quantized.
    """
    import transformers

    with quiet(transformers), redirect_stderr(io.StringIO()):  # of the package's progress bars
        try:
            kind: Any = getattr(transformers, type(qmodel.model).__name__)
            model: Any = kind.from_pretrained(folder).to(sample.device)
            found = outputs_of(model, sample.batch)  # decompresses
        except Exception as error:  # whatever a library raises
            raise ExportError(f"transformers does not load what was written: {error}") from error
    ours, theirs = qmodel.model.state_dict(), model.state_dict()
    differ = [name for name, value in ours.items() if name not in theirs or not torch.equal(theirs[name], value)]
    for name, scheme in schemes.items():
        if scheme.input is not None and not torch.equal(theirs[f"{name}.input_scale"].cpu(), scheme.input.scale):
            differ.append(f"{name}.input_scale")
    if differ:
        raise ExportError(f"{NAME} reads {len(differ)} tensors as others than they are: {', '.join(differ[:5])}")
    if not any(scheme.input is not None for scheme in schemes.values()) and not all(
        map(torch.equal, found, sample.outputs)
    ):
        raise ExportError(f"the model that {NAME} loads computes something else on {sample.described}")
    return float((found[0].flatten(1).argmax(-1) == sample.outputs[0].flatten(1).argmax(-1)).double().mean())


TARGETS.register(NAME)(CompressedTensors())
