"""What is kept has a bound in bytes, whatever is asked for."""

from __future__ import annotations

import itertools

from preconcert.envs import make_env
from preconcert.models.starter import word_tokenizer
from preconcert.prompts import SpanSettings, TurnFormat, starter_words
from preconcert.prompts.sized_cache import SizedCache


def test_the_sum_is_bounded_and_the_oldest_goes_first() -> None:
    cache, made = SizedCache(10), list[int]()

    def get(key: int, weight: int | None = 4) -> int:
        def make() -> int:
            made.append(key)
            return key * key

        return cache.get(key, make, lambda value: weight)

    assert [get(1), get(2), get(1), get(3), get(1), get(2)] == [1, 4, 1, 9, 1, 4]
    assert made == [1, 2, 3, 2]
    assert (len(cache), cache.held) == (2, 8)
    assert [get(7, 11), get(8, None), get(7, 11)] == [49, 64, 49]
    assert made[4:] == [7, 8, 7], "too large, or not worth it"
    assert (len(cache), cache.held) == (2, 8)


def test_a_format_keeps_what_comes_again_and_no_more() -> None:
    env = make_env("rendezvous", {}, 0)
    words = starter_words(env.words, env.language, env.agents)  # type: ignore[attr-defined]  # built in
    form = TurnFormat(word_tokenizer(words, 256), env.language, SpanSettings())
    form.longest_kept = 40
    text = "row 1 col 2"
    assert form.encode(text) is form.encode(text)
    assert len(form.cache) == 1
    for number in range(20):
        form.encode(f"{text} " * (20 + number))
    assert len(form.cache) == 1, "texts that no model takes are not kept"

    form.cache = SizedCache(200_000)
    legal = env.language.actions
    orders = list(itertools.permutations(legal))
    for order in orders:
        form.automaton(["agent_1"], order)
    assert form.automaton(["agent_1"], orders[-1]) is form.automaton(["agent_1"], orders[-1])
    assert 0 < len(form.cache) < len(orders)
    assert form.cache.held <= form.cache.size
