"""A run with a world model: rows in the warm start, an adapter and a report, resumed as it was, refreshed."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preconcert.agents import codec_of, turn_format_of
from preconcert.core import ConfigError, Move, UnknownNameError
from preconcert.envs import make_env
from preconcert.training.imagination import ImaginationSettings
from preconcert.training.imitation import scripted_episodes
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Silent
from preconcert.training.run import train
from preconcert.training.run_folder import load_model
from preconcert.training.warm_cache import BASIS, warm_basis, warm_key, world_key
from preconcert.training.world_settings import WorldModelSettings, WorldTraining
from preconcert.training.world_stage import load_world_model, mix_world_rows
from preconcert.world_models import TokenBelief
from tests.training.teams import AGENTS, recipe_of

TINY = WorldModelSettings(
    random_episodes=6,
    scripted_episodes=6,
    learner_episodes=4,
    heldout_episodes=2,
    recall=1,
    training=WorldTraining(steps=6, batch=12, own_refresh=2, own_start=0.0),
)


def with_world(recipe: Recipe, **changes: object) -> Recipe:
    return recipe.model_copy(update={"world_model": TINY.model_copy(update=changes)})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = with_world(recipe_of(iterations=3, checkpoint_every=1, lr=0.02), refresh_every=2, refresh_steps=2)
    return train(recipe, tmp_path_factory.mktemp("world") / "run")


def adapters_of(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(run)}:{key}": value
        for path in sorted(run.glob("**/adapter_model.safetensors"))
        if "checkpoints" not in path.parts
        for key, value in load_file(path).items()
    }


def test_runs_that_share_a_world_model_have_the_bits_of_one_alone(run: Path, tmp_path: Path) -> None:
    recipe = with_world(recipe_of(iterations=3, checkpoint_every=1, lr=0.02), refresh_every=2, refresh_steps=2)
    for number in range(2):  # makes the entry, uses the entry
        cached = train(recipe, tmp_path / f"cached{number}", warm_cache=tmp_path / "cache")
        mine, alone = adapters_of(cached), adapters_of(run)
        assert mine.keys() == alone.keys()
        assert all(torch.equal(mine[key], alone[key]) for key in mine)
    assert (tmp_path / "cache" / world_key(recipe, {agent: agent for agent in AGENTS})).is_dir()
    later = with_world(recipe_of(iterations=1), refresh_every=1)
    other = with_world(recipe_of(iterations=3), learner_episodes=5)
    own = {agent: agent for agent in AGENTS}
    assert world_key(recipe, own) == world_key(later, own) != world_key(other, own)


def test_the_report_says_what_was_learned_from_and_how_well(run: Path) -> None:
    report = json.loads((run / "world" / "report.json").read_text())
    assert set(report["coverage"]) == {"random", "scripted", "learner", "all"}
    assert report["coverage"]["random"]["episodes"] == 6
    assert report["coverage"]["all"]["transitions"] == (6 + 6 + 4) * 2 * 3
    assert {"loss", "loss_view", "loss_done", "loss_others", "loss_reward", "loss_hear", "loss_form"} <= set(
        report["log"][0]
    )
    for name in ("random", "scripted", "learner"):
        sampled = report["heldout"][name]["sampled"]
        assert 0 <= sampled["one_step_exact"] <= sampled["one_step_determined"] <= 1
        assert sampled["malformed"] == 0
        assert report["heldout"][name]["free"]["malformed"] > 0.5, "six steps do not teach to write without a grammar"
    assert report["value_range"] == [0.0, 1.0]


def test_the_world_model_comes_back_beside_the_team(run: Path) -> None:
    recipe = Recipe.model_validate_json((run / "recipe.json").read_text())
    model = load_model(recipe, run, run / "adapters")
    world = load_world_model(run, model)
    assert set(model.adapters) == {*AGENTS, "world"}
    assert world.format.recall == TINY.recall
    alone = load_world_model(run)
    env = make_env(recipe.task, recipe.params, 5)
    seen = env.reset()["agent_0"]
    words = model.tokenizer.get_vocab()
    assert {str(digit) for digit in range(10)} <= set(words)
    belief = TokenBelief("agent_0", ("agent_1",), seen, (), ())
    first = world.advance([belief] * 3, [Move("stay", "a stay")] * 3, [1, 2, 3])
    assert first == alone.advance([belief] * 3, [Move("stay", "a stay")] * 3, [1, 2, 3])
    assert not (run / "adapters" / "world").exists()


def test_a_report_from_before_there_were_earlier_moments_has_none(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old, ignore=shutil.ignore_patterns("checkpoints"))
    report = json.loads((old / "world" / "report.json").read_text())
    assert report.pop("recall") == TINY.recall
    (old / "world" / "report.json").write_text(json.dumps(report))
    assert load_world_model(old).format.recall == 0


def test_the_base_is_shown_earlier_moments_too(run: Path) -> None:
    """In the prompts of its world rows, not in what they teach; and its supervised phase has another key for it."""
    recipe = Recipe.model_validate_json((run / "recipe.json").read_text())
    assert len({warm_key(with_world(recipe, recall=recall), "agent_0") for recall in (0, 1, 2)}) == 3
    tokenizer = load_model(recipe, run, run / "adapters").tokenizer
    codec = codec_of(recipe.agent.codec, make_env(recipe.task, recipe.params, 0).language, recipe.agent.spans)
    spelling = turn_format_of(tokenizer, recipe.agent, codec)
    scripted = scripted_episodes(recipe, codec, 4, Silent())
    turns = [{"input_ids": [1], "labels": [1]}] * 12
    prompts: dict[int, int] = {}
    taught: dict[int, list[list[int]]] = {}
    for recall in (0, 2):
        rows, _ = mix_world_rows(with_world(recipe, recall=recall), scripted, list(turns), spelling, Silent())
        world = rows[len(turns) :]
        taught[recall] = [[label for label in row["labels"] if label != -100] for row in world]
        prompts[recall] = sum(len(row["input_ids"]) for row in world)
    assert taught[0] == taught[2]
    assert prompts[0] < prompts[2]
    spelling.tokenizer.model_max_length = 60
    with pytest.raises(ConfigError, match=r"recall=2 makes rows of up to \d+ tokens, and the model takes 60"):
        mix_world_rows(with_world(recipe, recall=2), scripted, list(turns), spelling, Silent())


def test_refreshes_happen_on_their_turn_and_are_what_is_loaded(run: Path) -> None:
    assert [path.name for path in (run / "world" / "refreshed").iterdir()] == ["1"]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert ["world_loss_view" in line for line in lines] == [False, True, False]
    refreshed = load_file(run / "world" / "refreshed" / "1" / "adapter_model.safetensors")
    loaded = load_world_model(run).model.adapter_parameters("world")  # type: ignore[attr-defined]
    assert all(torch.equal(loaded[key], value) for key, value in refreshed.items())
    before = load_file(run / "world" / "adapter" / "adapter_model.safetensors")
    assert any(not torch.equal(before[key], value) for key, value in refreshed.items())


def test_an_interrupted_run_ends_with_the_same_bits(run: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate_json((run / "recipe.json").read_text())
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    # As it was after its first iteration, the refresh of the second written and not the checkpoint.
    for name in ("result.json", "adapters"):
        path = stopped / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest = max((stopped / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.rmtree(newest)
    train(recipe, stopped, resume=True)
    one, other = adapters_of(run), adapters_of(stopped)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_agents_imagine_in_the_world_model_of_their_run(tmp_path: Path) -> None:
    recipe = with_world(recipe_of(iterations=2, imagination=ImaginationSettings(group=2, horizon=2)))
    done = train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (done / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(any(name.startswith("imagination/") for name in line) for line in lines)
    before = load_file(done / "world" / "adapter" / "adapter_model.safetensors")
    loaded = load_world_model(done).model.adapter_parameters("world")  # type: ignore[attr-defined]
    assert all(torch.equal(loaded[key], value) for key, value in before.items())


def test_a_stage_that_broke_off_is_done_again(run: Path, tmp_path: Path) -> None:
    recipe = with_world(recipe_of(iterations=0))
    plain = train(recipe, tmp_path / "plain")
    broken = tmp_path / "broken"
    shutil.copytree(plain, broken)
    (broken / "world" / "report.json").unlink()
    (broken / "result.json").unlink()
    (broken / "world" / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    train(recipe, broken, resume=True)
    one, other = adapters_of(plain), adapters_of(broken)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_recipes_without_a_world_model_keep_their_key() -> None:
    recipe = recipe_of()
    content = json.loads(Recipe(**{name: getattr(recipe, name) for name in BASIS}).model_dump_json(include=set(BASIS)))
    # What was there before there were codecs, families of starters and bad channels, and nothing else.
    del content["agent"]["codec"], content["starter"]["family"], content["channels"]
    content["adapter"] = None
    content["libraries"] = {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft")}
    content["cuda"] = torch.cuda.is_available()
    wanted = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
    assert warm_key(recipe, "agent_0") == wanted
    assert "world_model" not in content
    assert warm_basis(recipe).world_model is None


def test_the_key_has_what_the_warm_start_reads_of_the_section() -> None:
    recipe = recipe_of()
    held = warm_key(with_world(recipe), "agent_0")
    assert held != warm_key(recipe, "agent_0")
    for changes in ({"share": 0.25}, {"random_episodes": 7}, {"share": 0.0}):
        assert warm_key(with_world(recipe, **changes), "agent_0") != held
    for changes in ({"training": WorldTraining(steps=9)}, {"learner_episodes": 9}, {"refresh_every": 3}):
        other = with_world(recipe, **changes)
        assert warm_key(other, "agent_0") == held
        assert warm_basis(other) == warm_basis(with_world(recipe))
    none = with_world(recipe, share=0.0)
    assert warm_key(none, "x") == warm_key(with_world(recipe, share=0.0, random_episodes=9), "x")


def test_what_cannot_be_is_named(run: Path, tmp_path: Path) -> None:
    named = with_world(recipe_of()).model_copy(update={"adapters": dict.fromkeys(AGENTS, "world")})
    with pytest.raises(ConfigError, match="'world' is the world model's"):
        train(named, tmp_path / "named")
    with pytest.raises(ConfigError, match="not a run folder"):
        load_world_model(tmp_path)
    plain = train(recipe_of(iterations=0), tmp_path / "plain")
    with pytest.raises(ConfigError, match="no world model"):
        load_world_model(plain)
    with pytest.raises(ValueError, match="no range"):
        WorldTraining(own_steps=(3, 2))
    with pytest.raises(ValueError, match="nothing to learn from"):
        WorldTraining(shares={"random": 0.0})
    wrong = with_world(recipe_of(iterations=0), training=WorldTraining(shares={"nobody": 1.0}))
    with pytest.raises((ConfigError, UnknownNameError), match="nobody"):
        train(wrong, tmp_path / "wrong")
