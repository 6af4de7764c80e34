"""Diagnostics of logs whose trouble is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from preconcert.core import ConfigError
from preconcert.experiments.diagnostics import diagnose, diagnostics_page, panels_of, read_log, said


def log_of(norms: list[float], success: list[float]) -> list[dict[str, float]]:
    return [
        {
            "iteration": number, "success": rate, "gradient_norm/largest": norm, "gradient_share/a": 0.25,
            "gradient_share/b": 0.75, "entropy": 1.0 - number / 100, "environment_steps": 10.0,
            "trained_tokens/act": 7.0, "skipped_steps": 0.5,
        }
        for number, (norm, rate) in enumerate(zip(norms, success, strict=True))
    ]  # fmt: skip


def test_spikes_falls_and_shares_are_found() -> None:
    log = log_of([1.0] * 10 + [6.0] + [1.0] * 9 + [4.9], [0.2] * 5 + [0.9] * 6 + [0.4] * 10)
    found = diagnose(log)
    assert found["gradient_spikes"] == 1
    assert found["peak_minus_final"] == pytest.approx(0.5)
    assert found["gradient_share"] == {"a": pytest.approx(0.25), "b": pytest.approx(0.75)}
    assert found["environment_steps"] == 210
    assert found["trained_tokens"] == {"act": 147}
    assert found["skipped_steps"] == 0.5
    assert found["explained_variance"] is None
    assert ("gradient share, b", "0.750") in said(found)


def test_a_calm_log_has_no_spike() -> None:
    assert diagnose(log_of([1.0] * 30, [0.5] * 30))["gradient_spikes"] == 0


def test_panels_hold_what_was_logged_and_nothing_else() -> None:
    panels = dict(panels_of(log_of([1.0, 2.0], [0.1, 0.2])))
    assert panels["largest gradient norm"] == {"gradient_norm/largest": ([1, 2], [1.0, 2.0])}
    assert set(panels["share of the squared gradient"]) == {"a", "b"}
    assert "critic: explained variance" not in panels


def test_predictions_and_imaginations_have_panels() -> None:
    more = {"prediction/brier": 0.8, "predictability/by_view": 0.5, "imagination/malformed": 0.1}
    log = [{**line, **more} for line in log_of([1.0, 1.0], [0.1, 0.2])]
    panels = dict(panels_of(log))
    assert panels["predictions: how true"] == {"prediction/brier": ([1, 2], [0.8, 0.8])}
    assert set(panels["how predictable agents are"]) == {"predictability/by_view"}
    assert set(panels["imagined games"]) == {"imagination/malformed"}
    found = diagnose(log)
    assert found["prediction"] == {"brier": pytest.approx(0.8)}
    assert ("prediction, brier", "0.800") in said(found)
    assert ("imagined malformed", "0.100") in said(found)
    assert diagnose(log_of([1.0], [0.1]))["prediction"] == {}


def test_the_page_loads_nothing() -> None:
    page = diagnostics_page("<b>name</b>", [("run", "runs/x")], log_of([1.0] * 3, [0.1] * 3))
    assert "data:image/png;base64," in page
    assert "<b>name</b>" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_a_torn_last_line_is_left_out_and_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no training log"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"iteration": 0, "success": 1.0}\n{"itera')
    assert read_log(tmp_path) == [{"iteration": 0, "success": 1.0}]
