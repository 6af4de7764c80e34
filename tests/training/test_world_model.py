"""What a world model learns from: which tokens count towards what, by how much, and from whose views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from preconcert.agents import ChannelSettings
from preconcert.core import Episode, ImaginedStep, Move, StopReason, UnknownNameError
from preconcert.envs import make_env
from preconcert.models import TransformersModel, build_starter
from preconcert.models.constrained import head_scale
from preconcert.prompts import SpanSettings, TurnFormat, WorldFormat, starter_words
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout
from preconcert.training.world_data import WorldData, collate, coverage
from preconcert.training.world_model import (
    heldout_report,
    part_losses,
    refine,
    span_losses,
    total_loss,
    train_world_model,
)
from preconcert.training.world_rows import LOSSES, Loss, WorldRow, value_range_of, world_row, world_steps
from preconcert.training.world_settings import WorldTraining, WorldWeights
from preconcert.world_models import TokenBelief, TokenWorldModel
from tests.training.teams import PARAMS, SHAPE, TASK, load

HORIZON = 6
PARAMS_6 = {**PARAMS, "horizon": HORIZON}


@pytest.fixture(scope="module")
def episodes() -> dict[str, list[Episode]]:
    specs = [EpisodeSpec(TASK, PARAMS_6, seed) for seed in range(8)]
    return {
        name: rollout(specs, ScriptedPolicy(name), ChannelSettings(), 0)
        for name in ("random", "scripted", "expert")
    }


@pytest.fixture
def world(tmp_path: Path) -> TokenWorldModel:
    env = make_env(TASK, PARAMS_6, 0)
    words = starter_words(env.words, env.language, env.agents, digits=True)  # type: ignore[attr-defined]
    model = load(build_starter(words, tmp_path / "m", 3, SHAPE), ("agent_0", "world"), deviation=0.02)
    return TokenWorldModel(model, WorldFormat(TurnFormat(model.tokenizer, env.language, SpanSettings())), "world")


def backend(world: TokenWorldModel) -> TransformersModel:
    assert isinstance(world.model, TransformersModel)
    return world.model


def words_by_loss(world: TokenWorldModel, row: WorldRow) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for token, kind in zip(row.ids, row.kinds, strict=True):
        name = LOSSES[kind - 1].value if kind else "none"
        found.setdefault(name, []).append(world.format.tokenizer.decode([token]))
    return found


def test_every_word_counts_towards_its_part(world: TokenWorldModel, episodes: dict[str, list[Episode]]) -> None:
    chain = world_steps(episodes["expert"][0], 0)[0]
    step = chain[2]
    theirs = (step.move.others or {})["agent_1"]
    asked = words_by_loss(world, world_row(world.format, step, False))
    assert asked["others"] == [theirs]
    view = step.view.split()
    assert asked["view"] == [view[1], view[3], view[5], view[7], view[9], view[11]]
    assert asked["reward"] == ["0"]
    assert asked["done"] == ["no"]
    assert asked["hear"] == step.heard["agent_1"].split()
    assert asked["value"] == [str(world.format.digit_of(step.to_go, 0.5))]
    assert asked["form"] == [
        "<intend>", "agent_1", "<foresee>", "left", "row", "col", "open", "a", "b", "<say>", "agent_1", "<eos>"
    ]  # fmt: skip
    given = words_by_loss(world, world_row(world.format, step, True))
    assert "others" not in given
    assert given["none"][-3:] == ["<intend>", "agent_1", theirs]
    assert {name: given[name] for name in ("view", "hear", "value")} == {n: asked[n] for n in ("view", "hear", "value")}
    silent = words_by_loss(world, world_row(world.format, step, True, dice=None))
    assert "value" not in silent
    last = words_by_loss(world, world_row(world.format, chain[-1], True))
    assert last["done"] == ["yes"]
    assert not {"hear", "value"} & set(last)


def test_steps_are_what_happened(episodes: dict[str, list[Episode]]) -> None:
    episode = episodes["expert"][1]
    chains = world_steps(episode, 2)
    assert [chain[0].belief.agent for chain in chains] == list(episode.trajectories)
    for chain in chains:
        mine = episode.trajectories[chain[0].belief.agent]
        assert [step.done for step in chain] == [False] * (HORIZON - 1) + [True]
        assert [step.ending for step in chain] == [step.done for step in chain]
        assert [step.belief.observation for step in chain] == [turn.observation for turn in mine.turns]
        assert [step.view for step in chain] == [t.observation.text for t in mine.turns[1:]] + [
            mine.final_observation.text
        ]
        assert [step.to_go for step in chain] == [mine.total_reward] * (HORIZON - 1) + [0.0]
        assert chain[3].belief.memory == tuple(turn.action for turn in mine.turns[1:3])
    cut = replace(
        episode,
        trajectories={a: replace(t, stop_reason=StopReason.CUT) for a, t in episode.trajectories.items()},
    )
    assert [len(chain) for chain in world_steps(cut, 0)] == [HORIZON - 1] * 2
    assert value_range_of(episodes["expert"]) == (0.0, 1.0)


def test_every_part_has_its_own_denominator() -> None:
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(9, 5)))
    targets = torch.tensor(rng.integers(5, size=9))
    view, done = 1 + LOSSES.index(Loss.VIEW), 1 + LOSSES.index(Loss.DONE)
    kinds = torch.tensor([view] * 6 + [done, done, 0])
    weights = torch.tensor([1.0, 1.0, 0.5, 0.5, 2.0, 1.0, 0.25, 0.75, 9.0])
    entropies = [-float(row.log_softmax(-1)[target]) for row, target in zip(logits, targets, strict=True)]
    parts = span_losses(logits, targets, kinds, weights)
    assert set(parts) == {"view", "done"}
    by_hand = sum(w * e for w, e in zip(weights[:6].tolist(), entropies[:6], strict=True)) / 6.0
    assert float(parts["view"]) == pytest.approx(by_hand, rel=1e-6)
    assert float(parts["done"]) == pytest.approx(0.25 * entropies[6] + 0.75 * entropies[7], rel=1e-6)
    whole = total_loss(parts, WorldWeights(view=2.0, done=0.5))
    assert float(whole) == pytest.approx(2.0 * by_hand + 0.5 * float(parts["done"]), rel=1e-6)


def test_a_batch_has_the_losses_of_its_rows(world: TokenWorldModel, episodes: dict[str, list[Episode]]) -> None:
    """Padding, order and what else is in the batch change nothing."""
    steps = [step for chain in world_steps(episodes["random"][0], 0) for step in chain]
    rows = [world_row(world.format, step, bool(number % 2)) for number, step in enumerate(steps)]
    model = backend(world)
    factor = head_scale(model.base.config)
    with torch.no_grad():
        together = part_losses(model.base, collate(rows, 0), factor)
        sums: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for row in rows:
            for name, loss in part_losses(model.base, collate([row], 0), factor).items():
                count = row.kinds.count(1 + [part.value for part in LOSSES].index(name))
                sums[name] += float(loss) * count
                counts[name] += count
    assert {name: float(loss) for name, loss in together.items()} == pytest.approx(
        {name: sums[name] / counts[name] for name in counts}, rel=1e-4
    )


class Listening(TokenWorldModel):
    """Keeps what it was asked and what it answered. Nothing ends early, whatever an untrained model says."""

    def advance(
        self, beliefs: Sequence[TokenBelief], moves: Sequence[Move], seeds: Sequence[int]
    ) -> list[ImaginedStep]:
        found = [replace(step, done=False) for step in super().advance(beliefs, moves, seeds)]
        self.calls.append((list(beliefs), list(moves), found))
        return found

    calls: list[tuple[list[TokenBelief], list[Move], list[ImaginedStep]]]


def test_own_batches_go_from_imagined_views_to_real_ones(
    world: TokenWorldModel, episodes: dict[str, list[Episode]]
) -> None:
    listening = Listening(world.model, world.format, "world")
    listening.calls = []
    settings = WorldTraining(
        steps=20, batch=10, own_start=0.0, own_refresh=3, own_steps=(2, 3), shares={"random": 1.0, "expert": 1.0}
    )
    data = WorldData({"random": episodes["random"], "expert": episodes["expert"]}, listening, settings, 4)
    real = {
        (step.belief.agent, step.belief.observation.text, step.move.action): step
        for name in ("random", "expert")
        for episode in episodes[name]
        for chain in world_steps(episode, 0)
        for step in chain
    }
    targets = {(step.belief.observation.step, step.view) for step in real.values()}
    data.batch(0)
    assert listening.calls == []
    rows = data.batch(1)
    assert len(rows) == settings.batch
    calls = list(listening.calls)
    assert 2 <= len(calls) <= 3, "three batches in as many passes as they have steps"
    data.batch(3), data.batch(5)
    assert listening.calls == calls
    # The first pass starts from real moments under real moves, half of them with the others' real actions.
    beliefs, moves, _ = calls[0]
    given = [move.others is not None for move in moves]
    assert abs(sum(given) - len(given) / 2) <= 3
    for belief, move in zip(beliefs, moves, strict=True):
        step = real[belief.agent, belief.observation.text, move.action]
        assert move.others in (None, step.move.others)
    # The later ones go on from what was imagined; the rows have that in the prompt and the real view as the target.
    imagined = {step.observation.text for _, _, found in calls for step in found if step.observation}
    prompts = Counter()
    for row in rows:
        text = world.format.tokenizer.decode(row.ids)
        seen = text.partition("<see> ")[2].partition(" <turn>")[0]
        prompts[seen in imagined] += 1
        answer = next(at for at, kind in enumerate(row.kinds) if kind)
        others = ("agent_1",) if "agent_0 <see>" in text else ("agent_0",)
        asked = () if "<intend>" in world.format.tokenizer.decode(row.ids[:answer]) else others
        written, _ = world.format.parse(row.ids[answer:], others, asked)
        assert any(written.view == view for _, view in targets)
    assert prompts[True] >= settings.batch // 2


def test_rare_steps_come_often_and_weigh_less(world: TokenWorldModel, episodes: dict[str, list[Episode]]) -> None:
    settings = WorldTraining(steps=400, batch=50, own_every=0, ending_share=0.5, shares={"random": 3, "expert": 1})
    data = WorldData(episodes, world, settings, 1)
    drawn = [one for number in range(40) for one in data._draw(np.random.default_rng(number))]
    ends = [weight for _, step, weight in drawn if step.ending]
    assert len(ends) / len(drawn) == pytest.approx(0.5, abs=0.05)
    assert ends == pytest.approx([1 / HORIZON / 0.5] * len(ends))
    share = sum(ends) / sum(weight for _, _, weight in drawn)
    assert share == pytest.approx(1 / HORIZON, abs=0.02), "what they weigh together is how often they happen"
    assert sum(name == "random" for name, _, _ in drawn) / len(drawn) == pytest.approx(0.75, abs=0.04)
    assert "scripted" not in {name for name, _, _ in drawn}


def test_unknown_sources_are_named(world: TokenWorldModel, episodes: dict[str, list[Episode]]) -> None:
    settings = WorldTraining(shares={"nobody": 1.0})
    with pytest.raises(UnknownNameError, match="nobody"):
        WorldData(episodes, world, settings, 1)


def test_training_moves_its_adapter_alone_and_repeats(
    world: TokenWorldModel, episodes: dict[str, list[Episode]], tmp_path: Path
) -> None:
    model = backend(world)
    settings = WorldTraining(
        steps=6, batch=12, own_start=0.0, own_refresh=2, shares={"random": 1, "scripted": 1, "expert": 1}
    )
    flags = {name: parameter.requires_grad for name, parameter in model.model.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}
    log = train_world_model(model, world, episodes, settings, 5, tmp_path / "one")
    assert {name: parameter.requires_grad for name, parameter in model.model.named_parameters()} == flags
    moved = {name for name, p in model.model.named_parameters() if not torch.equal(before[name], p)}
    assert moved
    assert all(".world." in name for name in moved)
    assert {f"loss_{part}" for part in ("view", "done", "reward", "others", "hear", "value", "form")} <= set(log[0])
    after = {name: p.detach().clone() for name, p in model.adapter_parameters("world").items()}
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            parameter.copy_(before[name])
    again = train_world_model(model, world, episodes, settings, 5, tmp_path / "two")
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in log]
    assert all(torch.equal(after[name], p) for name, p in model.adapter_parameters("world").items())


def test_told_partners_play_as_they_are_said_to(
    world: TokenWorldModel, episodes: dict[str, list[Episode]], tmp_path: Path
) -> None:
    """One view among random and among skilled partners: the word in the prompt alone decides what is expected of them;
    a model that is not told expects the same of both."""
    sources = {name: episodes[name] for name in ("random", "expert")}
    settings = WorldTraining(
        steps=120, batch=48, lr=3e-2, own_every=0, shares={"random": 1, "expert": 1},
        weights=WorldWeights(others=1.0, view=0.0, reward=0.0, done=0.0, hear=0.0, value=0.0, form=0.0),
    )  # fmt: skip
    start = {name: p.detach().clone() for name, p in backend(world).adapter_parameters("world").items()}
    gain: dict[bool, float] = {}
    for told in (True, False):
        with torch.no_grad():
            for name, parameter in backend(world).adapter_parameters("world").items():
                parameter.copy_(start[name])
        spelling = WorldFormat(world.format.turns, tells_partners=told)
        model = TokenWorldModel(world.model, spelling, "world")
        train_world_model(backend(world), model, sources, settings, 5, tmp_path / str(told))
        right, wrong = (
            sum(
                heldout_report(model, episodes[name], 0, horizon=1, partners=kind)["others_nats"]
                for name, kind in pairs
            )
            for pairs in ((("expert", "learner"), ("random", "random")), (("expert", "random"), ("random", "learner")))
        )
        gain[told] = wrong - right
    assert gain[False] == 0
    assert gain[True] > 0.1


def test_sources_say_who_plays_in_them(world: TokenWorldModel, episodes: dict[str, list[Episode]]) -> None:
    spelling = WorldFormat(world.format.turns, tells_partners=True)
    model = TokenWorldModel(world.model, spelling, "world")
    for source, kind in (("random", "random"), ("scripted", "scripted"), ("rollout", "learner")):
        played = {source: episodes["random"]}
        settings = WorldTraining(steps=4, batch=6, own_start=0.0, shares={source: 1.0})
        data = WorldData(played, model, settings, 1)
        for number in (0, 1):  # real moments, and imagined ones
            texts = [world.format.tokenizer.decode(row.ids) for row in data.batch(number)]
            assert all(f" <by> {kind} " in text for text in texts)


def test_refining_leaves_everything_else_alone(world: TokenWorldModel, episodes: dict[str, list[Episode]]) -> None:
    model = backend(world)
    settings = WorldTraining(steps=12, batch=16, own_every=3, shares={"scripted": 1.0})
    before = {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}
    state = torch.get_rng_state()
    found = refine(model, world, {"scripted": episodes["scripted"]}, settings, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert found["view"] > 0
    assert all(parameter.grad is None for parameter in model.model.parameters())
    moved = {name for name, p in model.model.named_parameters() if not torch.equal(before[name], p)}
    assert moved
    assert all(".world." in name for name in moved)
    later = refine(model, world, {"scripted": episodes["scripted"]}, settings, 4)
    assert later["view"] < found["view"]


def test_coverage_counts_pairs(episodes: dict[str, list[Episode]]) -> None:
    found = coverage({"random": episodes["random"], "expert": episodes["expert"][:1]}, {"same": episodes["expert"][:1]})
    assert found["expert"]["heldout_pairs_seen"] == 1.0
    assert found["expert"]["transitions"] == 2 * HORIZON
    assert found["all"]["transitions"] == 9 * 2 * HORIZON
    pairs = {(a, t.observation.text, t.action) for a, j in episodes["expert"][0].trajectories.items() for t in j.turns}
    assert found["expert"]["pairs"] == len(pairs)
    assert found["expert"]["states"] == len(set(episodes["expert"][0].states))
    assert found["random"]["heldout_pairs_seen"] <= found["all"]["heldout_pairs_seen"]


def test_the_report_is_about_what_it_says(world: TokenWorldModel, episodes: dict[str, list[Episode]]) -> None:
    found = heldout_report(world, episodes["expert"], 0, horizon=3)
    assert found["malformed"] == 0
    assert 0 <= found["one_step_exact"] <= found["one_step_determined"] <= found["one_step_fields"] + 1e-9 <= 1
    assert {"step_3_exact", "step_3_fields", "others_nats", "view_nats", "reward", "done"} <= set(found)
