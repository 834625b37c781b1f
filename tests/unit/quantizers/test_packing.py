"""Codes and bytes: nothing lost, nothing wasted, nothing wrong accepted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitq.core.errors import InputError
from vitq.quantizers.packing import pack, packed_size, unpack

BITS = (1, 2, 3, 4, 5, 6, 7, 8)


@given(st.data(), st.sampled_from(BITS), st.integers(0, 67))
def test_codes_survive_and_take_exactly_their_bits(data: st.DataObject, bits: int, count: int) -> None:
    codes = torch.tensor(
        data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)), dtype=torch.int64
    )
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_size(count, bits) == math.ceil(count * bits / 8)
    back = unpack(packed, bits, count)
    assert back.dtype == torch.uint8
    assert torch.equal(back.to(torch.int64), codes)


@given(st.data(), st.sampled_from(BITS), st.integers(1, 33))
def test_the_layout_is_a_little_endian_bit_stream(data: st.DataObject, bits: int, count: int) -> None:
    """Written as one big integer: code i at bit i * bits."""
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    stream = sum(code << (i * bits) for i, code in enumerate(codes)).to_bytes(math.ceil(count * bits / 8), "little")
    assert bytes(pack(torch.tensor(codes), bits).tolist()) == stream


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_any_shape_and_type_is_packed_in_row_major_order(bits: int, dtype: torch.dtype) -> None:
    codes = torch.randint(0, 2**bits, (5, 3, 7)).to(dtype)
    across = codes.permute(2, 0, 1)
    assert torch.equal(unpack(pack(across, bits), bits, 105).reshape(7, 5, 3).to(dtype), across)


def test_eight_codes_of_three_bits_fill_three_bytes() -> None:
    assert packed_size(8, 3) == 3
    assert packed_size(9, 3) == 4
    assert packed_size(0, 3) == 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [-1.0, 0.5, math.nan, math.inf])
def test_codes_that_are_not_whole_or_out_of_range_are_refused(bits: int, bad: float) -> None:
    with pytest.raises(InputError, match="whole numbers"):
        pack(torch.tensor([0.0, bad]), bits)
    with pytest.raises(InputError, match=rf"\[0, {2**bits}\)"):
        pack(torch.tensor([0, 2**bits]), bits)


@pytest.mark.parametrize("bits", [0, -1, 9, 12, 16])
def test_widths_that_do_not_fit_a_byte_are_refused_and_not_cut_off(bits: int) -> None:
    with pytest.raises(InputError, match="1 to 8"):
        pack(torch.tensor([0]), bits)
    with pytest.raises(InputError, match="1 to 8"):
        unpack(torch.zeros(2, dtype=torch.uint8), bits, 1)


def test_a_wrong_number_of_bytes_or_a_wrong_type_is_refused() -> None:
    packed = pack(torch.arange(8), 3)
    for wrong in (packed[:-1], torch.cat([packed, packed[:1]]), packed.to(torch.int32)):
        with pytest.raises(InputError, match="take 3 bytes"):
            unpack(wrong, 3, 8)
    with pytest.raises(InputError, match="take 4 bytes"):
        unpack(packed, 3, 9)
