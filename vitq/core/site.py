"""Where a model computes matrix products: sites, calls, norm-linear pairs, blocks. Pure data.

A *site* is one operand of one matrix product. Its identity is
`owner:op{ordinal}.operand`: the innermost module whose forward makes the call, the kind of call, the
ordinal of the call among those of its kind within one call of the owner, and the operand. Nothing in it
depends on batch size, on object addresses or on the order in which modules run, so it survives retracing
(docs/decisions/site_identity.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

# Why a matrix product is left in float. A closed list: anything else is an error.
REASON_CONSTANT = "constant"  # does not depend on the input: folds into a constant
REASON_UNSUPPORTED = "unsupported"  # a form of call that vitq does not take apart
REASON_EXCLUDED = "excluded"  # the user asked for it
REASON_RECIPE = "recipe"  # the recipe gives this site no format (w4a16: activations)
REASONS = (REASON_CONSTANT, REASON_UNSUPPORTED, REASON_EXCLUDED, REASON_RECIPE)


@dataclass(frozen=True)
class Site:
    """One place where a tensor is quantized.

    Attributes:
        id: `owner:op{ordinal}.operand`.
        role: what the tensor is for (core/roles.py).
        producer: for FC2_IN, the activation function that made it.
        axes: what each dimension is: "batch", "head", "token", "channel", or for weights "channel" (out),
            "in", "kernel".
        shape: of the tensor while tracing.
        param: name of the parameter, for weights that are one.
        block: name of the transformer block it belongs to, or None.
        norm: the LayerNorm whose output this is, channel for channel, if all of that goes to linears: then
            channel scales can be folded (`Graph.pairs`).
        summed: the dimension that the product sums over, counted from the right.
    """

    id: str
    owner: str
    op: str
    ordinal: int
    operand: str
    role: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    producer: str | None = None
    param: str | None = None
    block: str | None = None
    norm: str | None = None
    summed: int = -1

    @property
    def call(self) -> str:
        """Identity of the call this operand belongs to."""
        return self.id.rsplit(".", 1)[0]


@dataclass(frozen=True)
class Call:
    """One matrix product (or one attention function, which holds several).

    Attributes:
        id: `owner:op{ordinal}`.
        macs: multiply-accumulates per traced example.
        sites: ids of its operands, in order; a tied weight has the site of the call that uses it first.
        operands: names of the operands in this call, aligned with `sites`.
        reason: why it has no sites, from REASONS; None when it has.
        detail: for "unsupported", what exactly.
    """

    id: str
    owner: str
    op: str
    ordinal: int
    macs: int
    sites: tuple[str, ...] = ()
    reason: str | None = None
    detail: str = ""
    operands: tuple[str, ...] = ()


@dataclass(frozen=True)
class NormLinear:
    """A LayerNorm all of whose output goes into linears, channel for channel.

    Attributes:
        norm: module name.
        inputs: ids of the linears' input sites, in call order.
        weights: ids of their weight sites, aligned with `inputs`.
        biases: names of their bias parameters, None where a linear has none, aligned with `inputs`.
    """

    norm: str
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    biases: tuple[str | None, ...]


@dataclass(frozen=True)
class Graph:
    """What a trace found."""

    sites: dict[str, Site]
    calls: tuple[Call, ...]
    pairs: tuple[NormLinear, ...] = ()
    blocks: tuple[str, ...] = ()
    has_attention: bool = True
    example_images: int = 1
    notes: tuple[str, ...] = field(default=())

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all matrix products of the traced forward."""
        return sum(call.macs for call in self.calls)

    def with_roles(self, *roles: str) -> list[Site]:
        """Sites that have one of these roles, in execution order."""
        return [site for site in self.sites.values() if site.role in roles]

    def fingerprint(self) -> str:
        """Digest of everything that must be the same for scales of one trace to mean something in another."""
        return hashlib.sha256(json.dumps(self.signature(), sort_keys=True).encode()).hexdigest()

    def signature(self) -> dict[str, str]:
        """Site id -> one line saying role, axes and parameter; what `fingerprint` digests."""
        return {s.id: f"{s.role} {','.join(s.axes)} {s.param or ''} {_static_shape(s)}" for s in self.sites.values()}

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `inspect --json` and the artifact."""
        return {
            "sites": [asdict(s) for s in self.sites.values()],
            "calls": [asdict(c) for c in self.calls],
            "pairs": [asdict(p) for p in self.pairs],
            "blocks": list(self.blocks),
        }


def _static_shape(site: Site) -> str:
    # Only weights and channel counts are the same for every batch and image size.
    kept: Iterable[str] = (
        str(n) if site.param or axis == "channel" else "*" for n, axis in zip(site.shape, site.axes, strict=True)
    )
    return "x".join(kept)
