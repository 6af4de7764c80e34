"""Messages as bits that could be sent: the model that both sides have is the arithmetic coder's table.

Parts: `MessagePrior` (what both sides expect of a message, symbol by symbol), `ModelPrior` (a language model's
expectation after a public context) and `MessageCoder` (messages to `Code`s and back). Another prior, of counts, is in
`training/message_prior.py`; the integer coder itself is in `arithmetic_coding.py`.

A message is a flag and then its symbols, each under the prior's distribution after those before it, the end included.
Probabilities become integers that sum to 2^40, none of them 0, so a message costs at most two bits and one part in a
million more than its negative log2 probability. What has no spelling (words that the tokenizer does not know, text that
comes back changed, text that is too long or ends the sequence in its midst) is announced by the other side of the flag,
which costs `ESCAPE_BITS`, and follows as UTF-8 under an adaptive count of bytes: every string can be sent.

Sender and receiver must hold the same bits of every distribution. Within one kind of machine, with the same weights,
library versions and number of threads, `NextTokenModel` promises that. Across kinds of machines nothing does, and where
they round differently, a code may be read as another message without notice. The integer part is exact everywhere.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from preconcert.core import CodingError
from preconcert.models.arithmetic_coding import Code, Decoder, Encoder
from preconcert.models.next_token import NextRequest, NextTokenModel
from preconcert.prompts.message_spelling import Spelling

TOTAL = 1 << 40
"""What a distribution's frequencies sum to."""
ESCAPE_BITS = 10
"""What it costs to announce a message that has no spelling. All others pay 0.0014 bits for the possibility."""
_FLAGS = 1 << ESCAPE_BITS
_BYTE_GAIN = 16
"""What a byte's count grows by when it is seen; all begin at 1."""
_BYTES_END = 256


@dataclass(frozen=True, slots=True)
class Expected:
    """A distribution of the next symbol."""

    symbols: tuple[int, ...] | None
    """The symbols, ascending; None for 0, 1, 2 and so on."""
    logprobs: NDArray[np.float64]
    """Their natural log-probabilities, up to a constant."""


class MessagePrior(Protocol):
    """What sender and receiver expect of a message, given a context that both of them know."""

    def spell(self, text: str) -> tuple[int, ...] | None:
        """The message as symbols, its end included; None where they would not give the same text back."""
        ...

    def read(self, symbols: Sequence[int]) -> str:
        """The message that symbols stand for."""
        ...

    def over(self, symbols: Sequence[int]) -> bool:
        """Is the message complete?"""
        ...

    def expect(self, asked: Sequence[tuple[Any, tuple[int, ...]]]) -> list[Expected]:
        """The distribution of the next symbol in each of these contexts, after these symbols.

        The answer to one must be the same bits whatever else is asked.
        """
        ...


class ModelPrior:
    """A language model's expectation.

    Args:
        model: that both sides have.
        spelling: of the messages.
        adapter: that both sides have; None for the base model.
        prompt: the prompt of a context; by default contexts are prompts.
    """

    def __init__(
        self,
        model: NextTokenModel,
        spelling: Spelling,
        adapter: str | None = None,
        prompt: Callable[[Any], tuple[int, ...]] | None = None,
    ) -> None:
        self.model = model
        self.spelling = spelling
        self.adapter = adapter
        self._prompt = prompt

    def spell(self, text: str) -> tuple[int, ...] | None:
        """The message's tokens."""
        return self.spelling.spell(text)

    def read(self, symbols: Sequence[int]) -> str:
        """The message of the tokens."""
        return self.spelling.read(symbols)

    def over(self, symbols: Sequence[int]) -> bool:
        """Does the end of sequence stand there?"""
        return bool(symbols) and symbols[-1] == self.spelling.eos

    def expect(self, asked: Sequence[tuple[Any, tuple[int, ...]]]) -> list[Expected]:
        """Among the tokens that the spelling's automaton allows; what it forces is not asked of the model."""
        requests: list[NextRequest] = []
        answers: list[Expected | None] = []
        for context, symbols in asked:
            tokens = self._allowed(symbols)
            if tokens is not None and len(tokens) == 1:
                answers.append(Expected(tokens, np.zeros(1)))
                continue
            answers.append(None)
            prompt = self._prompt(context) if self._prompt is not None else tuple(context)
            requests.append(NextRequest(prompt + symbols, self.adapter, tokens))
        found = iter(zip(requests, self.model.next_logprobs(requests), strict=True))
        return [answer or Expected(*_of(next(found))) for answer in answers]

    def _allowed(self, symbols: tuple[int, ...]) -> tuple[int, ...] | None:
        automaton = self.spelling.automaton
        if automaton is None:
            return None
        return tuple(sorted(automaton.transitions[automaton.walk(symbols)[-1]]))


def _of(pair: tuple[NextRequest, NDArray[np.float64]]) -> tuple[tuple[int, ...] | None, NDArray[np.float64]]:
    return pair[0].tokens, pair[1]


