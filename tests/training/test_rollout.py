"""Rollouts with a real model: one batch per step, the same episodes in any company, log-probs as training sees them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preconcert.agents import ChannelMode, ChannelSettings, Context
from preconcert.core import Episode, StopReason, UnknownNameError, dump_episode
from preconcert.envs import make_env, tasks
from preconcert.models import TransformersModel
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout
from tests.training.teams import (
    AGENTS,
    PARAMS,
    FixedSource,
    load,
    play,
    rows_of,
    settings_of,
    specs,
    team_on,
    trainer_on,
)

CASES = [(context, constrained) for context in Context for constrained in (True, False)]


def sampled_of(episodes: Sequence[Episode]) -> list[tuple[int, ...]]:
    """Everything that was sampled."""
    return [turn.completion_ids for e in episodes for t in e.trajectories.values() for turn in t.turns]


def test_one_generate_call_per_step(starter: TransformersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    generate = starter.generate

    def counted(requests: Any) -> Any:
        sizes.append(len(requests))
        return generate(requests)

    monkeypatch.setattr(starter, "generate", counted)
    play(team_on(starter), seeds=3, group=2)
    assert sizes == [3 * 2 * len(AGENTS)] * PARAMS["horizon"]


@pytest.mark.parametrize("context", Context)
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_company_changes_no_episode(starter: TransformersModel, context: Context, drop: float) -> None:
    team, channel = team_on(starter, settings_of(context)), ChannelSettings(drop=drop)
    wanted = specs(3, 2)
    together = [dump_episode(e) for e in rollout(wanted, team, channel, 5)]
    some = [dump_episode(e) for e in rollout(wanted[2:4], team, channel, 5)]
    alone = [dump_episode(e) for spec in reversed(wanted) for e in rollout([spec], team, channel, 5)]
    assert len({str(one["trajectories"]) for one in strip(together)}) == len(wanted), "samples of a group must differ"
    # Log-probabilities may differ in the last digit between batches of different size.
    assert strip(some) == strip(together[2:4])
    assert strip(alone[::-1]) == strip(together)
    assert strip([dump_episode(e) for e in rollout(wanted, team, channel, 6)]) != strip(together)


def strip(episodes: Sequence[bytes]) -> list[Any]:
    """Episodes without numbers that come from floating point."""
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if k not in ("logprobs", "bits", "probability")}
        return [clean(v) for v in value] if isinstance(value, list) else value

    return [clean(json.loads(e)) for e in episodes]


@pytest.mark.parametrize("kind", ["starter", "qwen3"])
@pytest.mark.parametrize(("context", "constrained"), CASES)
def test_training_recomputes_the_logprobs_of_the_rollout(
    checkpoint: Callable[[str], Path], tmp_path: Path, kind: str, context: Context, constrained: bool
) -> None:
    model = load(checkpoint(kind))
    team = team_on(model, settings_of(context, constrained), temperature=0.8)
    rows, table = rows_of(team, play(team, seeds=2, group=2))
    trainer = trainer_on(model, FixedSource(rows), table, tmp_path, temperature=0.8)
    batch = trainer._generate_and_score_completions(None)
    with torch.no_grad():
        trainer._present = batch
        trainer._open_route([trainer.adapter_names[i] for i in batch["adapter"].tolist()], batch)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        found, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1], compute_entropy=True
        )
        trainer._close_route()
    counted = batch["tool_mask"].bool()
    assert counted.any()
    assert float((found - batch["old_per_token_logps"])[counted].abs().max()) < 1e-5
    assert float(batch["old_per_token_logps"][counted].min()) < -0.5, "nothing here was a choice"
    assert entropy is not None
    assert float(entropy[counted].min()) >= 0


@pytest.mark.parametrize("kind", ["starter", "qwen3", "llama"])
@pytest.mark.parametrize("constrained", [True, False])
def test_transcripts_are_the_same_without_a_cache(
    checkpoint: Callable[[str], Path], kind: str, constrained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint(kind))
    cached = play(team_on(model, settings_of(Context.TRANSCRIPT, constrained)), seeds=2, group=2)
    assert model.reused_tokens > 0
    assert not model._sessions._held, "a finished episode left its cache behind"
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda requests: generate([replace(r, session=None) for r in requests]))
    reused = model.reused_tokens
    plain = play(team_on(model, settings_of(Context.TRANSCRIPT, constrained)), seeds=2, group=2)
    assert model.reused_tokens == reused
    assert sampled_of(cached) == sampled_of(plain)
    for one, other in zip(cached, plain, strict=True):
        for agent in AGENTS:
            for a, b in zip(one.trajectories[agent].turns, other.trajectories[agent].turns, strict=True):
                assert np.abs(np.array(a.logprobs) - np.array(b.logprobs)).max() < 1e-5


@pytest.mark.parametrize("constrained", [True, False])
def test_a_transcript_row_holds_every_turn_as_sampled(starter: TransformersModel, constrained: bool) -> None:
    team = team_on(starter, settings_of(Context.TRANSCRIPT, constrained))
    episodes = play(team)
    rows, _ = rows_of(team, episodes, lambda number: number + 1.0)
    trajectories = [t for e in episodes for t in e.trajectories.values()]
    assert len(rows) == len(trajectories)
    advantages: list[float] = []
    for row, trajectory in zip(rows, trajectories, strict=True):
        whole = row.prompt_ids + row.completion_ids
        silent = set(range(len(row.completion_ids)))
        for turn in trajectory.turns:
            assert whole[: len(turn.prompt_ids)] == turn.prompt_ids
            start = len(turn.prompt_ids) - len(row.prompt_ids)
            end = start + len(turn.completion_ids)
            assert row.completion_ids[start:end] == turn.completion_ids
            places = [start + i for i in range(end - start) if row.policy[start + i]]
            assert [row.logprobs[t] for t in places] == [np.float32(turn.logprobs[t - start]) for t in places]
            (advantage,) = {float(row.advantages[t]) for t in places}
            advantages.append(advantage)
            silent -= set(range(start, end))
        assert silent
        assert not row.policy[sorted(silent)].any()
        assert not row.advantages[sorted(silent)].any()
    assert len(set(advantages)) == len(advantages) == sum(len(t.turns) for t in trajectories)


def test_each_agent_can_have_a_policy_of_its_own(starter: TransformersModel) -> None:
    team = team_on(starter, version=4)
    (episode,) = rollout(specs(1, 1), {AGENTS[0]: team, AGENTS[1]: ScriptedPolicy("expert")}, ChannelSettings(), 0)
    assert episode.trajectories[AGENTS[0]].policy_version == 4
    assert episode.trajectories[AGENTS[1]].policy_version == -1
    assert all(not turn.completion_ids for turn in episode.trajectories[AGENTS[1]].turns)
    with pytest.raises(UnknownNameError, match="agent_1"):
        rollout(specs(1, 1), {AGENTS[0]: team}, ChannelSettings(), 0)


@pytest.mark.parametrize("task", tasks())
@pytest.mark.parametrize("kind", ["expert", "scripted", "random"])
def test_the_tasks_own_players_play_to_the_end(task: str, kind: str) -> None:
    wanted = [EpisodeSpec(task, {}, seed) for seed in range(8)]
    episodes = rollout(wanted, ScriptedPolicy(kind), ChannelSettings(), 0)
    assert [(e.seed, e.group) for e in episodes] == [(s.seed, s.group) for s in wanted]
    for episode in episodes:
        horizon = make_env(task, {}, episode.seed).horizon
        assert 1 <= episode.steps <= horizon
        assert all(len(t.turns) == episode.steps for t in episode.trajectories.values())
        stops = {t.stop_reason for t in episode.trajectories.values()}
        assert stops <= {StopReason.TERMINATED, StopReason.TRUNCATED}
        assert len(stops) == 1
    if kind == "expert":
        assert all(episode.success is not False for episode in episodes)


def test_messages_arrive_one_step_later_and_only_from_others(starter: TransformersModel) -> None:
    for mode, arrives in ((ChannelMode.ON, True), (ChannelMode.OFF, False)):
        for episode in rollout(specs(2, 2), team_on(starter), ChannelSettings(mode=mode), 0):
            for agent, trajectory in episode.trajectories.items():
                (other,) = set(AGENTS) - {agent}
                said = [turn.message for turn in episode.trajectories[other].turns]
                for step, turn in enumerate(trajectory.turns):
                    assert turn.inbox == ((said[step - 1],) if step and arrives else ())
