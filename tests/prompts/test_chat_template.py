"""The chat template of an export writes the very prompts that the turn format writes, from what an agent sees."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import trl
from jinja2.exceptions import TemplateError

from preconcert.agents import ChannelSettings
from preconcert.core import Episode, Observation
from preconcert.envs import make_env, tasks
from preconcert.models.starter import word_tokenizer
from preconcert.prompts import SpanSettings, TurnContent, TurnFormat, chat_template, own_template, starter_words
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout
from tests.models.checkpoints import build_chat_tokenizer

SPELLINGS = ("compact", "labelled")
SPANS = SpanSettings(intend=False, foresee=False, say=False)
"""Of the turns that are written here; the prompts' own have all parts."""


def tokenizer_of(task: str, spelling: str) -> Any:
    if spelling == "labelled":
        return build_chat_tokenizer()
    env: Any = make_env(task, {}, 0)
    return word_tokenizer(starter_words(env.words, env.language, env.agents), 512)


def played(task: str) -> Episode:
    return rollout([EpisodeSpec(task, {}, 3, "heldout")], ScriptedPolicy("random"), ChannelSettings(), 0)[0]


def ids_of(tokenizer: Any, chat: list[dict[str, str]], **values: Any) -> tuple[int, ...]:
    return tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, **values)["input_ids"])


@pytest.mark.parametrize("task", list(tasks()))
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_prompt_of_an_episode(task: str, spelling: str) -> None:
    env = make_env(task, {}, 0)
    tokenizer = tokenizer_of(task, spelling)
    turns = TurnFormat(tokenizer, env.language, SpanSettings(), memory=2)
    plain = TurnFormat(tokenizer, env.language, SPANS)
    dressed = tokenizer_of(task, spelling)
    dressed.chat_template = chat_template(turns, env.agents)
    for agent, trajectory in played(task).trajectories.items():
        others = [other for other in env.agents if other != agent]
        answers: list[dict[str, str]] = []
        memory: list[str] = []
        for turn in trajectory.turns:
            wanted = turns.prompt_ids(agent, turn.observation, turn.inbox, others, memory)
            rules, seen = turns.chat(agent, turn.observation, turn.inbox, others, memory)
            named = {"role": "system", "content": agent}
            assert ids_of(dressed, [rules, seen]) == wanted
            assert ids_of(dressed, [named, seen]) == wanted
            assert ids_of(dressed, [seen], agent=agent) == wanted
            # Who keeps the conversation need not say what the agent did.
            lines = [line for line in seen["content"].split("\n") if not line.startswith("You did:")]
            assert ids_of(dressed, [named, *answers, {"role": "user", "content": "\n".join(lines)}]) == wanted
            written = plain.write(TurnContent(turn.action), others, turn.observation.legal_actions)
            answers += [
                {"role": "user", "content": "what was seen then"},
                {"role": "assistant", "content": plain.text(written.ids)},
            ]
            memory.append(turn.action)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_bare_view_will_do(spelling: str) -> None:
    """Nothing heard, nothing done, everything allowed."""
    env = make_env("rendezvous", {}, 0)
    tokenizer = tokenizer_of("rendezvous", spelling)
    turns = TurnFormat(tokenizer, env.language, SpanSettings(), memory=1)
    observation = env.reset()["agent_1"]
    wanted = turns.prompt_ids("agent_1", observation, (), ("agent_0",))
    tokenizer.chat_template = chat_template(turns, env.agents)
    chat = [{"role": "system", "content": "agent_1"}, {"role": "user", "content": observation.text}]
    found = ids_of(tokenizer, chat)
    if spelling == "compact" or observation.legal_actions == env.language.actions:
        assert found == wanted
    parts = [{"type": "text", "text": observation.text}]
    chat[1] = {"role": "user", "content": parts}  # type: ignore[dict-item]
    assert ids_of(tokenizer, chat) == found


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_transcripts(spelling: str) -> None:
    env = make_env("rendezvous", {}, 0)
    tokenizer, dressed = tokenizer_of("rendezvous", spelling), tokenizer_of("rendezvous", spelling)
    turns = TurnFormat(tokenizer, env.language, SpanSettings())
    plain = TurnFormat(tokenizer, env.language, SPANS)
    dressed.chat_template = chat_template(turns, env.agents, transcript=True)
    for agent, trajectory in played("rendezvous").trajectories.items():
        others = [other for other in env.agents if other != agent]
        chat: list[dict[str, str]] = [{"role": "system", "content": agent}]
        ids: tuple[int, ...] = ()
        for turn in trajectory.turns:
            if ids:
                ids += turns.followup_ids(agent, turn.observation, turn.inbox, others, ended_with_eos=True)
            else:
                ids = turns.prompt_ids(agent, turn.observation, turn.inbox, others)
            chat.append(turns.chat(agent, turn.observation, turn.inbox, others)[1])
            assert dressed.decode(ids_of(dressed, chat)).split() == tokenizer.decode(ids).split()
            written = plain.write(TurnContent(turn.action), others, turn.observation.legal_actions)
            ids += written.ids
            chat.append({"role": "assistant", "content": tokenizer.decode(written.ids[:-1])})