class Table:
    """A distribution in integers: where each symbol stands among the frequencies.

    The likeliest comes first: what begins at 0 has the shortest end, so that likely messages end soonest.

    Args:
        expected: the distribution.

    Raises:
        CodingError: it has no symbols, too many, or numbers that are none.
    """

    def __init__(self, expected: Expected) -> None:
        frequencies = frequencies_of(expected.logprobs)
        order = np.argsort(-frequencies, kind="stable")
        symbols = np.arange(len(order)) if expected.symbols is None else np.array(expected.symbols, dtype=np.int64)
        self._symbols: NDArray[np.int64] = symbols[order]
        self._ranked = np.argsort(self._symbols)
        self._ends: NDArray[np.int64] = np.concatenate([[0], np.cumsum(frequencies[order])])

    @property
    def size(self) -> int:
        """Number of symbols."""
        return len(self._symbols)

    def place(self, symbol: int) -> tuple[int, int]:
        """Where a symbol's frequency begins and ends.

        Raises:
            CodingError: it is none of the symbols.
        """
        rank = int(self._symbols.searchsorted(symbol, sorter=self._ranked))
        at = int(self._ranked[rank]) if rank < self.size else -1
        if at < 0 or int(self._symbols[at]) != symbol:
            raise CodingError(f"symbol {symbol} is none of the {self.size} that may stand there")
        return int(self._ends[at]), int(self._ends[at + 1])

    def symbol(self, target: int) -> int:
        """The symbol that a number below the total falls into."""
        return int(self._symbols[int(self._ends.searchsorted(target, side="right")) - 1])


