"""What a request may ask for."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from preconcert.serving.wire import MOST_WORDS, LanguageBody


def test_a_language_has_so_many_words() -> None:
    """Each field keeps its own limit, and all of them together another one."""
    slot = {"name": "place", "choices": [f"w{number}" for number in range(512)]}
    most = {"actions": ["stay"] * 511, "message": [slot] * 7}
    assert len(LanguageBody.model_validate(most).language().message) == 7
    with pytest.raises(ValidationError, match=rf"4607 actions and choices are more than the limit of {MOST_WORDS}"):
        LanguageBody.model_validate({**most, "forecast": [slot]})
