"""An arithmetic coder over integer frequencies: what a message costs in bits that are really sent.

Parts: `Code` (the bits), `Encoder` and `Decoder`, which take one symbol after the other. There are no floats in here:
given the same integers, two machines agree on every bit. Where the integers come from is said in `entropy_coding.py`.

The method is that of Witten, Neal and Cleary (1987), several bits at a time: the message is an interval within the unit
interval, narrowed by every symbol in proportion to its frequency; what both ends agree on is written out. The end is
the shortest bit string all of whose continuations lie within the interval, so that codes can follow one another without
marks between them, and it costs at most two bits. With totals of at most 2^40 a symbol costs at most 2^-20 bits more
than the logarithm of its share.
"""

from __future__ import annotations

from dataclasses import dataclass

from preconcert.core import CodingError

STATE_BITS = 64
"""Of the coder's registers."""
LARGEST_TOTAL = 1 << 48
"""Frequencies may sum to this at the most."""
_WHOLE = (1 << STATE_BITS) - 1
_HALF = 1 << (STATE_BITS - 1)
_BELOW = _HALF - 1


@dataclass(frozen=True, slots=True)
class Code:
    """A bit string."""

    data: bytes
    """The bits, the first one highest; filled up with zeros to whole bytes."""
    length: int
    """How many bits count."""

    def __str__(self) -> str:
        """The bits as digits."""
        whole = int.from_bytes(self.data, "big")
        return f"{whole:0{8 * len(self.data)}b}"[: self.length] if self.length else ""


def code_of(digits: str) -> Code:
    """The bit string that these binary digits stand for."""
    size = -(-len(digits) // 8)
    padded = digits.ljust(8 * size, "0")
    return Code(int(padded, 2).to_bytes(size, "big") if size else b"", len(digits))


class _Interval:
    """What both ends know: the interval so far, as two registers and how far it has been magnified."""

    def __init__(self) -> None:
        self.low, self.high = 0, _WHOLE
        self.pending = 0
        """Bits that follow the next one and are its opposite: the interval lies around its middle."""

    def narrow(self, low: int, high: int, total: int) -> None:
        """Keep the part from `low` to `high` of `total`."""
        if not 0 <= low < high <= total <= LARGEST_TOTAL:
            raise CodingError(f"no symbol stands at {low} to {high} of {total}")
        width = self.high - self.low + 1
        self.high = self.low + width * high // total - 1
        self.low += width * low // total

    def agreed(self) -> int:
        """How many leading bits both ends of the interval share."""
        return STATE_BITS - (self.low ^ self.high).bit_length()

    def shift(self, count: int) -> None:
        """Let go of the leading bits."""
        self.low = (self.low << count) & _WHOLE
        self.high = (self.high << count) & _WHOLE | (1 << count) - 1

    def around(self) -> int:
        """How many bits after the first are 1 at the low and 0 at the high end: 0.0111… to 0.1000…"""
        straddling = self.low & ~self.high & _BELOW
        return STATE_BITS - 1 - (_BELOW ^ straddling).bit_length()

    def magnify(self, count: int) -> None:
        """Let go of these bits; they are pending."""
        self.pending += count
        self.low = (self.low << count) & _BELOW
        self.high = (self.high << count) & _WHOLE | (1 << count) - 1 | _HALF

    def ending(self) -> str:
        """The shortest bits all of whose continuations lie within the interval, without the pending ones.

        After the leading bits are gone, the low end is below the half and the high end above.
        """
        if self.low == 0 and self.high == _WHOLE:
            return "" if self.pending == 0 else "0"
        if self.low == 0:
            return "0"
        if self.high == _WHOLE:
            return "1"
        return "01" if self.low <= _HALF >> 1 else "10"


class Encoder:
    """Symbols to bits."""

    def __init__(self) -> None:
        self._interval = _Interval()
        self._digits: list[str] = []

    def encode(self, low: int, high: int, total: int) -> None:
        """Add one symbol.

        Args:
            low: sum of the frequencies of the symbols before it.
            high: the same with its own.
            total: of all frequencies.

        Raises:
            CodingError: its frequency is not positive, or the total is beyond `LARGEST_TOTAL`.
        """
        interval = self._interval
        interval.narrow(low, high, total)
        count = interval.agreed()
        if count:
            self._write(f"{interval.low >> STATE_BITS - count:0{count}b}")
            interval.shift(count)
        around = interval.around()
        if around:
            interval.magnify(around)

    def finish(self) -> Code:
        """The bits of all symbols. Nothing can be added afterwards."""
        ending = self._interval.ending()
        if ending:
            self._write(ending)
        return code_of("".join(self._digits))

    def _write(self, digits: str) -> None:
        interval = self._interval
        if interval.pending:
            digits = digits[0] + ("1" if digits[0] == "0" else "0") * interval.pending + digits[1:]
            interval.pending = 0
        self._digits.append(digits)


class Decoder:
    """Bits to symbols. For each symbol ask for its `target` and tell which one was found there.

    Args:
        code: the bits.
        start: where in them the symbols begin.
    """

    def __init__(self, code: Code, start: int = 0) -> None:
        self._digits = str(code)
        self._interval = _Interval()
        self._at = start
        """The next bit to be read into the register."""
        self._gone = start
        """Bits that the encoder had written at this point, without the pending ones."""
        self._value = self._read(STATE_BITS)

    def target(self, total: int) -> int:
        """A number below `total`; the next symbol is the one that it falls into."""
        interval = self._interval
        return ((self._value - interval.low + 1) * total - 1) // (interval.high - interval.low + 1)

    def decode(self, low: int, high: int, total: int) -> None:
        """Take the symbol that was found; arguments as for `Encoder.encode`.

        Raises:
            CodingError: it is not the one at the target.
        """
        if not low <= self.target(total) < high:
            raise CodingError(f"the symbol at {low} to {high} of {total} is not the one at {self.target(total)}")
        interval = self._interval
        interval.narrow(low, high, total)
        count = interval.agreed()
        if count:
            interval.shift(count)
            self._value = (self._value << count) & _WHOLE | self._read(count)
            self._gone += count + interval.pending
            interval.pending = 0
        around = interval.around()
        if around:
            interval.magnify(around)
            self._value = self._value & _HALF | (self._value << around) & _BELOW | self._read(around)

    def finish(self) -> int:
        """Where the code of these symbols ends: the number of bits up to there, `start` included. Never less after more
        symbols, so it may be asked at any time.

        Raises:
            CodingError: the bits broke off before.
        """
        ending = self._interval.ending()
        end = self._gone + (len(ending) + self._interval.pending if ending else 0)
        if end > len(self._digits):
            raise CodingError(f"the code breaks off after {len(self._digits)} bits, {end} are needed")
        return end

    def _read(self, count: int) -> int:
        digits = self._digits[self._at : self._at + count]
        self._at += count
        return int(digits.ljust(count, "0"), 2) if count else 0
