"""Seeds mean the same on every machine; uniforms depend on their own seed and counter alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preconcert.core import SpanKind, derive_seed, uniforms

ROOT = Path(__file__).parents[2]
MASK = 2**64 - 1
U64 = np.uint64


@pytest.mark.parametrize(
    ("parts", "seed"),
    [
        ((), 8_238_016_292_129_134_938),
        ((0,), 6_711_488_920_161_924_273),
        (("rendezvous", 17, "train"), 1_279_129_608_467_353_455),
        (("channel", -1, "Béla"), 1_268_320_321_432_256_513),
    ],
)
def test_derived_seeds_are_the_same_for_ever(parts: tuple[int | str, ...], seed: int) -> None:
    assert derive_seed(*parts) == seed


def test_derived_seeds_do_not_depend_on_the_process() -> None:
    program = "from preconcert.core import derive_seed; print(derive_seed('rendezvous', 17, 'train'))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(out.stdout) == derive_seed("rendezvous", 17, "train")


def test_different_parts_give_different_seeds() -> None:
    parts: list[tuple[int | str, ...]] = [
        (), ("",), ("", ""), (1,), ("1",), (1, 2), (12,), ("12",), ("1", "2"), (2, 1), (-1,), ("-1",), ("a",), ("A",),
        ("a", 1), ("a1",), ("a\x1fint:1",), ("a\\x1fint:1",), ("a\\", "b"), ("a", "\\b"), ("a\x1f", "b"),
        ("a", "\x1fb"), ("int:1",), ("str:1",), (2**64,), (0,), (2**200,),
    ]  # fmt: skip
    assert len({derive_seed(*p) for p in parts}) == len(parts)


@given(st.lists(st.integers() | st.text(), max_size=4), st.lists(st.integers() | st.text(), max_size=4))
def test_seeds_are_equal_exactly_where_the_parts_are(one: list[int | str], other: list[int | str]) -> None:
    assert (derive_seed(*one) == derive_seed(*other)) == (one == other)
    assert 0 <= derive_seed(*one) < 2**63


def test_equal_parts_of_another_type_give_equal_seeds() -> None:
    assert derive_seed(np.int64(3), "x") == derive_seed(3, "x")  # type: ignore[arg-type]
    assert derive_seed(SpanKind.ACT) == derive_seed("act")


def test_a_part_that_is_neither_is_refused() -> None:
    with pytest.raises(TypeError, match="float"):
        derive_seed(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seed", "words"),
    [  # the published outputs of splitmix64
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_uniforms_are_splitmix64(seed: int, words: list[int]) -> None:
    drawn = uniforms(np.full(3, seed, dtype=U64), np.arange(3, dtype=U64))
    assert drawn.dtype == np.float64
    assert drawn.tolist() == [((word >> 12) + 0.5) / 2**52 for word in words]


def unmixed(word: int) -> int:
    """The seed whose uniform at counter 0 is made of `word`: splitmix64 backwards."""

    def unshifted(z: int, by: int) -> int:
        out = z
        for _ in range(64 // by):
            out = z ^ (out >> by)
        return out

    z = unshifted(word, 31) * pow(0x94D049BB133111EB, -1, 2**64) & MASK
    z = unshifted(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
    return (unshifted(z, 30) - 0x9E3779B97F4A7C15) & MASK


@pytest.mark.parametrize("word", [0, 1, 2**63, MASK, MASK - 1, MASK - 2**11])
def test_the_ends_of_the_interval_are_left_out(word: int) -> None:
    (drawn,) = uniforms(np.array([unmixed(word)], dtype=U64), 0)
    assert 0 < drawn < 1
    assert drawn == pytest.approx(word / 2**64, abs=2**-50)


@given(st.lists(st.tuples(st.integers(0, MASK), st.integers(0, 2**40)), min_size=1, max_size=8), st.data())
def test_a_row_does_not_notice_the_batch(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    seeds = np.array([seed for seed, _ in rows], dtype=U64)
    counters = np.array([counter for _, counter in rows], dtype=U64)
    together = uniforms(seeds, counters)
    order = np.array(data.draw(st.permutations(range(len(rows)))))
    assert uniforms(seeds[order], counters[order]).tolist() == together[order].tolist()
    for row, (seed, counter) in enumerate(rows):
        assert uniforms(np.array([seed], dtype=U64), counter).tolist() == [together[row]]


def test_neither_the_seeds_nor_global_state_is_touched() -> None:
    seeds = np.arange(5, dtype=U64)
    before = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]  # noqa: NPY002  that is what is watched
    uniforms(seeds, 3)
    assert seeds.tolist() == [0, 1, 2, 3, 4]
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index, union-attr]  # noqa: NPY002


N = 200_000


@pytest.mark.parametrize(
    "drawn",
    [
        uniforms(np.arange(N, dtype=U64), 0),
        uniforms(np.full(N, 7, dtype=U64), np.arange(N, dtype=U64)),
        uniforms(np.array([derive_seed("x", i) for i in range(20_000)], dtype=U64), 5),
    ],
    ids=["neighbouring seeds", "one stream", "derived seeds"],
)
def test_uniforms_are_uniform(drawn: np.ndarray) -> None:
    error = len(drawn) ** -0.5  # five standard deviations, in the units of each statistic
    assert drawn.mean() == pytest.approx(0.5, abs=5 * error / 12**0.5)
    assert drawn.var() == pytest.approx(1 / 12, abs=5 * error / 180**0.5)
    assert np.corrcoef(drawn[:-1], drawn[1:])[0, 1] == pytest.approx(0, abs=5 * error)
    counts = np.histogram(drawn, bins=16, range=(0, 1))[0] / len(drawn)
    assert counts == pytest.approx(1 / 16, abs=5 * error * (15 / 256) ** 0.5)
