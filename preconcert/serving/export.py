"""A finished run as a folder that vLLM, peft and transformers load without this package.

    README.md             the model card
    base/                 the base model with its tokenizer, where the hub does not have it
    tokenizer/            the tokenizer alone, where the hub has the base
    grammars/AGENT.*      what its turns can be: as a table of tokens, and in the notation that vLLM takes
    adapters/NAME/        peft's format; with `latent_codec.*` where agents talk in vectors
    export.json           what was exported, and how prompts were checked

The tokenizer's chat template writes the prompts that the team was trained on (`prompts/chat_template.py`). That is
tried out on real episodes with the exported files, and the export fails where one token differs. Attention heads that
are too small for vLLM are put into larger ones that compute the same. Parts: `check_export`,
`export_run` and `check_prompts`. The card, and the record that it is written from, are in `model_card.py`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

from preconcert import __version__
from preconcert.agents import Context, GenerativeTeam
from preconcert.core import ConfigError, Env, Episode, ModelError, Move, SpanKind, Turn, derive_seed
from preconcert.envs import make_env
from preconcert.models import GenerateRequest, TransformersModel
from preconcert.models.vllm_heads import HeadFit
from preconcert.prompts import TurnFormat, chat_template, ebnf, turn_pieces
from preconcert.serving.model_card import Export, ExportedAdapter, Kind, Spoken, model_card
from preconcert.training.json_file import write_json
from preconcert.training.league import FOLDER as LEAGUE
from preconcert.training.measures import measure
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter, Silent
from preconcert.training.rollout import EpisodeSpec, rollout
from preconcert.training.run_folder import RESULT, assign, base_of, load_model, load_recipe_of
from preconcert.training.world_stage import ADAPTER as WORLD
from preconcert.training.world_stage import load_world_model

MANIFEST = "export.json"
EPISODES = 16
"""Held-out episodes that prompts are checked on."""
_NOT_COPIED = ("optimizer", "scheduler", "rng_state", "training_args", "trainer_state", "README", ".")
"""Beginnings of files that a checkpoint's folder may hold besides the model."""
_WEIGHTS = (".safetensors", ".bin")
_DESCRIBES = (".json", ".jinja", ".txt", ".model", ".py")


