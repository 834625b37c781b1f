"""What a change of a product's result does to the model's output: gradients of a well-defined probe.

Formula: metric at the logits F = diag(p) - p p^T, the Hessian of KL(p || softmax(logits)); outputs that are no logits
         have F = I
         hessian       g = J^T v,  v = F^(1/2) eps, eps normal          E[g g^T] = J^T F J, the Gauss-Newton Hessian
         fisher        g = J^T (p - e_y), y drawn from p                the same in expectation: BRECQ's gradients
         blockwise     g = J_rest^T (sign * |g_B|), random signs        E[g**2] = diag of J_rest^T diag(g_B**2) J_rest:
                       the metric g_B**2 at the end of the block, seen from a product inside of it
         perturbation  as blockwise with sqrt(h) for |g_B|, h the mean of |J(O + d) - J(O - d)| / 2 d over images, d the
                       same for all elements of the block's output O
         Hooks on results show g to whoever asked for it; as it is one draw, only half of all weight follows it
         (calibrate/products.py).
Source:  hessian       PTQ4ViT, arXiv 2111.12293, section 3.2, whose code takes the gradient of KL(p || p), float noise
         fisher        BRECQ, arXiv 2102.05426, equation 10
         blockwise     APQ-ViT, arXiv 2303.14341: **a reconstruction**, its equations are not public
         perturbation  APHQ-ViT, arXiv 2504.02508, section 3.2
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitq.calibrate.blocks import first
from vitq.calibrate.heap import give_back
from vitq.core.batches import Batches, leading_size, split
from vitq.core.progress import Task
from vitq.core.qmodel import QuantModel

GRADIENT_IMAGES = 2  # at a time: what a backward keeps of them is about what a float forward of 32 takes
LARGE = 2**26  # parameters: of a model with more, one at a time
PERTURBED_IMAGES = 4  # the forwards and backwards of "perturbation" are one pair for every block
STEP = 0.01  # of a perturbation, in parts of the output's root mean square: gradients differ beyond float noise
PROBES = ("hessian", "fisher", "blockwise", "perturbation")


def run_backward(
    qmodel: QuantModel,
    data: Batches,
    probe: str,
    seed: int,
    watch: Callable[[int, int, Callable[[], bool]], None],
    task: Task,
    since: Collection[str] = ("",),
) -> None:
    """Run the model as it is forward and backward on all images, a few at a time.

    Args:
        probe: one of PROBES.
        since: modules that gradients go back to and no further ("" is the batch itself, whatever data.forward does with
            it): what is before the first of them costs no backward and keeps nothing.
        watch: told before each forward (images seen, images in it, whether the gradients that come now are those of
            the probe).
        seed: of the random numbers, which belong to an image, not to a micro-batch.
    """
    roots = _perturbed(qmodel, data, seed) if probe == "perturbation" else {}
    through_blocks = probe in ("blockwise", "perturbation")
    seen = 0
    with _frozen(qmodel.model):
        for batch in data:
            for part in split(batch, images_at_a_time(qmodel.model)):
                images = leading_size(part)
                draws = [_generator(seed, seen + image) for image in range(images)]
                blocks = _Blocks(qmodel, draws, roots) if through_blocks else _NoBlocks()
                watch(seen, images, lambda blocks=blocks: blocks.second)  # type: ignore[misc]
                with torch.enable_grad(), blocks, _gradients_since(qmodel.model, since):
                    found = _floats(data.forward(qmodel.model, _begun(part) if "" in since else part))
                    outputs = [out for out in found if out.requires_grad and out.numel()]
                    starts = [_start(out.detach(), probe, draws) for out in outputs]
                    if outputs and not blocks.second:
                        torch.autograd.backward(outputs, starts, retain_graph=True)
                        blocks.second = True
                    if outputs:
                        torch.autograd.backward(outputs, starts)
                seen += images
                give_back()  # what is kept of each part lies between activations that are gone
            task.advance()


def images_at_a_time(model: nn.Module) -> int:
    """How many images a backward takes: what it keeps of each grows with the width of the model."""
    return 1 if sum(p.numel() for p in model.parameters()) > LARGE else GRADIENT_IMAGES


class _NoBlocks:
    second = True

    def __enter__(self) -> None: ...
    def __exit__(self, *exc: object) -> None: ...


class _Blocks:
    """Hooks that note the gradient at the end of every block, and in a second backward start anew from it."""

    def __init__(self, qmodel: QuantModel, draws: list[torch.Generator], roots: dict[str, Tensor]) -> None:
        self.modules = {name: qmodel.model.get_submodule(name) for name in qmodel.graph.blocks}
        self.draws = draws
        self.roots = roots
        self.second = bool(roots)
        self.noted: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self.modules.items():

            def ended(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                hidden = first(out)
                if isinstance(hidden, Tensor) and hidden.requires_grad:
                    hidden.register_hook(lambda g: self._at(name, g))

            self.handles.append(module.register_forward_hook(ended))

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _at(self, name: str, g: Tensor) -> Tensor | None:
        if not self.second:
            self.noted[name] = g.detach()
            return None
        draws = self.draws if len(g) % len(self.draws) == 0 else self.draws[:1]
        each = (len(g) // len(draws), *g.shape[1:])
        sign = torch.cat([torch.randint(0, 2, each, generator=draw) for draw in draws]).to(g) * 2 - 1
        root = self.roots.get(name)
        size = self.noted.get(name, g) if root is None or root.shape != g.shape[1:] else root
        return sign * size.to(g)


def _generator(seed: int, image: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + image)


def _start(out: Tensor, probe: str, draws: list[torch.Generator]) -> Tensor:
    """The gradient at one output that the backward starts from, random numbers by image."""
    starts = []
    logits = out.ndim == 2 and len(out) == len(draws)  # of each image; not the boxes that a detector returns
    for number, row in enumerate(out.float()):
        generator = draws[number % len(draws)]
        if probe == "fisher" and logits:
            p = row.softmax(0)
            label = torch.multinomial(p.cpu(), 1, generator=generator)
            starts.append(p.index_add(0, label.to(p.device), -torch.ones_like(p[:1])))
            continue
        noise = torch.randn(row.shape, generator=generator).to(row)
        root = row.softmax(0).sqrt() if logits else None
        starts.append(noise if root is None else root * (noise - (root * noise).sum() * root))
    return torch.stack(starts).to(out.dtype)


@torch.no_grad()
def _perturbed(qmodel: QuantModel, data: Batches, seed: int) -> dict[str, Tensor]:
    """Block -> square root of the mean perturbation Hessian (tokens, channels) at its end."""
    few = next(split(next(iter(data)), PERTURBED_IMAGES))
    wanted = [out.detach() for out in _floats(data.forward(qmodel.model, few))]
    found = {}
    for name in qmodel.graph.blocks:
        block = qmodel.model.get_submodule(name)
        ends = [_gradient_beside(qmodel, data, few, block, wanted, step) for step in (STEP, -STEP)]
        if all(end is not None for end in ends):
            (up, size), (down, _) = ends  # type: ignore[misc]
            found[name] = ((up - down).abs().mean(0) / (2 * size)).sqrt()
    return found


def _gradient_beside(
    qmodel: QuantModel, data: Batches, few: Any, block: nn.Module, wanted: list[Tensor], step: float
) -> tuple[Tensor, float] | None:
    """(gradient of the divergence at the block's end when that is moved, by how much)."""
    caught: list[tuple[Tensor, float]] = []

    def move(module: nn.Module, args: Any, out: Any) -> Any:
        hidden = first(out)
        size = float(hidden.float().square().mean().sqrt()) * STEP
        moved = (hidden.detach() + (size if step > 0 else -size)).requires_grad_()
        caught.append((moved, size))
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    handle = block.register_forward_hook(move)
    try:
        with torch.enable_grad(), _frozen(qmodel.model):
            outputs = _floats(data.forward(qmodel.model, few))
            loss = sum((divergence(out, to) for out, to in zip(outputs, wanted, strict=True)), torch.zeros(()))
    finally:
        handle.remove()
    if len(caught) != 1 or not loss.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(loss, caught[0][0])
    return gradient.float(), caught[0][1]


def divergence(out: Tensor, to: Tensor) -> Tensor:
    """Sum over images of KL(to || out) for logits, of half the squared distance for other outputs."""
    out, to = out.float(), to.float()
    if out.ndim != 2:
        return (out - to).square().sum() / 2
    return (to.softmax(1) * (to.log_softmax(1) - out.log_softmax(1))).sum()


def _floats(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


def _begun(tree: Any) -> Any:
    """The same, whose floats require gradients: copies that are no leaves, as the model may change them in place."""
    begun = {id(t): t.detach().requires_grad_().clone() for t in _floats(tree)}
    return pytree.tree_map(lambda t: begun.get(id(t), t), tree)


@contextmanager
def _gradients_since(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """The inputs of these modules require gradients, unless they come from one of them."""

    def begin(module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = (args, kwargs)
        return None if any(t.requires_grad for t in _floats(given)) else _begun(given)

    handles = [model.get_submodule(name).register_forward_pre_hook(begin, with_kwargs=True) for name in names if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters take no gradients for a while: only results of products are asked for."""
    asked = [p for p in model.parameters() if p.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