def test_random_labels_and_spaces() -> None:
    """Whatever stands in a view, the labelled prompt has it word by word."""
    env = make_env("rendezvous", {}, 0)
    turns = TurnFormat(build_chat_tokenizer(), env.language, SpanSettings())
    tokenizer = build_chat_tokenizer()
    tokenizer.chat_template = chat_template(turns, env.agents)
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(rng.choice(["a", " ", "{{ x }}", '"', "\\n", "{% if %}", "<", "You", ":"]) for _ in range(9))
        seen = Observation(agent="agent_0", text=f"x{text}x", legal_actions=("stay",), step=0)
        rules, user = turns.chat("agent_0", seen, (), ("agent_1",))
        assert ids_of(tokenizer, [rules, user]) == turns.prompt_ids("agent_0", seen, (), ("agent_1",))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_cannot_be_read_is_refused(spelling: str) -> None:
    env = make_env("rendezvous", {}, 0)
    tokenizer = tokenizer_of("rendezvous", spelling)
    tokenizer.chat_template = chat_template(TurnFormat(tokenizer, env.language, SpanSettings()), env.agents)
    with pytest.raises(TemplateError, match="which agent this is: agent_0, agent_1"):
        tokenizer.apply_chat_template([{"role": "user", "content": "row 0"}], tokenize=False)
    with pytest.raises(TemplateError, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_exported_tokenizer_trains_as_its_original(spelling: str) -> None:
    env = make_env("signal", {}, 0)
    plain, dressed = tokenizer_of("signal", spelling), tokenizer_of("signal", spelling)
    turns = TurnFormat(plain, env.language, SpanSettings())
    dressed.chat_template = chat_template(turns, env.agents)
    assert own_template(dressed) == own_template(plain)
    again = TurnFormat(dressed, env.language, SpanSettings())
    assert again.compact == turns.compact
    agent = env.agents[0]
    observation = env.reset()[agent]
    assert again.prompt_ids(agent, observation, (), env.agents[1:]) == turns.prompt_ids(
        agent, observation, (), env.agents[1:]
    )
    assert chat_template(again, env.agents) == dressed.chat_template


TEMPLATES = sorted(
    file.stem for file in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja") if "training" not in file.stem
)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_templates_of_well_known_models(name: str) -> None:
    """Whatever a base's own template does, it does the same inside of an export's."""
    env = make_env("rendezvous", {}, 0)
    plain, dressed = build_chat_tokenizer(), build_chat_tokenizer()
    plain.bos_token = dressed.bos_token = "<|endoftext|>"
    plain.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    turns = TurnFormat(plain, env.language, SpanSettings(), memory=1)
    observation = env.reset()["agent_1"]
    chat = turns.chat("agent_1", observation, (), ("agent_0",), ("north",))
    try:
        wanted = turns.chat_text(chat)
    except (TemplateError, TypeError) as error:
        pytest.skip(f"takes no such chat itself: {error}")
    dressed.chat_template = plain.chat_template
    dressed.chat_template = chat_template(TurnFormat(dressed, env.language, SpanSettings(), memory=1), env.agents)
    assert dressed.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == wanted
    named = [{"role": "system", "content": "agent_1"}, chat[1]]
    assert dressed.apply_chat_template(named, tokenize=False, add_generation_prompt=True) == wanted
    assert own_template(dressed) == plain.chat_template.removesuffix("\n")
