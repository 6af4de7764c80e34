"""An export loads without this package and says the same; what it is made of is checked while it is made."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from preconcert.agents import GenerativeTeam, codec_of, turn_format_of
from preconcert.core import ConfigError, ModelError
from preconcert.envs import make_env
from preconcert.models import GenerateRequest, ScoreRequest, TransformersModel
from preconcert.prompts import TurnFormat, ebnf
from preconcert.serving.export import export_run
from preconcert.training.recipe import Recipe
from tests.serving.exported import HUB, RECIPES, hub_cache, make_run

HERE = [kind for kind in RECIPES if kind != "hub"]
ADAPTERS = {
    "agents": ["agent_0", "agent_1"],
    "shared": ["team", "world"],
    "league": ["team", "team@1", "team@12"],
    "latent": ["team"],
    "transcript": ["agent_0", "agent_1"],
    "hub": ["agent_0", "agent_1"],
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished run by its kind."""
    root = tmp_path_factory.mktemp("runs-to-export")

    def make(kind: str) -> Path:
        return root / kind if (root / kind).exists() else make_run(kind, root)

    return make


@pytest.fixture(scope="session")
def exports(runs: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The export of each kind of run; the last one's base is on a hub that this process knows nothing of."""
    root = tmp_path_factory.mktemp("exports")
    found = {kind: export_run(runs(kind), root / kind, episodes=2) for kind in HERE}
    environment = hub_cache(root / "home")
    script = (
        "from pathlib import Path; from tests.serving.exported import make_run; from preconcert.cli import app;"
        f"run = make_run('hub', Path({str(root / 'hub-run')!r}));"
        f"app(['export', str(run), '--out', {str(root / 'hub')!r}, '--episodes', '3', '--json'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["base"] == HUB
    return {**found, "hub": root / "hub"}


@pytest.fixture(scope="session")
def strangers(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What transformers and peft alone make of all exports, and what this package makes of them."""
    root = tmp_path_factory.mktemp("strangers")
    jobs = [{**job_of(kind, folder), "kind": kind} for kind, folder in exports.items()]
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-I", str(Path(__file__).with_name("without_preconcert.py")), str(root / "jobs.json")],
        env=dict(hub_cache(root / "home")), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.strip().splitlines()[-1])
    return {job["kind"]: {"job": job, **answer} for job, answer in zip(jobs, answers, strict=True)}


def recipe_of(kind: str) -> Recipe:
    return Recipe.model_validate(RECIPES[kind])


def model_of(kind: str, exports: dict[str, Path], runs: Callable[[str], Path]) -> TransformersModel:
    """The run's model with all adapters, none of them from the export."""
    run = runs(kind) if kind != "hub" else exports[kind].parent / "hub-run" / "hub"
    base = run / "base"
    if not base.is_dir():
        place = run.parent / f"{kind}-base"
        base = place if place.is_dir() else next((run.parents[1] / "home").glob("hub/*/snapshots/*"))
    model = TransformersModel.load(base, recipe_of(kind).lora)
    for name in ADAPTERS[kind]:
        places = [run / "adapters" / name, run / "league" / name, run / name / "adapter"]
        model.load_adapter(name, next(place for place in places if place.is_dir()))
    return model


def format_of(kind: str, tokenizer: Any) -> TurnFormat:
    recipe = recipe_of(kind)
    env = make_env(recipe.task, recipe.params, 0)
    codec = codec_of(recipe.agent.codec, env.language, recipe.agent.spans)
    return turn_format_of(tokenizer, recipe.agent, codec)


def job_of(kind: str, folder: Path) -> dict[str, Any]:
    """First moments of an episode, as chats, and as texts to score."""
    recipe = recipe_of(kind)
    manifest = json.loads((folder / "export.json").read_text())
    tokenizer = "tokenizer" if kind == "hub" else "base"
    turns = format_of(kind, AutoTokenizer.from_pretrained(str(folder / tokenizer)))
    env = make_env(recipe.task, recipe.params, 5, "heldout")
    chats, texts = [], []
    rng = random.Random(0)
    for agent, observation in env.reset().items():
        others = [other for other in env.agents if other != agent]
        chat = turns.chat(agent, observation, (), others)
        chats += [chat, [{"role": "system", "content": agent}, chat[1]]]
        automaton, ids, state = turns.automaton(others, observation.legal_actions), list[int](), 0
        while not automaton.is_final(state):
            ids.append(rng.choice(list(automaton.transitions[state])))
            state = automaton.transitions[state][ids[-1]]
        texts.append({"prompt": turns.prompt_ids(agent, observation, (), others), "completion": ids})
    names = [each["name"] for each in manifest["adapters"]]
    base = manifest["base"]
    return {
        "folder": str(folder), "base": base, "tokenizer": tokenizer, "chats": chats, "texts": texts, "adapters": names,
    }  # fmt: skip


@pytest.mark.parametrize("kind", RECIPES)
def test_strangers_get_the_same_logprobs(
    kind: str, strangers: dict[str, dict[str, Any]], exports: dict[str, Path], runs: Callable[[str], Path]
) -> None:
    """As the run itself has them, in this package's backend."""
    found = strangers[kind]
    model = model_of(kind, exports, runs)
    job = found["job"]
    for text, prompts in zip(job["texts"], zip(*[iter(found["prompts"])] * 2, strict=True), strict=True):
        assert prompts == (list(text["prompt"]),) * 2
    for name in ("", *ADAPTERS[kind]):
        requests = [ScoreRequest(tuple(t["prompt"]), tuple(t["completion"]), name or None) for t in job["texts"]]
        for ours, theirs in zip(model.score(requests), found["scores"][name], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
    assert found["alone"] == [pytest.approx(each, abs=1e-6) for each in found["scores"][ADAPTERS[kind][0]]]
    assert found["scores"][""] != found["scores"][ADAPTERS[kind][0]], "the adapters must matter"


@pytest.mark.parametrize("kind", HERE)
def test_the_cards_code_writes_turns(
    kind: str, strangers: dict[str, dict[str, Any]], exports: dict[str, Path], runs: Callable[[str], Path]
) -> None:
    """Sampled by the card's own lines, and greedily with the tokens of this package's constrained decoding."""
    found = strangers[kind]
    recipe = recipe_of(kind)
    name = ADAPTERS[kind][0]
    model = model_of(kind, exports, runs)
    turns = format_of(kind, model.tokenizer)
    env = make_env(recipe.task, recipe.params, 0, "heldout")
    others, actions = env.agents[1:], env.language.actions
    turns.parse((*turns.encode(found["said"].strip()), turns.eos), others, actions)
    manifest = json.loads((exports[kind] / "export.json").read_text())
    first = next(iter(manifest["agents"].items()))
    assert first == (env.agents[0], name)
    code = (exports[kind] / "README.md").read_text()
    chat = json.loads(code.split("\nchat = ", 1)[1].split("\ninputs = ", 1)[0])
    tokenizer = AutoTokenizer.from_pretrained(str(exports[kind] / "base"))
    prompt = tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
    asked = GenerateRequest(prompt, 0, name, turns.automaton(others, actions), 200, 0.0)
    assert tuple(found["greedy"]) == model.generate([asked])[0].ids


@pytest.mark.parametrize("kind", RECIPES)
def test_what_an_export_holds(kind: str, exports: dict[str, Path]) -> None:
    folder = exports[kind]
    manifest = json.loads((folder / "export.json").read_text())
    assert [each["name"] for each in manifest["adapters"]] == ADAPTERS[kind]
    kinds = {each["name"]: each["kind"] for each in manifest["adapters"]}
    assert kinds.get("world", "world") == "world"
    assert kinds.get("team@1", "league") == "league"
    base = HUB if kind == "hub" else "base"
    assert (folder / "base").is_dir() == (kind != "hub")
    assert not list(folder.glob("**/optimizer*"))
    for name in ADAPTERS[kind]:
        config = json.loads((folder / "adapters" / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == base
        assert bool(config["revision"]) == (kind == "hub")
    assert (folder / "adapters" / "team" / "latent_codec.safetensors").is_file() == (kind == "latent")
    prompts = manifest["prompts"]
    assert prompts["equal"] == prompts["prompts"] or kind == "transcript"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == (HUB if kind == "hub" else None)
    assert ("cannot read" in card.text) == (kind == "latent")
    assert str(folder.parent) not in card.text
    assert str(folder.parent) not in json.dumps(manifest)
    assert "{{" not in card.text
    assert "None" not in card.text
    if kind == "hub":
        assert card.data.eval_results
        assert "trained, sampled, messages shuffled |" in card.text
    else:
        assert "was not evaluated" in card.text
    for agent in manifest["agents"]:
        assert f"`{agent}`" in card.text
    yaml.safe_load(card.data.to_yaml())


def test_an_exported_base_plays_as_the_runs_own(exports: dict[str, Path], runs: Callable[[str], Path]) -> None:
    """The chat template changes nothing where this package reads the base again."""
    recipe = recipe_of("agents")
    env = make_env(recipe.task, recipe.params, 0)
    teams = []
    for folder in (exports["agents"] / "base", runs("agents") / "base"):
        model = TransformersModel.load(folder, recipe.lora)
        teams.append(GenerativeTeam(model, env.language, recipe.agent, dict.fromkeys(env.agents)))
    agent, observation = next(iter(env.reset().items()))
    prompts = {team.format.prompt_ids(agent, observation, (), env.agents[1:]) for team in teams}
    assert len(prompts) == 1


def test_what_stands_in_the_way(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = runs("agents")
    out = tmp_path / "out"
    export_run(run, out, episodes=1)
    before = (out / "export.json").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="already holds an export; use --force"):
        export_run(run, out)
    assert (out / "export.json").stat().st_mtime_ns == before
    export_run(run, out, force=True, episodes=1)
    assert (out / "export.json").stat().st_mtime_ns > before
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.tex").write_text("dear")
    for force in (False, True):
        with pytest.raises(ConfigError, match="is not an export"):
            export_run(run, other, force=force)
    assert (other / "thesis.tex").read_text() == "dear"
    with pytest.raises(ConfigError, match="is a file"):
        export_run(run, other / "thesis.tex")
    half = tmp_path / "half"
    shutil.copytree(run, half)
    (half / "result.json").unlink()
    with pytest.raises(ConfigError, match="not finished"):
        export_run(half, tmp_path / "never")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "mine", "out"]


def test_a_broken_adapter_leaves_nothing_behind(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs("agents"), run)
    file = run / "adapters" / "agent_1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ModelError, match="agent_1"):
        export_run(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("kind", ["agents", "league", "transcript"])
def test_the_grammar_for_vllm_is_the_automaton(kind: str, exports: dict[str, Path]) -> None:
    """Token by token, in the library that vLLM enforces it with; one compiler for all agents, as in a server."""
    xgrammar = pytest.importorskip("xgrammar", reason="comes along with vLLM")
    tokenizer = AutoTokenizer.from_pretrained(str(exports[kind] / "base"))
    turns = format_of(kind, tokenizer)
    env = make_env(recipe_of(kind).task, {}, 0)
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer)))
    rng = random.Random(1)
    for agent in (*env.agents, *env.agents):
        automaton = turns.automaton([other for other in env.agents if other != agent], env.language.actions)
        text = (exports[kind] / "grammars" / f"{agent}.ebnf").read_text()
        assert text == ebnf(automaton, turns.eos)
        table = json.loads((exports[kind] / "grammars" / f"{agent}.json").read_text())
        assert [{int(token): state for token, state in row.items()} for row in table] == list(automaton.transitions)
        compiled = compiler.compile_grammar(text)
        for _ in range(10):
            matcher, state = xgrammar.GrammarMatcher(compiled), 0
            while not automaton.is_final(state):
                mask = xgrammar.allocate_token_bitmask(1, len(tokenizer))
                matcher.fill_next_token_bitmask(mask)
                words = [int(word) & 0xFFFFFFFF for word in mask[0].tolist()]
                allowed = {token for token in range(len(tokenizer)) if words[token // 32] >> (token % 32) & 1}
                wanted = set(automaton.transitions[state])
                # A vocabulary of all bytes has the one that the mark at the end begins with.
                first = {token for token in allowed - wanted if tokenizer.convert_ids_to_tokens(token) == "ô"}
                assert allowed - (first if turns.eos in wanted else set()) == wanted
                token = rng.choice(sorted(wanted))
                assert matcher.accept_token(token)
                state = automaton.transitions[state][token]


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run"):
        export_run(tmp_path, tmp_path / "out")
    assert not any(tmp_path.iterdir())
