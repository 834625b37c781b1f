"""config.json: a strict schema with a version. Newer files are refused, older ones are migrated here.

Both files hold a digest of the other: config.json of all of model.safetensors, and that in its metadata of the
fields that decide what the model computes (`BINDING`). So neither can be edited or exchanged alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from vitq.artifact import wrapped
from vitq.core.errors import ArtifactError, MissingExtraError
from vitq.core.qmodel import QuantModel
from vitq.core.version import __version__

TENSORS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
SCHEMA_VERSION = 1
FORMAT = "vitq"
REASON = 500  # characters of another library's message that are told
BOUND = "vitq_config"  # the key of the digest in the tensors' metadata
BINDING = ("schema_version", "plan", "formats", "graph", "rewrites", "packed", "example", "source", "preprocess")


@dataclass(frozen=True)
class Packed:
    """Where packed codes go: which parameter, at which width, of which shape and type."""

    param: str
    bits: int
    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class StoredRewrite:
    """A rewrite's registered name, arguments and the names of its tensors, which are `rewrite/<n>/<name>`."""

    name: str
    args: dict[str, Any]
    tensors: list[str]


@dataclass(frozen=True)
class ArtifactConfig:
    """Everything in config.json but the digest of itself.

    Attributes:
        format, schema_version, vitq_version: what wrote it.
        kind: how the numbers in `metrics` were produced: "simulated" or "integer".
        plan: recipe, bits, exclusions, overrides, seed, as resolved.
        formats: site id -> format, after the passes.
        graph: site id -> signature line (core/site.py); must equal that of the model it is loaded into.
        rewrites: changes of the model, in order.
        packed: site id -> packed weight.
        example: what the traced example looked like.
        source, preprocess: model and image preparation, None if unknown.
        provenance: calibration images (count, seed, digest), torch, machine.
        log: what the passes reported.
        metrics: what was measured.
        effective_bits: averages, scales and zero-points counted.
        tensors_sha256: digest of model.safetensors.
    """

    format: str
    schema_version: int
    vitq_version: str
    kind: str
    plan: dict[str, Any]
    formats: dict[str, dict[str, Any]]
    graph: dict[str, str]
    rewrites: list[StoredRewrite]
    packed: dict[str, Packed]
    example: Any
    source: dict[str, Any] | None
    preprocess: dict[str, Any] | None
    provenance: dict[str, Any]
    log: dict[str, Any]
    metrics: dict[str, Any]
    effective_bits: dict[str, float]
    tensors_sha256: str


_OPTIONAL = (dict, type(None))
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("vitq_version", "kind", "tensors_sha256"), str),
    **dict.fromkeys(("plan", "formats", "graph", "packed", "provenance", "log", "metrics", "effective_bits"), dict),
    **dict.fromkeys(("source", "preprocess"), _OPTIONAL),
    "rewrites": list,
}


@dataclass(frozen=True)
class Renaming:
    """Module names of an artifact -> module names of a model, by longest prefix."""

    names: Mapping[str, str] = field(default_factory=dict)

    def module(self, name: str) -> str:
        """A dotted name under its new prefix; "" is the model itself."""
        return _swap(name, self.names)

    def site(self, site: str) -> str:
        """A site id with its owner renamed."""
        owner, colon, rest = site.partition(":")
        return f"{self.module(owner)}{colon}{rest}"

    def back(self, site: str) -> str:
        """Inverse of `site`."""
        owner, colon, rest = site.partition(":")
        return f"{_swap(owner, {new: old for old, new in self.names.items()})}{colon}{rest}"

    def line(self, line: str) -> str:
        """A signature line with its parameter renamed."""
        role, axes, param, shape = line.split(" ")
        return f"{role} {axes} {self.module(param) if param else ''} {shape}"

    def arguments(self, args: Any) -> Any:
        """Module and parameter names anywhere in a rewrite's arguments."""
        if isinstance(args, str):
            return self.module(args)
        if isinstance(args, list):
            return [self.arguments(a) for a in args]
        if isinstance(args, dict):
            return {k: self.arguments(v) for k, v in args.items()}
        return args


def describe(
    qmodel: QuantModel, packed: dict[str, Packed], tensors_sha256: str, metrics: dict[str, Any]
) -> ArtifactConfig:
    """The config of a model about to be saved."""
    return ArtifactConfig(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        vitq_version=__version__,
        kind="simulated",
        plan=qmodel.plan.to_json(),
        formats={site: fmt.to_json() for site, fmt in qmodel.formats.items()},
        graph=qmodel.graph.signature(),
        rewrites=[StoredRewrite(r.name, r.args, sorted(r.tensors)) for r in qmodel.rewrites],
        packed=packed,
        example=qmodel.example,
        source=qmodel.source,
        preprocess=qmodel.preprocess,
        provenance=qmodel.provenance | {"torch": torch.__version__, "threads": torch.get_num_threads()},
        log=qmodel.log,
        metrics=metrics,
        effective_bits=qmodel.effective_bits(),
        tensors_sha256=tensors_sha256,
    )


