"""Two processes train one team: in step with each other, on different seeds, and like one process would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from preconcert.core import dump_episode, load_episodes
from preconcert.training.run import train
from tests.training import two_processes
from tests.training.teams import AGENTS, largest_difference, load, weights_of

ROOT = Path(__file__).parents[2]


def test_two_processes_do_what_one_does(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint("starter")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "tests.training.two_processes", str(folder), str(tmp_path / "two"),
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
