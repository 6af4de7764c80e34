"""The world-model experiment at its smallest, as a user would run it: every model fitted, asked, drawn and written."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from typer.testing import Result

from preconcert.experiments.world_model import SMOKE


@pytest.mark.slow
def test_at_its_smallest_it_says_what_it_found(
    run_command: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("experiments") / "world-model"
    result = run_command("experiment", "world-model", "--scale", "smoke", "--out", folder, "--jobs", "2")
    assert result.exit_code == 0, result.stderr
    held = json.loads((folder / "result.json").read_text())
    assert held["cells_failed"] == []
    assert {each["arm"] for each in held["cells"]} == {arm.name for arm in SMOKE.arms}
    for each in held["cells"]:
        for name in ("mse", "exact", "determined", "malformed"):
            for mode in "ab":
                for h in (1, 5):
                    assert 0 <= each["measures"][f"{name}_{mode}_{h}"] <= 1
        assert len(each["curves"]["mse_a"]) == 5
        assert 0 <= each["measures"]["inside_kept"] <= 1
    # One warm start, world model and run for all models of a task and seed with the same prompts; one play for all.
    recipes = {tuple(arm.overrides.items()) for arm in SMOKE.arms}
    assert len([path for path in (folder / "warm").iterdir() if path.is_dir()]) == 3 * len(recipes) + 1
    for name in ("free_success", "seen_views", "success_threshold"):
        assert len({each["measures"][name] for each in held["cells"]}) == 1, "all are asked about the same play"
    assert sorted(path.stem for path in (folder / "figures").glob("*.png")) == ["exact", "mse", "reliability"]