def export_run(
    run: Path,
    out: Path,
    evaluation: Mapping[str, Any] | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
    episodes: int = EPISODES,
) -> Path:
    """Write the folder beside its place and rename it.

    Args:
        run: a finished run's folder.
        out: where the export goes.
        evaluation: what `preconcert eval --json` prints of the run; None leaves the table out.
        force: replace an export that is there.
        reporter: receives progress.
        episodes: how many held-out ones are played, to check prompts on; the first is the card's example.

    Returns:
        The folder.

    Raises:
        ConfigError: the run is not finished, or something stands in the folder's place.
        ModelError: a model or an adapter cannot be read, or the template does not write the team's prompts.
    """
    reporter = reporter or Silent()
    recipe = load_recipe_of(run)
    check_export(run, out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        found = _write(run, recipe, beside, reporter, episodes)
        (beside / "README.md").write_text(model_card(found, evaluation), encoding="utf-8")
        write_json(beside / MANIFEST, _manifest(found))
        beside.chmod(0o755)
        _put(beside, out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return out


def check_export(run: Path, out: Path, force: bool = False) -> None:
    """What can be known to fail before anything is done; arguments and errors as in `export_run`."""
    if not (run / RESULT).is_file():
        raise ConfigError(f"the run {str(run)!r} is not finished: it has no {RESULT}")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ConfigError(f"{str(out)!r} is a file; an export needs a folder")
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"{str(out)!r} is not an export: it has no {MANIFEST}; nothing was written")
    if not force:
        raise ConfigError(f"{str(out)!r} already holds an export; use --force to replace it")


def _put(beside: Path, out: Path) -> None:
    if not out.exists():
        os.replace(beside, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    os.replace(out, old)  # an empty folder is replaced
    os.replace(beside, out)
    shutil.rmtree(old)


def _write(run: Path, recipe: Recipe, folder: Path, reporter: Reporter, count: int) -> Export:
    """Everything but the card and the manifest."""
    reporter.stage("export", 4)
    env = make_env(recipe.task, recipe.params, 0, "heldout")
    assignment = assign(recipe, env)
    model = load_model(recipe, run, run / "adapters")
    team = GenerativeTeam(model, env.language, recipe.agent, assignment)
    source = base_of(recipe, run)
    hub = not Path(source).expanduser().is_dir()
    tokenizer_folder = "tokenizer" if hub else "base"
    base = str(source) if hub else "base"
    fit, refused = _head_fit(model, hub)
    if not hub:
        _copy_checkpoint(Path(source).expanduser(), folder / "base")
    if fit is not None:
        fit.checkpoint(folder / "base", folder / "refitted")
        shutil.rmtree(folder / "base")
        os.replace(folder / "refitted", folder / "base")
    dressed = copy.deepcopy(model.tokenizer)
    dressed.chat_template = chat_template(team.format, env.agents, recipe.agent.context is Context.TRANSCRIPT)
    dressed.save_pretrained(folder / tokenizer_folder)
    longest = _write_grammars(team.format, env, folder / "grammars")
    _generation_config(model, longest).save_pretrained(folder / tokenizer_folder)
    reporter.advance(1, "base and tokenizer")
    adapters = _adapters(run, recipe, assignment, folder / "adapters", fit)
    for adapter in adapters:
        file = folder / "adapters" / adapter.name / "adapter_config.json"
        _name_base(file, base, _revision(base) if hub else None)
    reporter.advance(2, "adapters")
    seeds = [derive_seed(0, "eval", number) % 2**31 for number in range(count)]  # those that `preconcert eval` plays
    episodes = _play(team, recipe, seeds)
    loose = recipe.agent.model_copy(update={"constrained": False})
    free = _play(GenerativeTeam(model, env.language, loose, assignment), recipe, seeds)
    reporter.advance(3, "episodes")
    again = AutoTokenizer.from_pretrained(str(folder / tokenizer_folder))
    checked = check_prompts(team.format, again, episodes, recipe)
    reporter.advance(4, "prompts")
    shape, words = _grammar(team.format, env)
    return Export(
        run=run.resolve().name,
        recipe=recipe,
        agents=assignment,
        adapters=adapters,
        base=base,
        tokenizer=tokenizer_folder,
        hub=hub,
        refitted=fit is not None,
        refused=refused,
        longest=longest,
        shape=shape,
        words=words,
        about=" ".join((type(env).__doc__ or "").split("\n\n")[0].split()),
        seed=seeds[0],
        example=_example(team, episodes[0]),
        world=_world(run, recipe, model, episodes[0]),
        checked=checked,
        free=measure(free, env.language, recipe.agent.spans),
        constrained=measure(episodes, env.language, recipe.agent.spans),
    )


def _copy_checkpoint(source: Path, folder: Path) -> None:
    """The files of a checkpoint; without those that only training reads, and without a second format of weights."""
    files = [file for file in sorted(source.iterdir()) if file.is_file() and not file.name.startswith(_NOT_COPIED)]
    formats = [suffix for suffix in _WEIGHTS if any(file.suffix == suffix for file in files)]
    _copy_files([file for file in files if file.suffix in _DESCRIBES or file.suffix == formats[0]], folder)


def _copy_files(files: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in files:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def _generation_config(model: TransformersModel, longest: int) -> GenerationConfig:
    """How turns are sampled in the run: from the whole distribution, at temperature 1. Engines take it as default."""
    held = model.base.generation_config
    ends: dict[int, None] = {}
    for value in (model.tokenizer.eos_token_id, getattr(held, "eos_token_id", None)):
        if value is not None:
            ends.update(dict.fromkeys([value] if isinstance(value, int) else value))
    known = list(ends)
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=longest,
        eos_token_id=known[0] if len(known) == 1 else known,
        pad_token_id=model.tokenizer.pad_token_id,
    )


def _write_grammars(format: TurnFormat, env: Env, folder: Path) -> int:
    """Every agent's turns, with all of the task's actions: by state, the tokens that may come and the states that they
    lead to; and the same in EBNF.

    Returns:
        How many tokens the longest turn has.
    """
    folder.mkdir()
    longest = 0
    for agent in env.agents:
        automaton = format.automaton([other for other in env.agents if other != agent], env.language.actions)
        longest = max(longest, automaton.longest)
        write_json(folder / f"{agent}.json", [dict(row) for row in automaton.transitions])
        (folder / f"{agent}.ebnf").write_text(ebnf(automaton, format.eos), encoding="utf-8")
    return longest


def _grammar(format: TurnFormat, env: Env) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The form of the first agent's turn, and the words for each of its places."""
    shape, words = "", dict[str, tuple[str, ...]]()
    actions = env.language.actions
    compact = format.compact
    for piece in turn_pieces(format.language, format.spans, env.agents[1:], actions, compact, format.speech):
        if piece.kind is None:
            shape += piece.options[0] + (" " if compact else "")
            continue
        acts = piece.kind in (SpanKind.INTEND, SpanKind.ACT)
        place = "ACTION" if acts else f"{piece.kind.value}.{piece.slot}".upper()
        words[place] = actions if acts else piece.options
        shape += f"{place} " if compact else f" {place};"
    return shape.strip(), words


def _revision(name: str) -> str | None:
    """The hub's commit that was loaded, where its cache knows."""
    file = cached_file(name, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    return Path(file).parent.name if file else None


def _head_fit(model: TransformersModel, hub: bool) -> tuple[HeadFit | None, str | None]:
    """What is to be done to the attention heads for vLLM; where nothing can be done about them, why it refuses."""
    try:
        fit = HeadFit.of(model.base.config)
    except ModelError as error:
        return None, str(error)
    if fit is not None and hub:
        return None, f"its attention heads of {fit.size} numbers are smaller than the {fit.larger} that it begins at"
    return fit, None


def _name_base(file: Path, base: str, revision: str | None) -> None:
    """Say in an adapter's configuration which model it is for."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    config["revision"] = revision
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _adapters(
    run: Path, recipe: Recipe, assignment: Mapping[str, str], folder: Path, fit: HeadFit | None
) -> tuple[ExportedAdapter, ...]:
    """Copy all adapters of a run, refitted to the base's heads where those were."""
    sources = {path.name: path for path in _folders(run / "adapters")}
    sources |= {path.name: path for path in _folders(run / LEAGUE)}
    if recipe.world_model is not None:
        refreshed = sorted(_folders(run / "world" / "refreshed"), key=lambda path: int(path.name))
        sources[WORLD] = refreshed[-1] if refreshed else run / "world" / "adapter"
    found: list[ExportedAdapter] = []
    for name, source in sources.items():
        target = folder / name
        if fit is not None:
            fit.adapter(source, target)
        else:
            _copy_files(sorted(source.iterdir()), target)
        for each in target.iterdir():
            each.chmod(0o644)
        agents = tuple(agent for agent, adapter in assignment.items() if adapter == name)
        kind = Kind.AGENT if agents else Kind.WORLD if name == WORLD else Kind.LEAGUE
        found.append(ExportedAdapter(name, kind, agents, (target / "latent_codec.json").is_file()))
    return tuple(found)


def _folders(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _play(team: GenerativeTeam, recipe: Recipe, seeds: Sequence[int]) -> list[Episode]:
    specs = [EpisodeSpec(recipe.task, recipe.params, seed, "heldout") for seed in seeds]
    return rollout(specs, team, recipe.channel, derive_seed(0, "eval"))


def check_prompts(
    format: TurnFormat, tokenizer: Any, episodes: Sequence[Episode], recipe: Recipe
) -> dict[str, int]:
    """Compare what the tokenizer's template makes of chats with what the team really read.

    Args:
        format: that the team writes with.
        tokenizer: of the export.
        episodes: of the team.
        recipe: of the run. In transcripts only first turns must be equal: later ones hold text that was tokenised
            again. Prompts with vectors are compared without them.

    Raises:
        ModelError: a prompt that must be equal is not.
    """
    compared = equal = 0
    transcript = recipe.agent.context is Context.TRANSCRIPT
    vectors = bool(format.speech.vectors)
    for episode in episodes:
        for agent, trajectory in episode.trajectories.items():
            chat: list[Mapping[str, str]] = []
            for number, turn in enumerate(trajectory.turns):
                chat = _chat(format, episode, agent, trajectory.turns[: number + 1], transcript, chat)
                ids = tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
                compared += 1
                equal += ids == turn.prompt_ids
                if ids != turn.prompt_ids and not vectors and not (transcript and number):
                    raise ModelError(
                        f"the export's chat template does not write the prompt of {agent!r} in step {turn.step} of "
                        f"{episode.task} {episode.seed}: {tokenizer.decode(ids)!r} for "
                        f"{tokenizer.decode(turn.prompt_ids)!r}"
                    )
    return {"prompts": compared, "equal": equal}


def _chat(
    format: TurnFormat,
    episode: Episode,
    agent: str,
    turns: Sequence[Turn],
    transcript: bool,
    before: Sequence[Mapping[str, str]] = (),
) -> list[Mapping[str, str]]:
    """A request for the last of an agent's turns; `before` is that for the one before it."""
    others = [other for other in episode.trajectories if other != agent]
    turn = turns[-1]
    inbox = () if format.speech.vectors else turn.inbox
    memory = [] if transcript else [each.action for each in turns[:-1]]
    seen = format.chat(agent, turn.observation, inbox, others, memory)[1]
    if transcript and before:
        return [*before, {"role": "assistant", "content": format.text(turns[-2].completion_ids)}, seen]
    return [{"role": "system", "content": agent}, seen]


def _example(team: GenerativeTeam, episode: Episode, steps: int = 2) -> tuple[Spoken, ...]:
    """The first steps of an episode."""
    found: list[Spoken] = []
    for step in range(min(steps, episode.steps)):
        for agent, trajectory in episode.trajectories.items():
            turn = trajectory.turns[step]
            chat: list[Mapping[str, str]] = []
            if not (step and team.settings.context is Context.TRANSCRIPT):
                chat = _chat(team.format, episode, agent, trajectory.turns[: step + 1], False)
            prompt = team.model.tokenizer.decode(list(turn.prompt_ids))
            adapter = turn.adapter or team.assignment[agent] or ""
            found.append(Spoken(agent, adapter, tuple(chat), prompt, team.format.text(turn.completion_ids)))
    return tuple(found)


def _world(run: Path, recipe: Recipe, model: TransformersModel, episode: Episode) -> Spoken | None:
    """What the world model makes of the first step of an episode, taking what is likeliest."""
    if recipe.world_model is None:
        return None
    world = load_world_model(run, model)
    agent, trajectory = next(iter(episode.trajectories.items()))
    turn = trajectory.turns[0]
    others = tuple(other for other in episode.trajectories if other != agent)
    words = turn.message.payload if turn.message is not None else None
    move = Move(turn.action, words, {other: episode.trajectories[other].turns[0].action for other in others})
    prompt = world.format.prompt_ids(agent, turn.observation, turn.inbox, others, (), move)
    automaton = world.format.automaton(others, ())
    asked = GenerateRequest(prompt, 0, WORLD, automaton, 192, 0.0)
    (answer,) = model.generate([asked])
    tokenizer = model.tokenizer
    return Spoken(agent, WORLD, (), tokenizer.decode(list(prompt)), world.format.turns.text(answer.ids))


def _manifest(found: Export) -> dict[str, Any]:
    recipe = found.recipe
    return {
        "preconcert": __version__,
        "run": found.run,
        "task": recipe.task,
        "params": dict(recipe.params),
        "seed": recipe.seed,
        "base": found.base,
        "agents": dict(found.agents),
        "adapters": [asdict(each) for each in found.adapters],
        "agent": recipe.agent.model_dump(mode="json"),
        "channel": recipe.channel.model_dump(mode="json"),
        "prompts": dict(found.checked),
        "without_the_grammar": {"episodes": found.free.episodes, "malformed_rate": found.free.malformed_rate},
    }
