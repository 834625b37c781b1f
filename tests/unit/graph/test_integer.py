"""Compiled linear layers on integer codes: against float64, and every way in which they must step aside."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vitq.core.qmodel import QuantModel
from vitq.graph import integer

pytestmark = pytest.mark.skipif(not integer._AVAILABLE, reason="needs oneDNN's quantized kernels on an x86 processor")
Plain = Callable[..., QuantModel]


def grid(rows: int, columns: int, largest: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight made of whole steps, and the steps (rows, 1)."""
    random = torch.Generator().manual_seed(seed)
    steps = torch.randint(-largest, largest + 1, (rows, columns), generator=random).float()
    steps[0, 0] = largest
    scale = torch.rand(rows, 1, generator=random) + 0.1
    return steps * scale, scale


def oracle(codes: Tensor, scale: float, zero_point: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = scale * (codes.double() - zero_point) @ weight.double().T
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (1, 2, 3, 24), (0, 24)])
@pytest.mark.parametrize(("bits", "largest"), [(2, 3), (4, 15), (6, 63), (8, 127)])
@pytest.mark.parametrize("zero_point", [-3, 0, 7, 300])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_of_codes_is_the_product_of_values(
    shape: tuple[int, ...], bits: int, largest: int, zero_point: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bits < 8 and shape[0]:  # else pairs of products may not fit 16 bits, and the float product is taken
        monkeypatch.setattr(integer.F, "linear", None)
    weight, steps = grid(10, 24, largest)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    codes.flatten()[:24] = 2**bits - 1  # where pairs of products are largest
    bias = torch.randn(10) if with_bias else None
    scale, zero = torch.tensor(0.3), torch.tensor(float(zero_point))
    found = integer.linear_codes(codes, scale, zero, 2**bits - 1, weight, steps, bias)
    expected = oracle(codes, float(scale), zero_point, weight, bias)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(weight.abs().max()) * 400)


def test_the_fake_form_agrees_with_the_real_one() -> None:
    weight, steps = grid(10, 24, 7)
    codes = torch.randint(0, 16, (2, 7, 24), dtype=torch.uint8)
    args = (codes, torch.tensor(0.3), torch.tensor(2.0), 15, weight, steps, torch.randn(10))
    torch.library.opcheck(integer.linear_codes, args)


def test_a_weight_that_is_written_to_is_packed_again() -> None:
    weight, steps = grid(6, 8, 7)
    codes = torch.randint(0, 16, (3, 8), dtype=torch.uint8)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    integer.linear_codes(codes, one, zero, 15, weight, steps, None)
    weight.mul_(-1)
    found = integer.linear_codes(codes, one, zero, 15, weight, steps, None)
    torch.testing.assert_close(found.double(), oracle(codes, 1.0, 0, weight, None), rtol=1e-5, atol=1e-5)
    weight.add_(0.01)  # off its grid: the float product
    found = integer.linear_codes(codes, one, zero, 15, weight, steps, None)
    torch.testing.assert_close(found.double(), oracle(codes, 1.0, 0, weight, None), rtol=1e-5, atol=1e-5)


def test_only_weights_whose_codes_were_multiplied_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "_PACKED", integer._Cache())
    codes = torch.randint(0, 16, (3, 8), dtype=torch.uint8)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    weights = [grid(6, 8, largest, largest) for largest in (7, 15, 127)]
    for top, (weight, steps) in zip((15, 15, 255), weights, strict=True):  # the last pairs do not fit 16 bits
        integer.linear_codes(codes, one, zero, top, weight, steps, None)
    off_grid = weights[0][0] + 0.01
    integer.linear_codes(codes, one, zero, 15, off_grid, weights[0][1], None)
    assert integer.multiplied() == 2


def test_memory_that_is_used_again_is_not_mistaken_for_the_old_weight() -> None:
    codes = torch.randint(0, 16, (3, 8), dtype=torch.uint8)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    for seed in range(50):
        weight, steps = grid(6, 8, 7, seed)
        found = integer.linear_codes(codes, one, zero, 15, weight, steps, None)
        torch.testing.assert_close(found.double(), oracle(codes, 1.0, 0, weight, None), rtol=1e-5, atol=1e-5)
        del weight
    gc.collect()
    weight, steps = grid(6, 8, 7, 99)
    integer.linear_codes(codes, one, zero, 15, weight, steps, None)
    assert len(integer._PACKED.entries) < 50, "packed weights outlive the weights"


class Tower(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


def calls_of_a_compiled(qmodel: QuantModel, x: Tensor) -> tuple[Tensor, int]:
    """What it gives, and in how many calls the product of codes was chosen."""
    chosen: list[bool] = []

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        chosen.extend("linear_codes" in str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        found: Tensor = torch.compile(qmodel, fullgraph=True, backend=counted)(x)
    return found, sum(chosen)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_a_compiled_model_runs_its_linear_layers_on_codes(bits: int, plain: Plain) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 16)
    qmodel = plain(Tower().eval(), x, bits=bits, freeze=True).requires_grad_(False)
    found, chosen = calls_of_a_compiled(qmodel, x)
    assert chosen == 2
    with torch.no_grad():
        # A rounding may fall to the other side between the layers: nearly all values agree.
        close = torch.isclose(found, qmodel(x), rtol=1e-4, atol=1e-5)
    assert close.float().mean() > 0.95


def test_what_is_not_frozen_stays_simulated(plain: Plain) -> None:
    x = torch.randn(4, 5, 16)
    qmodel = plain(Tower().eval(), x, bits=4, freeze=False).requires_grad_(False)
    found, chosen = calls_of_a_compiled(qmodel, x)
    with torch.no_grad():
        assert chosen == 0
        assert torch.equal(found, qmodel(x))


def test_gradients_stay_simulated(plain: Plain) -> None:
    x = torch.randn(4, 5, 16, requires_grad=True)
    qmodel = plain(Tower().eval(), x.detach(), bits=4, freeze=True).requires_grad_(False)
    torch._dynamo.reset()
    found = torch.compile(qmodel, fullgraph=True, backend="eager")(x)
    assert torch.equal(found, qmodel(x))
    assert found.requires_grad
