"""Runs that share a warm start end with the same bits as runs that made their own."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from preconcert.agents import ChannelHarm, ChannelSettings
from preconcert.core import ConfigError
from preconcert.models import LoraSettings
from preconcert.training.recipe import Adapters, Recipe
from preconcert.training.reporter import Silent
from preconcert.training.run import train
from preconcert.training.warm_cache import WarmCache, warm_basis, warm_key
from preconcert.training.warm_start import WarmStartMethod
from tests.training.teams import recipe_of


def small(**changes: object) -> Recipe:
    plain = recipe_of(iterations=2, seeds=2, group=2, hindsight_weight=0.5, hindsight_fraction=1.0, lr=0.02)
    return plain.model_copy(update=changes)


def log_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("_s", "_time"))} for line in lines]


def assert_same_bits(one: Path, other: Path) -> None:
    files = sorted(path.relative_to(one) for path in one.glob("**/*.safetensors") if "checkpoints" not in path.parts)
    assert files
    for file in files:
        mine, theirs = load_file(one / file), load_file(other / file)
        assert mine.keys() == theirs.keys()
        assert all((mine[key] == theirs[key]).all() for key in mine), file
    assert log_of(one) == log_of(other)


@pytest.mark.parametrize("method", WarmStartMethod)
def test_a_run_with_the_cache_has_the_same_bits(tmp_path: Path, method: WarmStartMethod) -> None:
    recipe = small()
    recipe = recipe.model_copy(update={"warm_start": recipe.warm_start.model_copy(update={"method": method})})
    alone = train(recipe, tmp_path / "alone")
    for number in range(2):  # makes the entry, uses the entry
        cached = train(recipe, tmp_path / f"cached{number}", warm_cache=tmp_path / "cache")
        assert_same_bits(alone, cached)
        assert {path.name for path in cached.iterdir()} == {path.name for path in alone.iterdir()}
    entries = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert [path.name for path in entries] == [warm_key(recipe, "agent_0")]


def test_shared_and_own_adapters_stand_on_one_base(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    own = train(small(), tmp_path / "own", warm_cache=cache)
    shared = train(small(adapters=Adapters.SHARED), tmp_path / "shared", warm_cache=cache)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    mine, theirs = (load_file(run / "base" / "model.safetensors") for run in (own, shared))
    assert all((mine[key] == theirs[key]).all() for key in mine)
    assert [path.name for path in (shared / "adapters").iterdir()] == ["team"]


def test_the_key_is_what_the_warm_start_reads() -> None:
    recipe = small()
    held = warm_key(recipe, "agent_0")
    without = {
        "adapters": Adapters.SHARED,
        "channel": ChannelSettings(drop=0.5),
        "frozen": ("agent_0",),
        "grpo": recipe.grpo.model_copy(update={"iterations": 9}),
        "keep_episodes": False,
    }
    for name, value in without.items():
        assert warm_key(recipe.model_copy(update={name: value}), "team") == held, name
        assert getattr(warm_basis(recipe.model_copy(update={name: value})), name) != value
    within = {
        "seed": 8,
        "channels": {"dead": ChannelHarm(drop=1.0)},
        "params": {"size": 4, "landmarks": 2, "horizon": 3},
        "lora": LoraSettings(r=4),
        "warm_start": recipe.warm_start.model_copy(update={"steps": 5}),
    }
    for name, value in within.items():
        assert warm_key(recipe.model_copy(update={name: value}), "agent_0") != held, name
    lora = recipe.model_copy(
        update={"warm_start": recipe.warm_start.model_copy(update={"method": WarmStartMethod.LORA})}
    )
    assert warm_key(lora, "agent_0") != warm_key(lora, "team")


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        time.sleep(0.2)
        (folder / "x").write_text("y")
        made.append(folder)

    outs = [tmp_path / str(number) for number in range(3)]
    for out in outs:
        out.mkdir()
    threads = [
        threading.Thread(target=lambda out=out: WarmCache(tmp_path / "cache").copy("key", out, make, Silent()))
        for out in outs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert [(out / "x").read_text() for out in outs] == ["y"] * 3


def test_a_failure_leaves_no_entry(tmp_path: Path) -> None:
    cache = WarmCache(tmp_path / "cache")

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        cache.copy("key", tmp_path, fail, Silent())
    assert "key" not in cache
    cache.copy("key", tmp_path, lambda folder: (folder / "whole").mkdir(), Silent())
    assert "key" in cache
    assert not (tmp_path / "half").exists()


def test_a_run_need_not_keep_its_episodes(tmp_path: Path) -> None:
    kept = train(small(), tmp_path / "kept")
    lean = train(small(keep_episodes=False), tmp_path / "lean")
    assert (kept / "episodes.jsonl").is_file()
    assert not (lean / "episodes.jsonl").exists()
    assert_same_bits(kept, lean)
