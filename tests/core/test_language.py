"""A task's language: which word stands for a reward."""

from __future__ import annotations

import pytest

from preconcert.core import REWARD_TOLERANCE, TaskLanguage

PAID = {1: "1", -0.0: "0", 1 / 3: "0.3333", 0.0004: "0.0005", 0.0002: "0", 0.5: None, 1.0011: None}


@pytest.mark.parametrize(("reward", "word"), PAID.items())
def test_a_reward_has_the_nearest_word_within_the_tolerance(reward: float, word: str | None) -> None:
    language = TaskLanguage(("stay",), rewards=("0", "0.0005", "0.3333", "1"))
    assert language.reward_word(reward) == word
    assert TaskLanguage(("stay",)).reward_word(reward) is None


def test_the_tolerance_itself_is_too_far() -> None:
    assert TaskLanguage(("stay",), rewards=("0",)).reward_word(REWARD_TOLERANCE) is None