def binding(config: ArtifactConfig) -> str:
    """Digest of the fields that decide what the model computes."""
    data = _plain(asdict(config))
    return _digest({name: data[name] for name in BINDING})


def dump(config: ArtifactConfig) -> str:
    """JSON text, with a digest of itself.

    Raises:
        ArtifactError: a value that JSON does not have.
    """
    data = _plain(asdict(config))
    return json.dumps(data | {"digest": _digest(data)}, indent=1, sort_keys=True) + "\n"


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """What reading gives back: keys are text, tuples are lists. Digests are of this."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(data))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"metrics, source, provenance and log must be plain JSON values: {error}; convert them first"
        ) from error
    return plain


def read(path: Path) -> ArtifactConfig:
    """Read and check config.json, an artifact's own or that of a Hugging Face folder with an artifact in it.

    Raises:
        ArtifactError: missing, not JSON, not ours, newer, changed, or of another form.
    """
    if path.parent.exists() and not path.parent.is_dir():
        raise ArtifactError(f"{path.parent} is a file; give the folder that `vitq quantize --out` wrote")
    if not path.parent.is_dir():
        raise ArtifactError(f"{path.parent} does not exist; give the folder that `vitq quantize --out` wrote")
    if not path.is_file():
        raise ArtifactError(f"{path.parent} is not an artifact: it has no {CONFIG}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; the artifact is damaged") from error
    return parse(wrapped.document_in(data[wrapped.ENTRY]) if wrapped.is_wrapped(data) else data, path)


def parse(data: Any, path: Path) -> ArtifactConfig:
    """Check a document that was read from a file; raises as `read`.

    Args:
        path: the file, for messages.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtifactError(f"{path} was not written by vitq; give the folder that `vitq quantize --out` wrote")
    version = data.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(f"{path}: schema version {version!r} does not exist; the artifact is damaged")
    if version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {version}, and this vitq ({__version__}) reads up to {SCHEMA_VERSION}; "
            f"upgrade vitq"
        )
    try:
        actual = _digest({k: v for k, v in data.items() if k != "digest"})
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; the artifact is damaged") from error
    data = dict(data)
    if data.pop("digest", None) != actual:
        raise ArtifactError(f"{path} is damaged or was edited: its digest does not match its content")
    expected = {f.name for f in fields(ArtifactConfig)}
    if set(data) != expected:
        raise ArtifactError(
            f"{path}: missing fields {sorted(expected - set(data))}, unknown fields {sorted(set(data) - expected)}"
        )
    wrong = sorted(name for name, kind in KINDS.items() if not isinstance(data[name], kind))
    if wrong:
        raise ArtifactError(f"{path}: {', '.join(wrong)} are of a wrong type; the artifact is damaged")
    try:
        data["rewrites"] = [StoredRewrite(**r) for r in data["rewrites"]]
        data["packed"] = {site: Packed(**p) for site, p in data["packed"].items()}
    except (TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: {error}; the artifact is damaged") from error
    return ArtifactConfig(**data)


@contextmanager
def told_as_damage(path: Path, why: str = "is damaged") -> Iterator[None]:
    """Every damage that digests do not show is one ArtifactError, in whatever code it is met."""
    try:
        yield
    except (ArtifactError, MissingExtraError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:REASON]
        raise ArtifactError(f"{path} {why}: {type(error).__name__}: {reason}") from error


def check_tensors(path: Path, config: ArtifactConfig) -> None:
    """Whether the file of tensors is the one that was saved.

    Raises:
        ArtifactError: missing, unreadable, or changed.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; the artifact is not whole")
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if digest != config.tensors_sha256:
        raise ArtifactError(
            f"{path} is damaged: its digest is not the one in {CONFIG}; save or copy the artifact again"
        )


def sha256_of(path: Path) -> str:
    """Digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _swap(name: str, names: Mapping[str, str]) -> str:
    for old in sorted(names, key=len, reverse=True):
        if not old or name == old or name.startswith(f"{old}."):
            rest = name[len(old) :].removeprefix(".")
            return ".".join(part for part in (names[old], rest) if part)
    return name
