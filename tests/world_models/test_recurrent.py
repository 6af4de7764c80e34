"""The recurrent world model at its smallest: it learns, filters, remembers, and is the same when loaded again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from preconcert.core import ConfigError, Episode, ModelError, Move, Outcome, WorldModel
from preconcert.world_models.recurrent import RecurrentSettings, RecurrentWorldModel
from preconcert.world_models.recurrent_training import train_recurrent, two_hot
from tests.world_models.worlds import LANGUAGE, counted, request_of, seen

TINY = RecurrentSettings(state=24, groups=4, classes=6, hidden=32, steps=200, batch=16, lr=1e-2, bins=5)


def episodes() -> list[Episode]:
    """Two worlds that begin alike: where the light was green at first, b goes up at the third step."""
    found = []
    for bits in range(8):
        mine = ["up" if bits >> t & 1 else "stay" for t in range(3)]
        for light in ("red", "green"):
            theirs = ["stay", "stay", "up" if light == "green" else "stay"]
            found.append(counted(list(zip(mine, theirs, strict=True)), [light, "red", "red", "red"], ["go", "wait"]))
    return found


@pytest.fixture(scope="module")
def trained() -> tuple[RecurrentWorldModel, list[float]]:
    losses: list[float] = []
    before = torch.random.get_rng_state()
    model = train_recurrent(episodes(), LANGUAGE, TINY, 0, lambda _, loss: losses.append(loss))
    assert torch.equal(before, torch.random.get_rng_state())
    model.greedy = True
    return model, losses


def test_training_lowers_the_loss(trained: tuple[RecurrentWorldModel, list[float]]) -> None:
    model, losses = trained
    assert isinstance(model, WorldModel)
    assert len(losses) == 200
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_it_imagines_what_happens(trained: tuple[RecurrentWorldModel, list[float]]) -> None:
    """Heights add up, the step counter ends the episode; the others' actions given are taken into account."""
    model, _ = trained
    right = ends = count = 0
    for episode in episodes():
        [belief] = model.begin([request_of(episode, "a", 0)], [()])
        for t in range(3):
            mine, theirs = (episode.trajectories[agent].turns[t].action for agent in "ab")
            [step] = model.advance([belief], [Move(mine, None, {"b": theirs})], [0])
            views = [turn.observation for turn in episode.trajectories["a"].turns]
            real = [*views, episode.trajectories["a"].final_observation][t + 1]
            assert step.observation is not None
            assert step.others == {"b": theirs}
            assert (step.observation.step, step.observation.agent) == (t + 1, "a")
            right += step.observation.text == real.text
            ends += step.done == (t == 2)
            count += 1
            belief = step.belief
    assert right / count > 0.85
    assert ends / count > 0.9


def test_the_past_counts(trained: tuple[RecurrentWorldModel, list[float]]) -> None:
    """The light is red in both worlds by now; only what was seen at first tells what b will do."""
    model, _ = trained
    chances = []
    for light in ("red", "green"):
        mine = [("stay", "stay")] * 2 + [("stay", "up" if light == "green" else "stay")]
        episode = counted(mine, [light, "red", "red", "red"], ["go", "wait"])
        [belief] = model.begin([request_of(episode, "a", 2)], [episode.trajectories["a"].turns[:2]])
        outcome = Outcome(seen("a", 0, "red", 3), {"b": "stay"}, 0.0, True)
        [judged] = model.judge([belief], [Move("stay")], [outcome])
        assert judged is not None
        assert sum(judged.others["b"].values()) == pytest.approx(1.0, abs=1e-5)
        chances.append(judged.others["b"]["up"])
    assert chances[1] > chances[0] + 0.3


def test_answers_do_not_depend_on_the_batch_and_judgements_are_probabilities(
    trained: tuple[RecurrentWorldModel, list[float]],
) -> None:
    model = RecurrentWorldModel(trained[0].network, trained[0].setting, trained[0].returns)
    some = episodes()[:6]
    requests = [request_of(each, "a", t % 3, f"e{n}") for n, (each, t) in enumerate(zip(some, range(6), strict=True))]
    pasts = [each.trajectories["a"].turns[: t % 3] for each, t in zip(some, range(6), strict=True)]
    moves, seeds = [Move("up")] * 6, list(range(6))
    together = model.advance(model.begin(requests, pasts), moves, seeds)
    for n in range(6):
        [alone] = model.advance(model.begin([requests[n]], [pasts[n]]), [moves[n]], [seeds[n]])
        assert (alone.observation, alone.others, alone.inbox, alone.done) == (
            together[n].observation, together[n].others, together[n].inbox, together[n].done,
        )  # fmt: skip
    [belief] = model.begin(requests[:1], pasts[:1])
    every = [
        Outcome(seen("a", height, light, 1), {"b": "up"}, 0.0, False)
        for height in range(5)
        for light in ("red", "green")
    ]
    judged = model.judge([belief] * 10, [Move("up")] * 10, every)
    assert sum(math.exp(-each.view_nll) for each in judged if each) == pytest.approx(1.0, abs=1e-4)


def test_saved_and_loaded_it_says_the_same(trained: tuple[RecurrentWorldModel, list[float]], tmp_path: Path) -> None:
    model, _ = trained
    model.save(tmp_path / "model")
    again = RecurrentWorldModel.load(tmp_path / "model", greedy=True)
    request = request_of(episodes()[3], "b", 0)
    answers = [m.advance(m.begin([request], [()]), [Move("up")], [4])[0] for m in (model, again)]
    assert answers[0].observation == answers[1].observation
    assert answers[0].value == answers[1].value
    with pytest.raises(ModelError, match="holds no recurrent world model"):
        RecurrentWorldModel.load(tmp_path)


def test_equal_seeds_give_equal_weights() -> None:
    short = TINY.model_copy(update={"steps": 3})
    one, two, other = (train_recurrent(episodes(), LANGUAGE, short, seed).network.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_values_come_from_valued_episodes_alone(trained: tuple[RecurrentWorldModel, list[float]]) -> None:
    """The rest of what it learns is the same; a value is what such episodes earn."""
    played = episodes()
    earned = [sum(turn.reward for turn in each.trajectories["a"].turns) for each in played]
    poor = [each <= sorted(earned)[len(earned) // 2] for each in earned]
    assert not all(poor)
    model = train_recurrent(played, LANGUAGE, TINY, 0, valued=poor)
    request = request_of(played[0], "a", 0)
    values = []
    for each in (trained[0], model):
        [belief] = each.begin([request], [()])
        [step] = each.advance([belief], [Move("up", None, {"b": "stay"})], [0])
        values.append(step.value)
    assert None not in values
    assert values[1] < values[0]  # type: ignore[operator]
    for marks in ([False] * len(played), [True]):
        with pytest.raises(ConfigError, match="valued: "):
            train_recurrent(played, LANGUAGE, TINY, 0, valued=marks)


def test_two_hot_lies_between_the_bins() -> None:
    found = two_hot(torch.tensor([-1.0, 0.0, 0.3, 2.0, 9.0]), torch.linspace(0, 2, 3))
    expected = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0.7, 0.3, 0], [0, 0, 1], [0, 0, 1]])
    assert torch.allclose(found, expected)
