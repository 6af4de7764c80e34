"""Recipes: what is accepted, and how everything else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from preconcert.agents import ChannelMode
from preconcert.config import load_recipe, load_run, override_play, parse_override
from preconcert.core import ConfigError
from preconcert.envs import tasks
from preconcert.training.credit import AgentCredit, TurnCredit
from preconcert.training.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "rendezvous.yaml"
    file.write_text("task: rendezvous\n")
    return file


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_here_loads(file: Path) -> None:
    recipe = load_recipe(file)
    assert file.stem not in tasks() or recipe.task == file.stem


def test_overrides_go_on_top(recipe: Path) -> None:
    found = load_recipe(recipe, ["grpo.lr=1e-3", "params.size=6", "channel.mode=off", "frozen=[agent_0]"])
    assert (found.grpo.lr, found.params["size"], found.channel.mode) == (1e-3, 6, ChannelMode.OFF)
    assert found.frozen == ("agent_0",)
    assert load_recipe(recipe, ["grpo.credit=agent-centred"]).grpo.credit == AgentCredit(scale=False)
    credit = ["grpo.credit.type=turn", "grpo.credit.per_index=true"]
    shaped = load_recipe(recipe, [*credit, "grpo.rewards.mode=mixed", "grpo.rewards.weight=0.5"]).grpo
    assert (shaped.credit, shaped.rewards.weight) == (TurnCredit(per_index=True), 0.5)


def test_a_pretrained_model_has_other_defaults(recipe: Path, tmp_path: Path) -> None:
    """Adapters instead of all weights, and smaller steps; what a recipe says itself counts."""
    plain = load_recipe(recipe)
    assert (plain.warm_start.method, plain.warm_start.lr, plain.grpo.lr) == ("full", 3e-3, 2.5e-3)
    given = ["model=Qwen/Qwen3-0.6B", "grpo.lr=1e-4", "warm_start.steps=10"]
    found = load_recipe(recipe, given)
    assert (found.warm_start.method, found.warm_start.lr, found.warm_start.batch) == ("lora", 2e-4, 16)
    assert (found.grpo.lr, found.warm_start.steps) == (1e-4, 10)
    assert load_recipe(recipe, [*given, "warm_start.method=full"]).warm_start.method == "full"
    assert Recipe.model_validate_json(found.model_dump_json()) == found


def test_a_run_folder_is_a_recipe(recipe: Path, tmp_path: Path) -> None:
    first = load_recipe(recipe, ["seed=4", "agent.spans.say=false"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(first.model_dump_json())
    assert load_recipe(tmp_path / "run") == load_run(tmp_path / "run") == first


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("task=rendevous", "unknown task 'rendevous'; did you mean 'rendezvous'?"),
        ("task=no_such_module:Env", "no module 'no_such_module'"),
        ("tsk=signal", "unknown key 'tsk' = 'signal'; did you mean 'task'?"),
        ("grpo.iteratons=3", "unknown key 'grpo.iteratons' = 3; did you mean 'grpo.iterations'?"),
        ("agent.spans.intnd=false", "unknown key 'agent.spans.intnd' = False; did you mean 'agent.spans.intend'?"),
        ("iterations=3", "unknown key 'iterations' = 3; did you mean 'grpo.iterations'?"),
        ("params.sise=3", "unknown key 'params.sise' = 3; did you mean 'params.size'?"),
        ("params.size=big", "params.size = 'big': expected a whole number"),
        ("params.size=1", "params.size = 1: expected at least 2"),
        ("grpo.lr=fast", "grpo.lr = 'fast': expected a number"),
        ("grpo.lr=0", "grpo.lr = 0: expected more than 0"),
        ("seed=1.5", "seed = 1.5: expected a whole number"),
        ("agent=3", "agent = 3: expected a mapping of keys"),
        ("agent.constrained=maybe", "agent.constrained = 'maybe': expected true or false"),
        ("channel.mode=shufled", "unknown channel.mode 'shufled'; did you mean 'shuffled'?"),
        ("grpo.credit=agnt", "unknown grpo.credit 'agnt'; did you mean 'agent'?"),
        ("grpo.credit=agent-centerd", "unknown grpo.credit 'agent-centerd'; did you mean 'agent-centred'?"),
        ("grpo.credit={type: agnt}", "unknown type 'agnt'; did you mean 'agent'?"),
        ("grpo.credit={scale: false}", "needs a type; known: agent, global, turn, "),
        ("grpo.credit={type: agent, scael: 1}", "unknown key 'grpo.credit.scael' = 1; did you mean 'grpo.credit.scal"),
        ("grpo.credit={type: turn, gamma: 2}", "grpo.credit.gamma = 2: expected at most 1"),
        ("grpo.rewards={mode: mixed}", "mode mixed needs a weight"),
        ("grpo.rewards.mode=jiont", "unknown grpo.rewards.mode 'jiont'; did you mean 'joint'?"),
        ("grpo.rewards.scale={agnt_0: 2}", "unknown agent 'agnt_0'; did you mean 'agent_0'?"),
        ("grpo.policy_spans=[act,sya]", "unknown grpo.policy_spans.1 'sya'; did you mean 'say'?"),
        ("adapters=shard", "unknown adapters 'shard'; did you mean 'shared'?"),
        ("adapters={agnt_0: x}", "unknown agent 'agnt_0'; did you mean 'agent_0'?"),
        ("adapters={agent_0: x}", "no adapter is named for agent 'agent_1'"),
        ("frozen=[agent_2]", "unknown adapter 'agent_2'; did you mean 'agent_"),
        ("model=startr", "unknown model 'startr'; did you mean 'starter'?"),
        ("starter.width=30", "width 30 is not an even multiple of heads 4"),
        ("grpo", "override 'grpo' is not of the form key=value"),
        ("grpo..lr=1", "override 'grpo..lr=1' is not of the form key=value"),
        ("frozen=[a", "override 'frozen=[a': line 1"),
    ],
)
def test_a_bad_override_is_one_line(recipe: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_with_an_owner_is_no_misspelling(recipe: Path) -> None:
    """Is it really there? That is found out when it is loaded."""
    assert load_recipe(recipe, ["model=bigcode/starcoder"]).model == "bigcode/starcoder"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("task: rendezvous\ngrpo: [1\nseed: 3\n", "line 3, column 5"),
        ("task: rendezvous\nseed: 1\nseed: 2\n", "line 3, column 1: the key 'seed' is there twice"),
        ("- task\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("seed: 1\n", "task is missing"),
        ("task: rendezvous\ngrpo:\n  lerning_rate: 1\n", "unknown key 'grpo.lerning_rate' = 1"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(tmp_path / "bad.yaml")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe at .*rendevous\.yaml'; did you mean '.*rendezvous\.yaml'\?"):
        load_recipe(recipe.with_name("rendevous.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=off", "off"), ("a=true", True), ("a=1e-3", 1e-3), ("a=-7", -7), ("a=.5", 0.5), ("a=[1, x]", [1, "x"]),
     ("a=", None), ("a=b=c", "b=c"), ("a=2020-01-01", "2020-01-01"), ("a=.inf", float("inf")), ("a=0x10", "0x10")],
)
def test_values_are_yaml_1_2(text: str, value: object) -> None:
    found = parse_override(text)[1]
    assert found == value
    assert type(found) is type(value)


def test_a_finished_run_can_be_played_otherwise(recipe: Path) -> None:
    found = override_play(load_recipe(recipe), ["messages=off", "drop=0.3", "params.size=6"])
    assert (found.channel.mode, found.channel.drop, found.params["size"]) == (ChannelMode.OFF, 0.3, 6)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("grpo.lr=1", "grpo.lr belongs to training"),
        ("mesages=off", "unknown key 'mesages'; did you mean 'messages'?"),
        ("drop=3", "channel.drop = 3: expected at most 1"),
        ("params.sise=6", "did you mean 'params.size'?"),
    ],
)
def test_playing_otherwise_has_limits(recipe: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected.replace("?", r"\?")):
        override_play(load_recipe(recipe), [override])
