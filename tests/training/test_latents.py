"""Latent messages under reinforcement learning: gradients against losses written by hand, and what must not move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from preconcert.agents import AgentSettings, ChannelMode, ChannelSettings, GenerativeTeam
from preconcert.core import ConfigError, Episode, SpanKind
from preconcert.envs import make_env
from preconcert.models import AdapterRoute, Fill, Fills, LatentSettings, TransformersModel
from preconcert.training.batch import collate
from preconcert.training.latent_stage import LATENT_START, train_latent_stage
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Silent
from preconcert.training.rollout import rollout
from preconcert.training.rows import GrammarTable, Placed, Row, SpeechGradient
from tests.training.teams import (
    AGENTS,
    FixedSource,
    gradients_of,
    largest_difference,
    parameters_of,
    play,
    rows_of,
    specs,
    team_on,
    trainer_on,
    weights_of,
)

SHAPE = {"tokens": 2, "dims": 3, "levels": 5}
SETTINGS = AgentSettings(codec={"type": "latent", **SHAPE})


@pytest.fixture
def talking(starter: TransformersModel) -> TransformersModel:
    """Both agents with codecs of their own."""
    for seed, name in enumerate(AGENTS):
        starter.add_codec(name, LatentSettings(**SHAPE), seed)
    return starter


def uneven(number: int) -> float:
    """Advantages of both signs, some of them 0."""
    return (0.7, -1.3, 0.0, 1.9, -0.4)[number % 5]


def fill(vectors: torch.Tensor, start: int) -> Fill:
    """Vectors in the only row, from a column on."""
    count = len(vectors)
    return Fill(torch.zeros(count, dtype=torch.long), torch.arange(start, start + count), vectors)


def states(
    model: TransformersModel, adapter: str, ids: Sequence[int], fills: Sequence[Fill], queries: bool
) -> torch.Tensor:
    """Hidden states of one text alone, with the adapter's queries after it."""
    codec = model.codecs[adapter]
    asked = [fill(codec.queries, len(ids))] if queries else []
    block = torch.tensor([[*ids, *[0] * (len(codec.queries) if queries else 0)]])
    with AdapterRoute(model.base, [adapter]), Fills(model.base, [*fills, *asked]):
        return model.base.base_model(input_ids=block, use_cache=False).last_hidden_state[0]


def by_hand(model: TransformersModel, rows: Sequence[Row], table: GrammarTable) -> dict[str, torch.Tensor]:
    """The gradients of the same loss, row by row, by plain automatic differentiation."""
    tokens, allowed = table.arrays()
    items = sum(int(row.policy.sum()) for row in rows)
    everything = {f"{name} {key}": p for name in AGENTS for key, p in parameters_of(model, name).items()}
    wanted = {key: p.requires_grad for key, p in model.model.named_parameters()}
    for parameter in everything.values():
        parameter.requires_grad_(True)
    loss = torch.zeros(())
    for row in rows:
        codec, fills = model.codecs[row.adapter], []
        for number, placed in enumerate(row.heard):
            values = torch.tensor(placed.latent.values)
            source = row.sources[number] if row.sources else None
            if source is not None and source.adapter:
                theirs = model.codecs[source.adapter]
                heard = [
                    fill(theirs.embedded(torch.tensor(held.latent.values)[None])[0], held.start)
                    for held in source.heard
                ]
                read = states(model, source.adapter, source.ids, heard, queries=True)
                mean = theirs.mean(read[None, len(source.ids) :])[0]
                drawn = torch.tensor(placed.latent.drawn)
                mean = mean[: len(drawn)]
                assert torch.allclose(theirs.sent(drawn), values)
                values = theirs.sent(drawn + mean - mean.detach())
            fills.append(fill(codec.embedded(values[None])[0], placed.start))
        ids, n = row.prompt_ids + row.completion_ids, len(row.completion_ids)
        hidden = states(model, row.adapter, ids, fills, queries=row.said is not None)
        logits = model.base.lm_head(hidden[len(row.prompt_ids) - 1 : len(ids) - 1])
        for place, state in enumerate(row.allowed):
            ban = torch.ones(logits.shape[1], dtype=torch.bool)
            ban[tokens[allowed[state]]] = False
            logits = logits.index_put((torch.tensor(place),), logits[place].masked_fill(ban, -1e9))
        logps = logits.log_softmax(-1).gather(1, torch.tensor(row.completion_ids)[:, None])[:, 0]
        ratio = (logps - torch.from_numpy(row.logprobs)).exp()
        loss = loss - (ratio * torch.from_numpy(row.advantages * row.policy)).sum() / items
        if row.said is not None:
            mean = codec.mean(hidden[None, len(ids) : len(ids) + len(codec.queries)])
            density = codec.logprob(torch.tensor([row.said.drawn]), mean)[0]
            ratio = (density - torch.tensor(row.said.logprobs)).exp()
            assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-4)
            loss = loss - (ratio * row.said_advantage).sum() / items
        assert n == len(row.policy)
    found = torch.autograd.grad(loss, list(everything.values()), allow_unused=True)
    for key, parameter in model.model.named_parameters():
        parameter.requires_grad_(wanted[key])
    return {
        key: torch.zeros_like(p) if g is None else g
        for (key, p), g in zip(everything.items(), found, strict=True)
    }


