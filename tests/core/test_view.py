"""Views: text to values and back, strictly, and squared errors on a scale from 0 to 1."""

from __future__ import annotations

import pytest

from preconcert.core import GrammarError, View, ViewField

VIEW = View(
    (
        ViewField("left", tuple(map(str, range(13))), "left", number=True, determined=True),
        ViewField("down", ("n1", "v0", "s1", "far"), "the box", places=(0.0, 0.5, 1.0, 1.0)),
        ViewField("goal", ("north", "unknown")),
    )
)


def test_a_view_is_read_and_written_back() -> None:
    text = "left 12 the box n1 unknown"
    assert VIEW.parse(text) == ("12", "n1", "unknown")
    assert VIEW.render(VIEW.parse(text)) == text
    assert VIEW.index("goal") == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("right 12 the box n1 unknown", "'right'"),
        ("left 13 the box n1 unknown", "'13' is no value of left"),
        ("left 12 a box n1 unknown", "'a box'"),
        ("left 12 the box n1", "'' is no value of goal"),
        ("left 12 the box n1 north east", "'east' is left over"),
    ],
)
def test_anything_else_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(GrammarError, match=named):
        VIEW.parse(text)


def test_errors_are_squared_distances() -> None:
    left, down, goal = VIEW.fields
    assert left.error("12", "0") == 1.0
    assert left.error("3", "6") == pytest.approx((3 / 12) ** 2)
    assert down.error("n1", "v0") == 0.25
    assert down.error("s1", "far") == 0.0
    assert goal.error("north", "unknown") == 1.0
    assert goal.error("north", "north") == 0.0
    assert left.digits == 2
