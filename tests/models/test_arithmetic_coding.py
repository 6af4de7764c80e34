"""The arithmetic coder: exact both ways, within two bits of the logarithm, and codes need no marks between them."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preconcert.core import CodingError
from preconcert.models.arithmetic_coding import LARGEST_TOTAL, Code, Decoder, Encoder, code_of

TOTALS = st.sampled_from([1, 2, 3, 1 << 16, 1 << 32, (1 << 40) - 87, 1 << 40])


@st.composite
def symbols(draw: st.DrawFn) -> tuple[int, int, int]:
    """One symbol's place: alphabets of one, shares of 1 in 2^40 and of all but 1, and what is between."""
    total = draw(TOTALS)
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return 0, total, total
    if kind == 1:
        low = draw(st.integers(0, total - 1))
        return low, low + 1, total
    if kind == 2 and total > 1:
        return draw(st.sampled_from([(0, total - 1, total), (1, total, total)]))
    low = draw(st.integers(0, total - 1))
    return low, draw(st.integers(low + 1, total)), total


def encoded(message: list[tuple[int, int, int]]) -> Code:
    encoder = Encoder()
    for symbol in message:
        encoder.encode(*symbol)
    return encoder.finish()


def read(code: Code, message: list[tuple[int, int, int]], start: int = 0) -> int:
    decoder = Decoder(code, start)
    for low, high, total in message:
        assert low <= decoder.target(total) < high
        decoder.decode(low, high, total)
    return decoder.finish()


@settings(max_examples=200, deadline=None)
@given(st.lists(symbols(), max_size=40))
def test_what_is_encoded_is_decoded_and_as_long_as_it_may_be(message: list[tuple[int, int, int]]) -> None:
    code = encoded(message)
    assert read(code, message) == code.length
    share = math.prod((Fraction(high - low, total) for low, high, total in message), start=Fraction(1))
    ideal = math.log2(share.denominator) - math.log2(share.numerator)
    assert ideal - 1e-6 <= code.length <= ideal + 2 + len(message) * 2.0**-20
    assert len(code.data) == -(-code.length // 8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(symbols(), max_size=12), min_size=1, max_size=6), st.text("01", max_size=9))
def test_codes_follow_one_another_without_marks(
    messages: list[list[tuple[int, int, int]]], rest: str
) -> None:
    joined = code_of("".join(str(encoded(message)) for message in messages) + rest)
    place = 0
    for message in messages:
        place = read(joined, message, place)
    assert place == joined.length - len(rest)


@settings(max_examples=60, deadline=None)
@given(st.lists(symbols(), min_size=1, max_size=12), st.data())
def test_a_code_that_breaks_off_is_noticed(message: list[tuple[int, int, int]], data: st.DataObject) -> None:
    digits = str(encoded(message))
    if digits:
        short = code_of(digits[: data.draw(st.integers(0, len(digits) - 1))])
        with pytest.raises(CodingError):
            _decode_strictly(short, message)


def _decode_strictly(code: Code, message: list[tuple[int, int, int]]) -> None:
    decoder = Decoder(code)
    for symbol in message:
        decoder.decode(*symbol)
    decoder.finish()


def test_what_is_certain_costs_nothing() -> None:
    code = encoded([(0, 1, 1), (0, 5, 5), (0, LARGEST_TOTAL, LARGEST_TOTAL)] * 100)
    assert code == Code(b"", 0)
    assert str(code) == ""


def test_a_long_run_of_the_likely_costs_its_logarithm() -> None:
    total = 1 << 40
    message = [(0, total - 1, total)] * 50_000 + [(total - 1, total, total)]
    assert 40 <= encoded(message).length <= 42


def test_underflow_is_carried_over() -> None:
    """The middle third, again and again: no bit is agreed upon until the very end."""
    message = [(1, 2, 3)] * 3000
    code = encoded(message)
    assert abs(code.length - 3000 * math.log2(3)) < 2
    assert read(code, message) == code.length


@pytest.mark.parametrize("symbol", [(1, 1, 2), (2, 1, 3), (0, 3, 2), (-1, 1, 2), (0, 1, LARGEST_TOTAL + 1)])
def test_what_is_no_symbol_is_refused(symbol: tuple[int, int, int]) -> None:
    with pytest.raises(CodingError, match="no symbol stands"):
        Encoder().encode(*symbol)


def test_the_decoder_takes_the_symbol_that_is_there_only() -> None:
    decoder = Decoder(encoded([(0, 1, 4)]))
    with pytest.raises(CodingError, match="is not the one at"):
        decoder.decode(1, 2, 4)


def test_bits_read_as_digits() -> None:
    assert str(code_of("0010110001")) == "0010110001"
    assert code_of("0010110001").data == bytes([0b00101100, 0b01000000])