@pytest.mark.parametrize("speech", list(SpeechGradient))
def test_the_trainers_gradient_is_that_of_the_loss_by_hand(
    talking: TransformersModel, tmp_path: Path, speech: SpeechGradient
) -> None:
    team = team_on(talking, SETTINGS)
    rows, table = rows_of(team, play(team), uneven, speech=speech)
    assert any(row.heard for row in rows)
    assert any(row.said is not None for row in rows) == (speech is not SpeechGradient.PATH)
    assert any(row.sources for row in rows) == (speech is not SpeechGradient.SCORE)
    expected = by_hand(talking, rows, table)
    found = gradients_of(trainer_on(talking, FixedSource(rows), table, tmp_path), talking)
    size = max(float(value.abs().max()) for value in expected.values())
    assert size > 1e-3
    assert float(expected["agent_0 codec.queries"].abs().max()) > 1e-6
    assert largest_difference(found, expected) < 2e-5 * max(1.0, size)


@pytest.mark.parametrize("speech", list(SpeechGradient))
def test_the_gradient_of_messages_that_were_cut_short(
    talking: TransformersModel, tmp_path: Path, speech: SpeechGradient
) -> None:
    """One of two vectors arrives; senders have read both of their queries all the same."""
    team = team_on(talking, SETTINGS)
    episodes = rollout(specs(2, 3), team, ChannelSettings(truncate=1), 0)
    rows, table = rows_of(team, episodes, uneven, speech=speech)
    assert {len(placed.latent.values) for row in rows for placed in row.heard} == {1}
    expected = by_hand(talking, rows, table)
    found = gradients_of(trainer_on(talking, FixedSource(rows), table, tmp_path), talking)
    size = max(float(value.abs().max()) for value in expected.values())
    assert size > 1e-3
    assert largest_difference(found, expected) < 2e-5 * max(1.0, size)


