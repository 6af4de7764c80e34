"""Rounds of talk and the other settings of the channel in real rollouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from preconcert.agents import AgentSettings, ChannelMode, ChannelSettings
from preconcert.config import load_recipe, override_play
from preconcert.core import ConfigError, Episode, Fate, SpanKind, Turn, dump_episode, load_episodes, parse_episode
from preconcert.envs import LISTEN, make_env, talking
from preconcert.experiments.evaluation import evaluate, override_arms
from preconcert.experiments.replay import replay_of
from preconcert.models import TransformersModel
from preconcert.prompts import SpanSettings
from preconcert.training.branching import branch
from preconcert.training.hindsight import hindsight_content
from preconcert.training.measures import measure
from preconcert.training.recipe import Recipe
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout
from preconcert.training.run import train
from tests.training.teams import AGENTS, PARAMS, TASK, recipe_of, settings_of, specs, team_on

WANTED = [EpisodeSpec("rendezvous", {}, seed) for seed in range(12)]


def played(settings: ChannelSettings, kind: str = "expert") -> list[Episode]:
    return rollout(WANTED, ScriptedPolicy(kind), settings, 0)


def test_two_rounds_bring_the_word_before_the_first_move() -> None:
    for plain, talks in zip(played(ChannelSettings()), played(ChannelSettings(rounds=2)), strict=True):
        env = make_env("rendezvous", {}, plain.seed)
        informed = env.informed  # type: ignore[attr-defined]  # of this task
        (other,) = set(env.agents) - {informed}
        assert (talks.steps, plain.steps) == (2 * env.horizon, env.horizon)
        assert talks.params == {"talk_rounds": 2}
        named = env.open  # type: ignore[attr-defined]  # of this task
        turns = talks.trajectories[other].turns
        assert [talking(turn.observation) for turn in turns] == [True, False] * env.horizon
        assert [turn.action == LISTEN for turn in turns] == [True, False] * env.horizon
        assert turns[0].inbox == ()
        assert turns[1].inbox[0].payload.split()[0] == named, "known before the first move"
        assert plain.trajectories[other].turns[0].inbox == (), "which without rounds it is not"
        assert talks.success
        assert talks.trajectories[other].total_reward == plain.trajectories[other].total_reward
        rewards = [turn.reward for turn in turns]
        assert rewards[::2] == [0.0] * env.horizon
        fates = [each.fate for each in talks.deliveries if each.sent_at < 2 * env.horizon - 1]
        assert set(fates) == {Fate.ARRIVED}
        assert parse_episode(dump_episode(talks)) == talks
        assert len(replay_of(talks).frames) == 2 * env.horizon + 1, "it can be played again from its record"


def test_hindsight_announces_the_next_move_and_not_listening() -> None:
    language = make_env("rendezvous", {"talk_rounds": 2}, 0).language
    for episode in played(ChannelSettings(rounds=2), "scripted"):
        for agent, trajectory in episode.trajectories.items():
            for index in range(len(trajectory.turns) - 1):
                content = hindsight_content(episode, agent, index, language, SpanSettings())
                following = [turn.action for turn in trajectory.turns[index + 1 :] if turn.action != LISTEN]
                assert content.message[1] == following[0]


def test_a_run_with_rounds(tmp_path: Path) -> None:
    """From the warm start on, whose words are those of talking too, to an evaluation over another channel."""
    content = recipe_of(iterations=1, hindsight_weight=0.5, hindsight_fraction=1.0).model_dump()
    recipe = Recipe.model_validate({**content, "channel": {"rounds": 2, "delay": 1, "cap_episode_bits": 20.0}})
    run = train(recipe, tmp_path / "run")
    horizon = make_env(TASK, PARAMS, 0).horizon
    turns = []
    for episode in load_episodes(run / "episodes.jsonl").episodes:
        assert (episode.steps, episode.params) == (2 * horizon, {**PARAMS, "talk_rounds": 2})
        assert {each.fate for each in episode.deliveries} == {Fate.ARRIVED, Fate.LATE, Fate.CAPPED}
        turns += turns_of(episode)
    assert all((turn.action == LISTEN) == talking(turn.observation) for turn in turns)
    for turn in turns:
        (act,) = (span for span in turn.spans if span.kind is SpanKind.ACT)
        assert talking(turn.observation) != any(turn.sampled[act.start : act.end]), "to listen is no choice"
    changed = override_play(recipe, ["messages=random", "channel.substitute=0.5"])
    found = evaluate(run, changed, episodes=4)
    assert found.main == "trained-random-substitute=0.5"
    assert found["trained"].arm.channel == recipe.channel
    assert 0 < found["trained"].measures.message_raw_bits_per_episode <= 2 * 20


def test_rounds_that_differ_are_refused() -> None:
    spec = EpisodeSpec(TASK, {**PARAMS, "talk_rounds": 2}, 0)
    with pytest.raises(ConfigError, match=r"channel\.rounds = 3, and episodes that have 2 rounds per step"):
        rollout([spec], ScriptedPolicy("random"), ChannelSettings(rounds=3), 0)
    (episode,) = rollout([spec], ScriptedPolicy("random"), ChannelSettings(), 0)
    assert episode.steps == 2 * make_env(TASK, PARAMS, 0).horizon, "what the episode says goes"


SETTINGS = [
    ChannelSettings(mode=mode) for mode in (ChannelMode.CONSTANT, ChannelMode.RANDOM, ChannelMode.SHUFFLED)
] + [
    ChannelSettings(delay=2),
    ChannelSettings(cap_bits=3.0),
    ChannelSettings(cap_episode_bits=9.0),
    ChannelSettings(substitute=0.3, drop=0.2),
    ChannelSettings(topology={"type": "nearest", "k": 1}),  # type: ignore[arg-type]  # as a recipe says it
    ChannelSettings(topology={"type": "messenger", "name": "agent_0"}),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: str(settings.told()))
def test_every_message_of_a_rollout_is_accounted_for(starter: TransformersModel, settings: ChannelSettings) -> None:
    episodes = rollout(specs(2, 2), team_on(starter), settings, 0)
    for episode in episodes:
        said = {
            (agent, turn.step): turn.message
            for agent, trajectory in episode.trajectories.items()
            for turn in trajectory.turns
            if turn.message is not None
        }
        records = {(each.sender, each.sent_at): each for each in episode.deliveries}
        assert records.keys() == said.keys()
        for (sender, step), each in records.items():
            (reader,) = (t for name, t in episode.trajectories.items() if name != sender)
            has = {t.step for t in reader.turns if any(m.sender == sender and m.sent_at == step for m in t.inbox)}
            if each.fate is Fate.ARRIVED:
                assert each.arrived_at == step + 1 + settings.delay
                assert not has or min(has) == each.arrived_at
            else:
                assert not has
    found = measure(episodes, team_on(starter).language, SpanSettings())
    assert abs(sum(found.message_fates.values()) - 1) < 1e-9
    if settings.cap_bits is not None:
        turns = len(episodes[0].trajectories) * episodes[0].steps
        assert 0 < found.message_raw_bits_per_episode <= settings.cap_bits * turns
    if settings.cap_episode_bits is not None:
        assert 0 < found.message_raw_bits_per_episode <= settings.cap_episode_bits * 2
        assert found.message_fates["capped"] > 0


@pytest.mark.parametrize("codec", ["raw-state", "intention", "learned"])
@pytest.mark.parametrize("mode", [ChannelMode.CONSTANT, ChannelMode.RANDOM, ChannelMode.ON])
def test_every_codec_has_its_controls(starter: TransformersModel, codec: str, mode: ChannelMode) -> None:
    agent = AgentSettings.model_validate({**settings_of().model_dump(), "codec": codec})
    team = team_on(starter, agent)
    slots = team.message_slots(AGENTS[1:])
    channel = ChannelSettings(mode=mode, substitute=1.0 if mode is ChannelMode.ON else 0.0)
    for episode in rollout(specs(2, 2), team, channel, 0):
        inboxes = [message for turn in turns_of(episode) for message in turn.inbox]
        assert inboxes
        for message in inboxes:
            words = message.payload.split()
            assert all(word in slot.choices for word, slot in zip(words, slots, strict=False))
            assert mode is ChannelMode.ON or len(words) == len(slots)
        assert mode is not ChannelMode.CONSTANT or len({message.payload for message in inboxes}) == 1


def test_scripted_messages_know_their_bits() -> None:
    (episode, *_) = played(ChannelSettings())
    slots = make_env("rendezvous", {}, 0).language.message
    message = episode.trajectories["agent_0"].turns[0].message
    assert message is not None
    assert [2**bits for bits in message.word_bits] == pytest.approx([len(slot.choices) for slot in slots])
    assert {each.bits for each in episode.deliveries} == {message.raw_bits}


@pytest.mark.parametrize("settings", [ChannelSettings(delay=1), ChannelSettings(cap_episode_bits=14.0)])
def test_branches_account_for_their_own_messages(settings: ChannelSettings) -> None:
    result = branch(WANTED[:2], ScriptedPolicy("random"), settings, 0, 2)
    for one in (*result.branches, *result.lines):
        turns = [turn for trajectory in one.trajectories.values() for turn in trajectory.turns]
        assert sorted((e.sender, e.sent_at) for e in one.deliveries) == sorted((t.agent, t.step) for t in turns)
    if settings.cap_episode_bits is not None:
        for line in result.lines:
            spent = [sum(e.bits for e in line.deliveries if e.sender == agent) for agent in line.trajectories]
            said = [turn.message.raw_bits for turn in turns_of(line) if turn.message is not None]
            assert max(spent) <= settings.cap_episode_bits < sum(said) / 2


def turns_of(episode: Episode) -> list[Turn]:
    return [turn for trajectory in episode.trajectories.values() for turn in trajectory.turns]


def test_a_recipe_keeps_rounds_in_one_place() -> None:
    assert Recipe(task="rendezvous").params == {}
    recipe = Recipe.model_validate({"task": "rendezvous", "channel": {"rounds": 2}})
    assert recipe.params == {"talk_rounds": 2}
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert Recipe.model_validate({"task": "rendezvous", "channel": {"rounds": 2.0}}) == recipe
    assert Recipe(task="rendezvous", params=recipe.params).channel.rounds == 2
    assert override_play(recipe, ["channel.rounds=1"]).params == {}
    assert override_play(recipe, ["channel.rounds=3"]).params == {"talk_rounds": 3}
    with pytest.raises(ConfigError, match=r"rounds of talk are set by channel\.rounds"):
        override_play(recipe, ["params.talk_rounds=3"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("channel.delya=2", "unknown key 'channel.delya' = 2; did you mean 'channel.delay'?"),
        ("channel.topology=starr", "channel.topology"),
        ("channel.topology={type: nearest, kk: 2}", "did you mean 'channel.topology.k'?"),
        ("channel.topology={type: messenger, name: agnt_1}", "unknown agent 'agnt_1'; did you mean 'agent_1'?"),
        ("channel.substitute=1.5", "channel.substitute = 1.5: expected at most 1"),
        ("channel.rounds=0", "channel.rounds = 0: expected at least 1"),
    ],
)
def test_a_wrong_setting_is_one_line(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override_play(Recipe(task="rendezvous"), [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_world_model_with_rounds(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("task: rendezvous\nchannel: {rounds: 2}\nworld_model: {}\n")
    with pytest.raises(ConfigError, match=r"channel\.rounds=2 and a world_model do not go together"):
        load_recipe(tmp_path / "r.yaml")


def test_arms_are_named_for_what_differs() -> None:
    asked = override_play(Recipe(task="rendezvous"), ["drop=0.3", "channel.delay=2", "channel.cap_bits=4"]).channel
    arm, greedy = override_arms(ChannelSettings(), asked)
    name = "trained-drop0.3-cap_bits=4.0-delay=2"
    assert (arm.name, greedy.name) == (name, f"{name}-greedy")
    assert arm.title == "trained, sampled, 30% lost, cap_bits 4.0, delay 2"
