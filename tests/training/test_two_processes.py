"""Two processes train one team: in step with each other, on different seeds, and like one process would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preconcert.core import dump_episode, load_episodes
from preconcert.training.run import train
from preconcert.training.update import Order
from tests.training import two_processes
from tests.training.teams import AGENTS, largest_difference, load, starter_checkpoint, weights_of

ROOT = Path(__file__).parents[2]


def test_two_processes_do_what_one_does(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint("starter")
    game = starter_checkpoint(tmp_path / "game", "matrix", two_processes.GAME)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "tests.training.two_processes", str(folder), str(tmp_path / "two"), str(game),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (load_file(tmp_path / "two" / str(rank) / "adapters.safetensors") for rank in (0, 1))
    found = [json.loads((tmp_path / "two" / str(rank) / "found.json").read_text()) for rank in (0, 1)]
    assert [one["world"] for one in found] == [2, 2], "the processes did not know of each other"
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not set(found[0]["seeds"]) & set(found[1]["seeds"])
    assert set(found[0]["seeds"]) | set(found[1]["seeds"]) == set(range(two_processes.SEEDS))
    assert found[0]["rows"] != found[1]["rows"], "batches of one size are the easy case"

    single = two_processes.run(folder, tmp_path / "one", 0, 1)
    moved = largest_difference(single, weights_of(load(folder)))
    difference = largest_difference(single, first)
    print(f"one process moved {moved:.1e}; largest difference to two processes {difference:.1e}")
    assert moved > 1e-3
    assert difference < 1e-6

    # The whole run: each process records its own groups, and the team is that of a single process.
    alone = train(two_processes.whole_recipe(), tmp_path / "alone")
    together = tmp_path / "two" / "run"
    expected = {dump_episode(e) for e in load_episodes(alone / "episodes.jsonl").episodes if e.iteration == 0}
    records = [load_episodes(together / name).episodes for name in ("episodes.jsonl", "episodes-1.jsonl")]
    assert not {e.seed for e in records[0]} & {e.seed for e in records[1]}
    assert {dump_episode(e) for record in records for e in record if e.iteration == 0} == expected
    for name in AGENTS:
        mine = load_file(together / "adapters" / name / "adapter_model.safetensors")
        theirs = load_file(alone / "adapters" / name / "adapter_model.safetensors")
        warm = load_file(alone / "warm" / name / "adapter_model.safetensors")
        difference, moved = largest_difference(mine, theirs), largest_difference(theirs, warm)
        print(f"{name}: moved {moved:.1e}; largest difference to two processes {difference:.1e}")
        assert difference < 1e-3 * moved

    for order in Order:
        compare_games(order, game, tmp_path)


def compare_games(order: Order, game: Path, out: Path) -> None:
    """Credit over the whole rollout, a critic fitted together, limits that all keep alike."""
    alone = two_processes.play_games(game, out / "one", 0, 1, order)
    expected = json.loads((out / "one" / "0" / order / "found.json").read_text())
    first, second = (load_file(out / "two" / str(rank) / order / "weights.safetensors") for rank in (0, 1))
    found = [json.loads((out / "two" / str(rank) / order / "found.json").read_text()) for rank in (0, 1)]
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert found[0]["rows"] != found[1]["rows"], "shares of one size are the easy case"
    for name in ("advantages", "roles"):
        for iteration in range(2):
            parts = [one[name][iteration] for one in found]
            assert not parts[0].keys() & parts[1].keys()
            mine, whole = {**parts[0], **parts[1]}, expected[name][iteration]
            # The rows that are left out are the same ones too.
            assert mine.keys() == whole.keys()
            difference = max(abs(mine[key] - whole[key]) for key in whole)
            print(f"{order}, {name}, iteration {iteration}: {len(whole)} rows, advantages up to "
                  f"{max(map(abs, whole.values())):.2f}, largest difference {difference:.1e}")  # fmt: skip
            assert len(set(whole.values())) > 3
            assert difference < 1e-4
    assert found[0]["baselines"] == found[1]["baselines"] == expected["baselines"]
    for name in ("approx_kl", "skipped_steps", "value_loss", "explained_variance", "trained_tokens/act"):
        assert found[0][name] == found[1][name], name
        assert found[0][name] == pytest.approx(expected[name], rel=1e-3, abs=1e-7), name
    if order is Order.SIMULTANEOUS:
        print(f"{order}: KL {expected['approx_kl']}, skipped {expected['skipped_steps']}")
        assert expected["skipped_steps"][0] == 1.0
    start = {key: torch.zeros_like(value) for key, value in alone.items()} | weights_of(load(game))
    for kind, keys in (
        ("policies", [key for key in alone if key.startswith("agent_")]),
        ("critic", [key for key in alone if key.startswith(("critic", "head linear"))]),
    ):
        moved = largest_difference({k: alone[k] for k in keys}, {k: start[k] for k in keys})
        difference = largest_difference({k: alone[k] for k in keys}, {k: first[k] for k in keys})
        print(f"{order}, {kind}: moved {moved:.1e}; largest difference to two processes {difference:.1e}")
        assert moved > 1e-3
        assert difference < 1e-3 * moved