def test_padding_and_parts_change_no_gradient(talking: TransformersModel, tmp_path: Path) -> None:
    team = team_on(talking, SETTINGS)
    rows, table = rows_of(team, play(team), uneven, speech=SpeechGradient.BOTH)
    rows = rows[: len(rows) // 4 * 4 - 1]
    whole, parts = (
        gradients_of(trainer_on(talking, FixedSource(rows), table, tmp_path, minibatches=n, accumulate=n), talking)
        for n in (1, 4)
    )
    assert largest_difference(whole, parts) < 1e-6
    trainer = trainer_on(talking, FixedSource(rows), table, tmp_path, epochs=2)
    padded = gradients_of(
        trainer, talking, lambda batch: batch.update(collate(rows, trainer.adapter_names, 0, len(rows) + 5))
    )
    assert largest_difference(whole, padded) < 1e-6


def only_listeners(rows: Sequence[Row], listener: str, with_speech: bool) -> list[Row]:
    """Rows of which the listener's words alone are worth anything; what is said is worth what `with_speech` says."""
    found: list[Row] = []
    for row in rows:
        worth = row.advantages if row.agent == listener else row.advantages * 0
        found.append(replace(row, advantages=worth, said_advantage=1.0 if with_speech else 0.0))
    return found


@pytest.mark.parametrize(
    ("mode", "expected"), [(ChannelMode.ON, True), (ChannelMode.OFF, False), (ChannelMode.SHUFFLED, False)]
)
def test_the_sender_learns_through_the_message_exactly_where_its_own_arrived(
    talking: TransformersModel, tmp_path: Path, mode: ChannelMode, expected: bool
) -> None:
    """The listener alone is rewarded; the sender has an adapter of its own."""
    team = team_on(talking, SETTINGS)
    episodes = rollout(specs(2, 3), team, ChannelSettings(mode=mode), 0)
    rows, table = rows_of(team, episodes, lambda number: 1.0 + number, speech=SpeechGradient.PATH)
    rows = only_listeners(rows, "agent_1", with_speech=False)
    found = gradients_of(trainer_on(talking, FixedSource(rows), table, tmp_path), talking)
    sender = max(float(value.abs().max()) for key, value in found.items() if key.startswith("agent_0 "))
    listener = max(float(value.abs().max()) for key, value in found.items() if key.startswith("agent_1 "))
    assert listener > 1e-4
    assert (sender > 1e-6) if expected else sender == 0.0


def test_by_the_score_the_sender_learns_exactly_where_its_messages_have_an_advantage(
    talking: TransformersModel, tmp_path: Path
) -> None:
    team = team_on(talking, SETTINGS)
    rows, table = rows_of(team, play(team), lambda number: 1.0 + number)
    sizes = []
    for with_speech in (False, True):
        chosen = only_listeners(rows, "agent_1", with_speech)
        found = gradients_of(trainer_on(talking, FixedSource(chosen), table, tmp_path), talking)
        sizes.append(max(float(value.abs().max()) for key, value in found.items() if key.startswith("agent_0 ")))
    assert sizes[0] == 0.0
    assert sizes[1] > 1e-4


def test_the_weight_of_speech_scales_what_is_said_and_nothing_else(talking: TransformersModel, tmp_path: Path) -> None:
    team = team_on(talking, SETTINGS)
    rows, table = rows_of(team, play(team), uneven)

    def gradients(weight: float) -> dict[str, torch.Tensor]:
        trainer = trainer_on(talking, FixedSource(rows), table, tmp_path / str(weight))
        trainer.speech_weight = weight
        return gradients_of(trainer, talking)

    none, half, full = (gradients(weight) for weight in (0.0, 0.5, 1.0))
    mute = [replace(row, said_advantage=0.0) for row in rows]
    silent = gradients_of(trainer_on(talking, FixedSource(mute), table, tmp_path), talking)
    assert largest_difference(none, silent) < 1e-7
    assert largest_difference(none, full) > 1e-4
    assert largest_difference({key: (none[key] + full[key]) / 2 for key in full}, half) < 1e-6


def test_codecs_have_a_learning_rate_of_their_own(talking: TransformersModel, tmp_path: Path) -> None:
    team = team_on(talking, SETTINGS)
    rows, table = rows_of(team, play(team), uneven)
    trainer = trainer_on(talking, FixedSource(rows), table, tmp_path, AGENTS[:1])
    trainer.codec_lr = 1e-30
    before = weights_of(talking)
    trainer.train()
    after = weights_of(talking)
    moved = {key for key, value in after.items() if not torch.allclose(value, before[key], rtol=0, atol=1e-12)}
    assert moved
    assert not any("codec" in key for key in moved)
    assert all(key.startswith("agent_0 ") for key in moved)
    held = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in held}) == len(held)


