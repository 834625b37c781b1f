"""Bits, formats and overrides as text and as JSON: what is read is what was written, and nonsense is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitq.core.errors import InputError
from vitq.core.format import Bits, Format
from vitq.core.plan import Override, parse_overrides

WIDTHS = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16])
PERS = st.one_of(st.sampled_from(["tensor", "channel", "head", "token"]), st.integers(1, 999).map("group:{}".format))


@given(WIDTHS, WIDTHS)
def test_bits_are_read_as_written(weight: int, act: int) -> None:
    bits = Bits.parse(f"w{weight}a{act}")
    assert bits == Bits(weight, act)
    assert Bits.parse(str(bits)) == bits
    assert Bits.parse(f"  W{weight}A{act} ") == bits


def test_sixteen_and_more_bits_all_mean_float() -> None:
    assert Bits.parse("w4a32") == Bits.parse("w4a16") == Bits(4, 16)


@pytest.mark.parametrize(
    "text",
    ["", "4", "w4", "a4", "a4w4", "w4a", "wa", "w4a4x", "w4 a4", "4/4", "w-4a4", "w4.5a4", "int8", "w4a4w4a4", "float"],
)
def test_what_is_not_bits_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match="write for example w4a4"):
        Bits.parse(text)


@pytest.mark.parametrize(("text", "near"), [("w4b4", "w4a4"), ("4-8", "w4a8"), ("a8w4", "w8a4"), ("W4/A4", "w4a4")])
def test_a_near_miss_is_named(text: str, near: str) -> None:
    with pytest.raises(InputError, match=f"did you mean {near}"):
        Bits.parse(text)


@pytest.mark.parametrize("text", ["w1a4", "w4a1", "w9a4", "w4a12", "w0a0", "w4a0", "w15a15"])
def test_widths_that_no_format_has_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="bits"):
        Bits.parse(text)


def test_partial_bits_are_for_overrides_only() -> None:
    assert Bits.parse("w4", partial=True) == Bits(4, None)
    assert Bits.parse("a8", partial=True) == Bits(None, 8)
    assert Bits.parse("float", partial=True) == Bits(16, 16)
    for text in ("", "w", "8"):
        with pytest.raises(InputError):
            Bits.parse(text, partial=True)


@given(
    st.sampled_from(["uniform", "log2", "anything"]),
    st.integers(2, 16),
    PERS,
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True).filter(lambda n: n not in ("kind", "bits", "per", "cls")),
        st.one_of(st.booleans(), st.integers(-9, 9), st.text(max_size=4)),
    ),
)
def test_a_format_survives_json(kind: str, bits: int, per: str, options: dict[str, bool | int | str]) -> None:
    fmt = Format(kind, bits, per, tuple(options.items()))
    assert Format.from_json(json.loads(json.dumps(fmt.to_json()))) == fmt
    assert fmt.with_bits(3) == Format(kind, 3, per, tuple(reversed(options.items())))
    assert str(fmt).startswith(f"{kind}{bits}/{per}")


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 32])
def test_formats_of_no_sensible_width_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match="2 to 16"):
        Format("uniform", bits)


@pytest.mark.parametrize(
    "per", ["", "group", "group:", "group:0", "group:-4", "group:08", "group:4x", "Channel", "channel "]
)
def test_unknown_granularities_are_refused(per: str) -> None:
    with pytest.raises(InputError, match="granularity"):
        Format("uniform", 4, per)


@pytest.mark.parametrize(
    "data", [{}, {"kind": "uniform"}, {"bits": 4}, {"kind": "uniform", "bits": 4, "pre": "tensor"}]
)
def test_json_that_is_no_format_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(InputError, match="not a format"):
        Format.from_json(data)


@pytest.mark.parametrize(
    ("text", "pattern", "bits"),
    [
        ("role=HEAD_IN:w8a8", "role=HEAD_IN", Bits(8, 8)),
        ("blocks.0.attn.qkv:linear0.input:a8", "blocks.0.attn.qkv:linear0.input", Bits(None, 8)),
        ("blocks.*:w4", "blocks.*", Bits(4, None)),
        ("head:float", "head", Bits(16, 16)),
    ],
)
def test_an_override_survives_its_own_text(text: str, pattern: str, bits: Bits) -> None:
    override = Override.parse(text)
    assert override == Override(pattern, bits)
    assert Override.parse(str(override)) == override
    assert parse_overrides([text, override]) == (override, override)


@pytest.mark.parametrize("text", ["", "head", ":a8", "head:", "head:8", "head:w4b4", "head:a9"])
def test_what_is_no_override_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        Override.parse(text)
