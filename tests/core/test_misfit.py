"""What does not fit a model is named by its key, also inside unions whose tags are called as their keys."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from preconcert.core.misfit import describe


class Beam(BaseModel, extra="forbid"):
    type: Literal["beam"] = "beam"
    beam: int = Field(1, ge=1)


class Flat(BaseModel, extra="forbid"):
    type: Literal["flat"] = "flat"


class Held(BaseModel, extra="forbid"):
    search: Annotated[Beam | Flat, Field(discriminator="type")] = Beam()
    either: Beam | None = None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"search": {"type": "beam", "beam": 0}}, "search.beam = 0: expected at least 1"),
        ({"search": {"type": "beam", "beam": "x"}}, "search.beam = 'x': expected a whole number"),
        ({"search": {"type": "beam", "baem": 2}}, "unknown key 'search.baem' = 2; did you mean 'search.beam'?"),
        ({"either": {"type": "beam", "beam": 0}}, "either.beam = 0: expected at least 1"),
        ({"either": {"beam": 0}}, "either.beam = 0: expected at least 1"),
    ],
)
def test_the_key_is_named_once(content: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Held.model_validate(content)
    assert describe(caught.value, Held, content) == expected