@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_no_gradient_goes_through_a_message_that_its_sender_would_no_longer_send(
    talking: TransformersModel, tmp_path: Path, shift: float
) -> None:
    """The ratio of its density is e or 1/e, far beyond the clip: what is left is what receivers learn."""
    team = team_on(talking, SETTINGS)
    rows, table = rows_of(team, play(team), uneven, speech=SpeechGradient.PATH)

    def moved_on(placed: Placed) -> Placed:
        latent = replace(placed.latent, logprobs=tuple(logp + shift for logp in placed.latent.logprobs))
        return replace(placed, latent=latent)

    gone = [replace(row, heard=tuple(moved_on(placed) for placed in row.heard)) for row in rows]
    unknown = [replace(row, sources=()) for row in rows]
    there, beyond, without = (
        gradients_of(trainer_on(talking, FixedSource(each), table, tmp_path), talking) for each in (rows, gone, unknown)
    )
    assert largest_difference(beyond, without) < 1e-7
    assert largest_difference(there, without) > 1e-5


def test_groups_without_variance_and_frozen_agents_do_not_move(talking: TransformersModel, tmp_path: Path) -> None:
    team = team_on(talking, SETTINGS)
    for advantage, trainable in ((lambda number: 0.0, AGENTS), (uneven, AGENTS[:1])):
        before = weights_of(talking)
        rows, table = rows_of(
            team, play(team), advantage, trainable=frozenset(trainable), speech=SpeechGradient.BOTH
        )
        trainer_on(talking, FixedSource(rows), table, tmp_path / str(len(trainable)), trainable).train()
        after = weights_of(talking)
        moved = {key.split()[0] for key, value in after.items() if not torch.equal(value, before[key])}
        assert moved == (set() if trainable == AGENTS else {"agent_0"})


def test_codecs_are_part_of_a_checkpoint(talking: TransformersModel, tmp_path: Path) -> None:
    team = team_on(talking, SETTINGS)
    rows, table = rows_of(team, play(team), uneven)
    trainer = trainer_on(talking, FixedSource(rows), table, tmp_path)
    trainer._save_own(tmp_path)
    before = weights_of(talking)
    with torch.no_grad():
        talking.codecs["agent_1"].queries.add_(1.0)
    trainer._load_own(tmp_path)
    assert largest_difference(weights_of(talking), before) == 0.0


def test_rows_hold_what_was_heard_and_said(talking: TransformersModel) -> None:
    team = team_on(talking, SETTINGS)
    episodes: list[Episode] = play(team, 1, 2)
    rows, _ = rows_of(team, episodes, speech=SpeechGradient.BOTH)
    turns = [turn for e in episodes for t in e.trajectories.values() for turn in t.turns]
    assert len(rows) == len(turns)
    for row, turn in zip(rows, turns, strict=True):
        assert turn.message is not None
        assert row.said == turn.message.latent
        assert turn.message.payload.count(",") == SHAPE["tokens"] * (SHAPE["dims"] - 1)
        assert [placed.latent for placed in row.heard] == [message.latent for message in turn.inbox]
        words = [team.format.text(turn.completion_ids[s.start : s.end]) for s in turn.spans if s.kind is SpanKind.SAY]
        assert turn.message.written.split() == words  # its own note, which is not sent
        assert len(words) == 2
        assert not row.heard or all(source.adapter for source in row.sources)
        quiet = {row.prompt_ids[placed.start + j] for placed in row.heard for j in range(SHAPE["tokens"])}
        assert quiet <= set(team.format.encode("quiet"))


