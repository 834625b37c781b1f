"""QuantModel: the user's model, a quantizer beside it for every site, and what has been done so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from vitq.core.errors import SiteNotFoundError, VitqError
from vitq.core.format import Format
from vitq.core.plan import Plan
from vitq.core.rewrite import Rewrite
from vitq.core.roles import WEIGHT
from vitq.core.site import Graph, Site


class SiteQuantizer(Protocol):
    """What a QuantModel needs of a quantizer (the class is in `quantizers/`, a higher floor)."""

    bits: int
    state: str
    baked: bool
    rounded: Tensor | None
    observer: Any
    product_observer: Any
    exportable: bool

    @property
    def fitted(self) -> bool: ...
    def freeze(self) -> None: ...
    def unfit(self) -> None: ...
    def side_bits(self) -> int: ...
    def carried_bits(self, shape: tuple[int, ...]) -> int: ...
    def quantized(self, x: Tensor) -> Tensor: ...
    def __call__(self, x: Tensor) -> Tensor: ...


class Quantizers(nn.Module, Mapping[str, SiteQuantizer]):
    """Quantizers by site id; a site itself is a key, too.

    nn.ModuleDict forbids dots in keys, so they are stored under "|".
    """

    def __init__(self, quantizers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for site, quantizer in quantizers.items():
            self.add_module(site.replace(".", "|"), quantizer)

    def __getitem__(self, site: str | Site) -> SiteQuantizer:
        name = site if isinstance(site, str) else site.id
        found = self._modules.get(name.replace(".", "|"))
        if found is None:
            raise SiteNotFoundError(f"no quantizer at {name!r}: no such site, or it is left in float")
        return cast(SiteQuantizer, found)

    def __iter__(self) -> Iterator[str]:
        return (name.replace("|", ".") for name in self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, site: object) -> bool:
        name = site.id if isinstance(site, Site) else str(site)
        return name.replace(".", "|") in self._modules

    # nn.Module compares by identity, Mapping by content: modules are dictionary keys in torch.
    __hash__ = nn.Module.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class QuantModel(nn.Module):
    """A model whose matrix products see quantized operands. Behaves like the model it was made from.

    Attributes:
        model: the user's module; its tree and names are unchanged.
        quantizers: site id -> quantizer.
        formats: site id -> format as it is now (passes may change the plan's).
        graph: sites, calls, blocks.
        plan: what was asked for, resolved.
        rewrites: what was changed in the model, in order; replayed by `load`.
        pending: rewrites that wait for the final codes: `freeze` calls each of these functions with this model.
        memo: what passes measured that others need again; emptied by `freeze`.
        log: what the passes report, by pass.
        example: what the example that it was traced with looks like.
        source, preprocess: how to build the model again and how to prepare its images; filled by the
            pipeline when known, kept in the artifact.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        quantizers: Mapping[str, nn.Module],
        formats: Mapping[str, Format],
        plan: Plan,
    ) -> None:
        super().__init__()
        self.model = model
        self.formats = dict(formats)
        self.quantizers = Quantizers(quantizers)
        self.graph = graph
        self.plan = plan
        self.rewrites: list[Rewrite] = []
        self.pending: list[Callable[[QuantModel], None]] = []
        self.log: dict[str, Any] = {}
        self.source: dict[str, Any] | None = None
        self.preprocess: dict[str, Any] | None = None
        self.example: Any = None
        self.provenance: dict[str, Any] = {}
        self.frozen = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "model" in modules and not name.startswith("__"):
                return getattr(modules["model"], name)
            raise

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` of transformers loads after `import vitq`.

        Not the model's own method of that name, which would write decoded float weights.

        Raises:
            InputError: no model of transformers.
            ArtifactError, ExportError: a folder that exists or cannot be written, or that loads as something else.
        """
        from vitq.core.target import export_to

        export_to(self, "hf", folder)

    # -- sites -----------------------------------------------------------------------------------------

    def sites(self, *roles: str) -> list[Site]:
        """Quantized sites with one of these roles (all without roles), in execution order."""
        return [s for s in self.graph.sites.values() if s.id in self.quantizers and (not roles or s.role in roles)]

    def weight(self, site: Site | str) -> nn.Parameter | None:
        """The parameter at a weight site, or None where the weight is computed."""
        found = self.graph.sites[site] if isinstance(site, str) else site
        return None if found.param is None else self.model.get_parameter(found.param)

    def set_state(self, state: str, sites: list[Site] | None = None) -> None:
        """Switch quantizers "on" or "off"; all of them unless sites are given.

        Raises:
            VitqError: "off" for a weight whose float values are gone (a frozen or loaded model).
        """
        for site in self.sites() if sites is None else sites:
            quantizer = self.quantizers[site]
            if state == "off" and quantizer.baked:
                raise VitqError(
                    f"the float weights at {site.id} are gone: this model is frozen. Keep the float model, or load the "
                    f"artifact with float_model=."
                )
            quantizer.state = state

    def apply_rewrite(self, rewrite: Rewrite) -> None:
        """Change the model in a registered way, and remember it for the artifact."""
        rewrite.prepare(self.model)
        rewrite.apply(self.model)
        self.rewrites.append(rewrite)

    # -- freezing --------------------------------------------------------------------------------------

    @torch.no_grad()
    def freeze(self, *, bake: bool = True) -> QuantModel:
        """Fix every scale, and put the decoded weights into the model.

        Args:
            bake: write decoded values into the weights. Without it, float weights stay and are quantized at
                every forward, with the same result (`diagnose` needs them).

        Every site is switched on, and what was pending is done.

        Raises:
            NotFittedError: a site has no scale.
        """
        for site in self.sites():
            quantizer = self.quantizers[site]
            quantizer.observer = quantizer.product_observer = None
            quantizer.freeze()
        while self.pending:
            self.pending.pop(0)(self)
        for site in self.sites(WEIGHT) if bake else []:
            quantizer, weight = self.quantizers[site], self.weight(site)
            if weight is not None and not quantizer.baked:
                weight.data = quantizer(weight.data)
                quantizer.baked, quantizer.rounded = True, None
        self.frozen = bake
        return self

    # -- size ------------------------------------------------------------------------------------------

    def extra_macs(self) -> int:
        """Multiply-accumulates that the rewrites add to the inference of one image."""
        return sum(rewrite.extra_macs() for rewrite in self.rewrites)

    def effective_bits(self) -> dict[str, float]:
        """Average bits per weight and per activation value, scales and zero-points counted.

        weight: over all parameters that are quantized. model: over all parameters, float ones included.
        act: over the activation values of one example, where the trace knows their number, with what dynamic
            formats carry along.
        """
        codes = side = values = 0.0
        act_bits = act_values = 0.0
        for site in self.sites():
            quantizer = self.quantizers[site]
            weight = self.weight(site)
            if weight is not None:
                codes += weight.numel() * quantizer.bits
                side += quantizer.side_bits()
                values += weight.numel()
            else:
                count = float(torch.Size(site.shape).numel())
                act_bits += count * quantizer.bits + quantizer.carried_bits(site.shape)
                act_values += count
        total = sum(p.numel() for p in self.model.parameters())
        coded = {id(self.weight(s)) for s in self.sites()}
        rest = sum(8 * p.nbytes for p in self.model.parameters() if id(p) not in coded)
        rest += sum(rewrite.extra_bits() for rewrite in self.rewrites)
        return {
            "weight": round((codes + side) / values, 4) if values else 32.0,
            "model": round((codes + side + rest) / total, 4) if total else 32.0,
            "act": round(act_bits / act_values, 4) if act_values else 32.0,
        }