def frequencies_of(logprobs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Integers in proportion to the probabilities, at least 1 each, that sum to `TOTAL`.

    Raises:
        CodingError: there are none, too many, or one is not a number.
    """
    count = len(logprobs)
    if not 0 < count <= TOTAL >> 16:
        raise CodingError(f"a distribution over {count} symbols cannot be coded with")
    most = float(logprobs.max())
    if not math.isfinite(most):
        raise CodingError(f"a distribution has {most} as its largest log-probability")
    weights = np.exp(logprobs - most)
    found: NDArray[np.int64] = (weights / weights.sum() * (TOTAL - count)).astype(np.int64) + 1
    found[int(logprobs.argmax())] += TOTAL - int(found.sum())
    return found


class ByteModel:
    """Counts of the bytes seen so far, and of the end: what text without a spelling is coded with."""

    def __init__(self) -> None:
        self.counts = [1] * (_BYTES_END + 1)
        self.total = len(self.counts)

    def place(self, byte: int) -> tuple[int, int]:
        """Where a byte's count begins and ends; 256 is the end of the text."""
        low = sum(self.counts[:byte])
        return low, low + self.counts[byte]

    def symbol(self, target: int) -> int:
        """The byte that a number below the total falls into."""
        low = 0
        for byte, count in enumerate(self.counts):
            low += count
            if target < low:
                return byte
        raise CodingError(f"{target} is not below {self.total}")

    def see(self, byte: int) -> None:
        """Count it."""
        self.counts[byte] += _BYTE_GAIN
        self.total += _BYTE_GAIN


@dataclass(slots=True)
class _Sending:
    """A message under way into bits."""

    context: Any
    symbols: tuple[int, ...]
    encoder: Encoder | None
    """None where only the length is wanted."""
    bits: float = 0.0
    """Without the end."""
    at: int = 0

    def put(self, low: int, high: int, total: int) -> None:
        """One symbol."""
        self.bits += math.log2(total / (high - low))
        if self.encoder is not None:
            self.encoder.encode(low, high, total)


@dataclass(slots=True)
class _Receiving:
    """A message on its way out of bits."""

    context: Any
    decoder: Decoder
    symbols: list[int] = field(default_factory=list)
    text: str | None = None
    """As soon as it is known."""


_Line = TypeVar("_Line", _Sending, _Receiving)


class MessageCoder:
    """Messages to bits and back.

    Distributions are held by context and symbols before, as many as fit, and computed for many messages at a time; a
    message that stands among others more than once is coded once.

    Args:
        prior: what both sides expect.
        at_once: distributions that are asked for and looked at together.
        held: numbers (symbols of all distributions together) that are kept.
    """

    def __init__(self, prior: MessagePrior, at_once: int = 128, held: int = 1 << 22) -> None:
        self.prior = prior
        self.at_once = at_once
        self.held = held
        self._tables: OrderedDict[tuple[Hashable, tuple[int, ...]], Table] = OrderedDict()
        self._numbers = 0

    def encode(self, messages: Sequence[tuple[Any, str]]) -> list[Code]:
        """The bits of each message.

        Args:
            messages: context and text.
        """
        codes: dict[tuple[Any, str], Code] = {}
        for message, sending in self._sent(messages, True).items():
            assert sending.encoder is not None
            codes[message] = sending.encoder.finish()
        return [codes[message] for message in messages]

    def bits(self, messages: Sequence[tuple[Any, str]]) -> list[float]:
        """Each message's length as the coder sees it, without the at most two bits of its end: negative log2 of the
        frequencies' shares. What a channel counts where the ends of messages are not what matters."""
        sent = self._sent(messages, False)
        return [sent[message].bits for message in messages]

    def decode(self, codes: Sequence[tuple[Any, Code]]) -> list[str]:
        """The messages of codes.

        Args:
            codes: context and bits.

        Raises:
            CodingError: a code breaks off, or has bits left over.
        """
        received = self._received([(context, code, 0) for context, code in codes])
        texts: list[str] = []
        for context, code in codes:
            text, end = received[context, code, 0]
            if end != code.length:
                raise CodingError(f"{code.length - end} of {code.length} bits are left over after {text[:40]!r}")
            texts.append(text)
        return texts

    def read(self, context: Any, code: Code, start: int = 0) -> tuple[str, int]:
        """The message that begins at a place among bits, and the place where it ends.

        Raises:
            CodingError: the bits break off before.
        """
        return self._received([(context, code, start)])[context, code, start]

    # ---- sending

    def _sent(self, messages: Sequence[tuple[Any, str]], really: bool) -> dict[tuple[Any, str], _Sending]:
        found = {message: self._begun(*message, really) for message in dict.fromkeys(messages)}
        live = [one for one in found.values() if one.symbols]
        while live:
            for table, some in self._in_turn([(one.context, one.symbols[: one.at]) for one in live], live):
                for one in some:
                    one.put(*table.place(one.symbols[one.at]), TOTAL)
                    one.at += 1
            live = [one for one in live if one.at < len(one.symbols)]
        return found

    def _begun(self, context: Any, text: str, really: bool) -> _Sending:
        symbols = self.prior.spell(text)
        sending = _Sending(context, symbols or (), Encoder() if really else None)
        if symbols is not None:
            sending.put(0, _FLAGS - 1, _FLAGS)
            return sending
        sending.put(_FLAGS - 1, _FLAGS, _FLAGS)
        model = ByteModel()
        for byte in (*text.encode("utf-8", "surrogatepass"), _BYTES_END):
            sending.put(*model.place(byte), model.total)
            model.see(byte)
        return sending

    # ---- receiving

    def _received(self, codes: Sequence[tuple[Any, Code, int]]) -> dict[tuple[Any, Code, int], tuple[str, int]]:
        found = {key: _opened(key[0], Decoder(*key[1:])) for key in dict.fromkeys(codes)}
        while live := [one for one in found.values() if one.text is None]:
            for table, some in self._in_turn([(one.context, tuple(one.symbols)) for one in live], live):
                for one in some:
                    symbol = table.symbol(one.decoder.target(TOTAL))
                    one.decoder.decode(*table.place(symbol), TOTAL)
                    one.decoder.finish()
                    one.symbols.append(symbol)
                    if self.prior.over(one.symbols):
                        one.text = self.prior.read(one.symbols)
        return {key: (one.text or "", one.decoder.finish()) for key, one in found.items()}

    # ---- distributions

    def _in_turn(
        self, keys: Sequence[tuple[Any, tuple[int, ...]]], lines: Sequence[_Line]
    ) -> Iterator[tuple[Table, list[_Line]]]:
        """Every distribution that some lines need next, with the lines that need it."""
        wanted: dict[tuple[Any, tuple[int, ...]], list[_Line]] = {}
        for key, line in zip(keys, lines, strict=True):
            wanted.setdefault(key, []).append(line)
        asked = list(wanted)
        for start in range(0, len(asked), self.at_once):
            some = asked[start : start + self.at_once]
            for key, table in zip(some, self._look_up(some), strict=True):
                yield table, wanted[key]

    def _look_up(self, asked: Sequence[tuple[Any, tuple[int, ...]]]) -> list[Table]:
        """The tables of contexts and symbols, all different, from one call of the prior for those that are not held."""
        here: dict[tuple[Any, tuple[int, ...]], Table] = {}
        missing: list[tuple[Any, tuple[int, ...]]] = []
        for key in asked:
            table = self._tables.get(key)
            if table is None:
                missing.append(key)
            else:
                self._tables.move_to_end(key)
                here[key] = table
        if missing:
            for key, expected in zip(missing, self.prior.expect(missing), strict=True):
                here[key] = self._tables[key] = Table(expected)
                self._numbers += here[key].size
            while self._numbers > self.held and len(self._tables) > 1:
                _, dropped = self._tables.popitem(last=False)
                self._numbers -= dropped.size
        return [here[key] for key in asked]


def _opened(context: Any, decoder: Decoder) -> _Receiving:
    """After the flag; text without a spelling is read at once."""
    receiving = _Receiving(context, decoder)
    if decoder.target(_FLAGS) < _FLAGS - 1:
        decoder.decode(0, _FLAGS - 1, _FLAGS)
        return receiving
    decoder.decode(_FLAGS - 1, _FLAGS, _FLAGS)
    model, content = ByteModel(), bytearray()
    while True:
        byte = model.symbol(decoder.target(model.total))
        decoder.decode(*model.place(byte), model.total)
        model.see(byte)
        if byte == _BYTES_END:
            break
        content.append(byte)
        decoder.finish()  # bits that break off would go on as zeros for ever
    try:
        receiving.text = content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise CodingError(f"the bytes of a message are no text: {error}") from error
    return receiving
