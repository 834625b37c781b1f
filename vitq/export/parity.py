"""Does the file compute what the simulated model computes? Asked after every export.

*Teacher-forced*: every site gets what the simulated model has before it, so that a difference is found where it is made
and does not grow on the way. Of the codes of a site, 99.9 % must be equal and the rest off by one; decoded weights must
be equal to the bit; so must the output be, to float precision.

*End to end*: predictions of file and simulated model on the same images. Low-bit models are chaotic, so the agreement
is told beside that of the simulated model with itself under noise of NOISE: on the images, and on what enters every
site. It must not be below the second beyond what the number of images explains (Fisher's exact test, one-sided, at
SURE). Noise on images alone is no measure of other kernels where the network's input is quantized, which swallows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vitq.core.batches import default_forward, split
from vitq.core.errors import ExportError
from vitq.core.qmodel import QuantModel
from vitq.export.compare import AtSite, Steps, disturbed, simulated
from vitq.export.edit import CODE, WEIGHT
from vitq.export.forced import GIVEN, Shown, shown_values, weights_alone, with_given_sites
from vitq.export.runtime import Runtime, feeds_of

ALIKE = 0.999  # of a site's codes; of a few codes, one may differ all the same
OUTPUT = 1e-4  # of the largest output, where everything before the last product is given
SUM = 2.0**-22  # of what is added: four roundings
NOISE = 1e-6
DRAWS = 2  # of each noise
SURE = 0.01
TEACHERS = 8  # images whose values at all sites are compared, one at a time: all of them are held
BATCH = 8  # images of a run from end to end


@dataclass(frozen=True)
class SiteParity:
    """Codes of one use of a site.

    Attributes:
        site, use: which.
        codes: compared.
        different: of these.
        farthest: the largest difference, in levels.
    """

    site: str
    use: int
    codes: int
    different: int
    farthest: int

    @property
    def holds(self) -> bool:
        """At least ALIKE of the codes are equal, the rest off by one."""
        return self.farthest <= 1 and self.different <= max(1, (1 - ALIKE) * self.codes)


@dataclass(frozen=True)
class Parity:
    """What was compared.

    Attributes:
        sites: teacher-forced, in the order of execution.
        output_error: largest error of the output behind given sites, in parts of the largest output.
        agree, images: predictions that are the simulated model's.
        agree_noise, agree_image_noise: the same for the simulated model under noise at every site, and on the images.
        draws: predictions that these two are of.
        p_value: of agreeing that rarely, were the file as good as the simulated model under noise.
    """

    sites: tuple[SiteParity, ...]
    output_error: float
    agree: int
    images: int
    agree_noise: int
    agree_image_noise: int
    draws: int
    p_value: float
    data: str = ""

    @property
    def equal_codes(self) -> float:
        """Share of equal codes over all sites, 1 without sites."""
        codes = sum(site.codes for site in self.sites)
        return 1 - sum(site.different for site in self.sites) / codes if codes else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "equal_codes": self.equal_codes}

    def __str__(self) -> str:
        off = sum(site.different for site in self.sites)
        return (
            f"parity on {self.data}: {100 * self.equal_codes:.4f} % of the codes are equal where every site is given "
            f"what the simulated model has ({off:,} differ, by one); {self.agree} of {self.images} predictions are "
            f"those of the simulated model, which agrees with itself on "
            f"{100 * self.agree_noise / self.draws:.1f} % under noise of {NOISE:g} at every site, on "
            f"{100 * self.agree_image_noise / self.draws:.1f} % under such noise on the images"
        )


def check_parity(qmodel: QuantModel, data: bytes, batch: Any, described: str, runtime: Runtime) -> Parity:
    """Run a file beside the simulated model.

    Args:
        data: the file's bytes.
        batch: inputs of the model, as one batch.
        described: where they come from.
        runtime: what runs it.

    Raises:
        ExportError: it computes something else; names the first site that differs.
    """
    import onnx

    model = onnx.load_from_string(data)
    _check_weights(qmodel, model, runtime)
    sites, error = _teacher_forced(qmodel, model, batch, runtime)
    wrong = next((site for site in sites if not site.holds), None)
    if wrong is not None:
        raise ExportError(
            f"the exported model computes other codes than the simulated one, first at {wrong.site}: {wrong.different} "
            f"of {wrong.codes} differ, by up to {_told(wrong.farthest)}. No file was written. Export with "
            f"--profile reference, and report the model and the site"
        )
    if not error <= OUTPUT:
        raise ExportError(
            f"the output of the exported model is {error:.1e} of its magnitude from that of the simulated one behind "
            f"the last site, {sites[-1].site if sites else 'none'}, with equal codes before it. No file was written"
        )
    return _end_to_end(qmodel, data, batch, sites, error, described, runtime)


def _told(farthest: int) -> str:
    return f"{farthest} levels" if farthest < 2**15 else "more than there are levels"


def _check_weights(qmodel: QuantModel, model: Any, runtime: Runtime) -> None:
    shown = {value.name: value for value in shown_values(model) if value.part == WEIGHT}
    if not shown:
        return
    for name, values in runtime.session(weights_alone(model).SerializeToString(), plain=True).run({}).items():
        weight = qmodel.weight(shown[name].site)
        if weight is None or not _same_weight(
            model, shown[name], _in_order(weight.detach().cpu(), shown[name]), values
        ):
            raise ExportError(
                f"the exported weight at {shown[name].site} is not that of the simulated model. No file was written"
            )


def _same_weight(model: Any, shown: Shown, weight: Tensor, values: Tensor) -> bool:
    """To the bit; to the rounding of a sum where a part of each output channel is added behind the product."""
    if not shown.rest:
        return torch.equal(weight, values)
    import onnx

    (found,) = (given for given in model.graph.initializer if given.name == shown.rest)
    rest = torch.from_numpy(onnx.numpy_helper.to_array(found).copy())
    if rest.ndim and rest.shape[0] != values.shape[-1]:
        rest = rest[:, None]  # of a Gemm, whose weight is not transposed
    return bool(((values + rest - weight).abs() <= SUM * (values.abs() + rest.abs())).all())


def _in_order(values: Tensor, shown: Shown) -> Tensor:
    return values.permute(shown.order) if shown.order else values


def _teacher_forced(
    qmodel: QuantModel, model: Any, batch: Any, runtime: Runtime
) -> tuple[tuple[SiteParity, ...], float]:
    shown = [value for value in shown_values(model) if value.part != WEIGHT]
    session = runtime.session(with_given_sites(model).SerializeToString())
    found = {(value.site, value.use): _Counted() for value in shown}
    error, steps = 0.0, Steps()
    for part in islice(split(batch, 1), TEACHERS):
        teacher, output = simulated(qmodel, part)
        given = {GIVEN + value.name: _taught(teacher, value).contiguous().numpy() for value in shown}
        own = [name for name in session.inputs if not name.startswith(GIVEN)]
        got = session.run(feeds_of(own, part) | {n: v for n, v in given.items() if n in session.inputs})
        for value in shown:
            found[(value.site, value.use)].add(_apart(teacher[(value.site, value.use)], value, got[value.name], steps))
        error = max(error, _output_error(got, output))
    return tuple(SiteParity(site, use, *c.numbers()) for (site, use), c in found.items()), error


@dataclass
class _Counted:
    codes: int = 0
    different: int = 0
    farthest: int = 0

    def add(self, apart: Tensor) -> None:
        self.codes += apart.numel()
        self.different += int(apart.ne(0).sum())
        self.farthest = max(self.farthest, int(apart.max()))

    def numbers(self) -> tuple[int, int, int]:
        return self.codes, self.different, self.farthest


def _taught(teacher: Mapping[tuple[str, int], AtSite], shown: Shown) -> Tensor:
    at = teacher[(shown.site, shown.use)]
    return _codes(at.codes, shown) if shown.part == CODE and at.codes is not None else _in_order(at.values, shown)


def _codes(codes: Tensor, shown: Shown) -> Tensor:
    """As the file has them."""
    ordered = _in_order(codes, shown)
    return ordered if shown.shift is None else (ordered.int() - shown.shift).to(torch.int8)


def _apart(at: AtSite, shown: Shown, got: Tensor, steps: Steps) -> Tensor:
    if shown.part == CODE and at.codes is not None:
        return (got.int() - _codes(at.codes, shown).int()).abs()
    return steps.apart(at, got)


def _output_error(got: Mapping[str, Tensor], output: Any) -> float:
    worst = 0.0
    wanted = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    for leaf, found in zip(wanted, got.values(), strict=False):
        apart = float((leaf.cpu() - found).abs().max()) / max(float(leaf.abs().max()), 1e-12)
        worst = apart if not apart <= worst else worst
    return worst


def _end_to_end(
    qmodel: QuantModel,
    data: bytes,
    batch: Any,
    sites: tuple[SiteParity, ...],
    error: float,
    described: str,
    runtime: Runtime,
) -> Parity:
    from scipy.stats import fisher_exact

    session = runtime.session(data)
    agree = noisy = image_noise = images = 0
    draw = torch.Generator().manual_seed(0)
    for part in split(batch, BATCH):
        with torch.no_grad():
            wanted = predictions(default_forward(qmodel, part))
            for _ in range(DRAWS):
                image_noise += int(predictions(default_forward(qmodel, _with_noise(part, draw))).eq(wanted).sum())
                noisy += int(predictions(disturbed(qmodel, part, NOISE, draw)).eq(wanted).sum())
        got = session.run(feeds_of(session.inputs, part))
        agree += int(predictions(next(iter(got.values()))).eq(wanted).sum())
        images += wanted.numel()
    table = [[agree, images - agree], [noisy, DRAWS * images - noisy]]
    p_value = float(fisher_exact(table, alternative="less").pvalue)
    if p_value < SURE:
        raise ExportError(
            f"{agree} of {images} predictions of the exported model are those of the simulated one, which agrees with "
            f"itself under noise of {NOISE:g} at every site on {noisy} of {DRAWS * images} (p = {p_value:.1e}), "
            f"though every site alone is right. No file was written"
        )
    return Parity(sites, error, agree, images, noisy, image_noise, DRAWS * images, p_value, described)


def predictions(output: Any) -> Tensor:
    """The largest entry along the classes of the first tensor of an output: (N, C), or any with channels second."""
    first = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    return first.argmax(1 if first.ndim > 1 else 0).flatten().cpu()


def _with_noise(batch: Any, draw: torch.Generator) -> Any:
    def noisy(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        return value + NOISE * torch.randn(value.shape, generator=draw).to(value)

    return pytree.tree_map(noisy, batch)