def test_a_turn_is_the_same_whatever_else_is_in_the_batch(talking: TransformersModel) -> None:
    team: GenerativeTeam = team_on(talking, SETTINGS)
    alone = rollout(specs(1, 1), team, ChannelSettings(), 0)[0]
    together = rollout(specs(2, 3), team, ChannelSettings(), 0)[0]
    for agent in AGENTS:
        one, other = (e.trajectories[agent].turns for e in (alone, together))
        assert [t.completion_ids for t in one] == [t.completion_ids for t in other]
        assert [t.message and t.message.payload for t in one] == [t.message and t.message.payload for t in other]


def test_training_free_messages_go_through_reinforcement_learning_as_they_are(
    starter: TransformersModel, tmp_path: Path
) -> None:
    """Nothing was drawn, so nothing of a message is reinforced; those who read it learn all the same."""
    shape = {"tokens": 2, "levels": 0, "method": "aligned"}
    for seed, name in enumerate(AGENTS):
        starter.add_codec(name, LatentSettings(**shape), seed)
    team = team_on(starter, AgentSettings(codec={"type": "latent", **shape}))
    rows, table = rows_of(team, play(team), uneven, speech=SpeechGradient.BOTH)
    assert all(row.said is None for row in rows)
    assert any(row.heard for row in rows)
    plain = [replace(row, heard=(), sources=()) for row in rows]
    hearing, deaf = (
        gradients_of(trainer_on(starter, FixedSource(each), table, tmp_path), starter) for each in (rows, plain)
    )
    assert largest_difference(hearing, deaf) > 1e-6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grpo": {"beta": 0.1}}, "reference"),
        ({"grpo": {"loss": "bnpo"}}, "dapo"),
        ({"grpo": {"imagination": {"model": "oracle"}}}, "imagin"),
        ({"update": {"order": "sequential"}}, "simultaneous"),
        ({"grpo": {"speech": "path", "credit": "agent-turn"}}, "branch"),
        ({"grpo": {"speech": "path"}, "channel": {"mode": "shuffled"}}, "messages arrive"),
        ({"grpo": {"speech": "path"}, "agent": {"codec": "slots"}}, "latent"),
        ({"agent": {"codec": {"type": "latent"}, "context": "transcript"}}, "context=turn"),
        ({"agent": {"codec": {"type": "latent"}, "spans": {"say": False}}}, "nobody would talk"),
        ({"world_model": {}}, "world"),
    ],
)
def test_recipes_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Recipe.model_validate({"task": "rendezvous", "agent": {"codec": {"type": "latent"}}, **changes})


def test_a_team_refuses_codecs_of_another_shape(talking: TransformersModel) -> None:
    with pytest.raises(ConfigError, match=r"tokens=4, but the codec of adapter 'agent_0' has 2"):
        team_on(talking, AgentSettings(codec={"type": "latent", **SHAPE, "tokens": 4}))


def test_the_density_is_that_of_the_temperature_that_was_drawn_with(talking: TransformersModel, tmp_path: Path) -> None:
    team = team_on(talking, SETTINGS, temperature=1.7)
    rows, table = rows_of(team, play(team), uneven)
    trainer = trainer_on(talking, FixedSource(rows), table, tmp_path, temperature=1.7)
    gradients_of(trainer, talking)
    assert trainer._metrics["train"]["speech/ratio"][0] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("moment", ["marked", "old aside"])
def test_a_stage_that_is_cut_off_while_folders_change_places_ends_with_the_new_ones(
    tmp_path: Path, moment: str
) -> None:
    recipe = Recipe.model_validate({"task": "rendezvous", "agent": {"codec": {"type": "latent"}}})
    for name, text in (("warm", "old"), ("warm.new", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    (tmp_path / LATENT_START).write_text("{}")
    if moment == "old aside":
        (tmp_path / "warm").rename(tmp_path / "warm.old")
    train_latent_stage(recipe, tmp_path, make_env("rendezvous", {}, 0), {}, Silent())
    assert (tmp_path / "warm" / "file").read_text() == "new"
    assert not (tmp_path / "warm.old").exists()
    assert not (tmp_path / "warm.new").exists()
