"""A run from nothing to a trained team: starter, warm start, gate, reinforcement learning, each resumable.

The run folder:

    recipe.json           the resolved recipe
    base/                 the warm-started base, an ordinary Hugging Face checkpoint (starter runs, method `full`)
    adapters/NAME/        the trained adapters, peft format
    warm/NAME/            the adapters before reinforcement learning
    checkpoints/          TRL checkpoints, each with a completion marker
    published/NAME/       adapters on their way to a sampling engine, while the run goes on
    league/NAME@N/        adapters as they were after N iterations, where there is a league
    episodes.jsonl        every training episode
    log.jsonl             one line per iteration
    world/                the world model's adapter and report, where the recipe has one
    warm_start.json, gate.json, result.json   what each stage found; written when it is over
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import GRPOConfig

from preconcert.agents import GenerativeTeam, codec_of, turn_format_of
from preconcert.core import (
    ConfigError,
    Env,
    TrainingError,
    UnknownNameError,
    WorldModel,
    derive_seed,
    keep_episodes_before,
)
from preconcert.envs import make_env
from preconcert.models import LanguageModel, TransformersModel, build_starter, check_model_name
from preconcert.prompts import starter_words
from preconcert.training.credit import ChainedGAECredit
from preconcert.training.critic import Critic
from preconcert.training.gate import GateResult, check_gate, run_gate
from preconcert.training.grpo import MultiAgentGRPOTrainer, latest_checkpoint
from preconcert.training.imagination import ImaginedIn, Imaginer
from preconcert.training.imitation import scripted_episodes
from preconcert.training.json_file import write_json
from preconcert.training.latent_stage import train_latent_stage
from preconcert.training.league import League, check_scripts, gather, learners_of
from preconcert.training.ppo import MultiAgentPPOTrainer
from preconcert.training.recipe import STARTER, Adapters, Algorithm, Recipe
from preconcert.training.reporter import Reporter, Silent
from preconcert.training.rows import GrammarTable
from preconcert.training.sampler import Engine, Publisher, check_engine, publisher_of, rollout_engine, start_vllm
from preconcert.training.source import GameSource, record_name
from preconcert.training.update import Order
from preconcert.training.warm_cache import WarmCache, warm_basis, warm_key
from preconcert.training.warm_start import WarmStartMethod, fine_tune, supervised_examples
from preconcert.training.world_stage import ADAPTER, WorldRefresh, load_world_model, mix_world_rows, train_stage
from preconcert.world_models import OracleValue, OracleWorldModel, TokenWorldModel

RESULT = "result.json"
PUBLISHED = "published"
"""Where adapters are written on their way to a sampling engine."""
_IMITATOR = "imitator"
"""The adapter that method `lora` trains, until the agents' own are copied from it."""
_IMITATION = "imitation.json"
"""What the supervised phase found, until the adapters stand."""


def train(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    reporter: Reporter | None = None,
    warm_cache: Path | None = None,
) -> Path:
    """Carry a run through all of its stages.

    Args:
        recipe: what to do.
        out: the run folder; made if missing.
        resume: go on with what the folder holds; without it the folder must be empty.
        reporter: receives progress.
        warm_cache: a folder in which runs share their warm starts; the run ends with the same bits as without it.

    Returns:
        The run folder.

    Raises:
        ConfigError: the folder holds another run, or an agent or adapter name is unknown.
        GateError: the warm start is too weak.
    """
    reporter = reporter or Silent()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    rank, world = _process()
    env = make_env(recipe.task, recipe.params, 0, "train")
    assignment = assign(recipe, env)
    _check(recipe, env, assignment)
    check_engine(recipe.rollout, world)
    prepare_folder(recipe, out, resume, rank)
    names = adapter_names(recipe, assignment)
    trainable = tuple(name for name in names if name not in recipe.frozen)
    if (out / RESULT).is_file():
        reporter.say(f"{out} is finished")
        return out
    cache = WarmCache(warm_cache) if warm_cache is not None else None
    _one_at_a_time(rank, world, lambda: warm_start(recipe, out, env, assignment, reporter, cache))
    _one_at_a_time(rank, world, lambda: train_latent_stage(recipe, out, env, assignment, reporter))
    if recipe.world_model is not None:
        _one_at_a_time(rank, world, lambda: train_stage(recipe, out, env, assignment, reporter, cache))
    model = load_model(recipe, out, out / "warm")
    if recipe.grpo.iterations:
        if not trainable:
            raise ConfigError(f"every adapter is frozen: {', '.join(recipe.frozen)}")
        _gate(recipe, out, model, env, assignment, reporter, rank, world)
        warm = {name: out / "warm" / name for name in names}
        base, latents = base_of(recipe, out), recipe.agent.codec.type == "latent"
        with rollout_engine(recipe.rollout, model, base, recipe.dtype, warm, latents, reporter) as players:
            published = out / PUBLISHED / str(rank)
            publisher = publisher_of(recipe.rollout, model, players, trainable, published)
            _reinforce(recipe, out, model, players, publisher, env, assignment, trainable, reporter, rank, world)
        shutil.rmtree(out / PUBLISHED, ignore_errors=True)
    if rank == 0:
        for name in names:
            model.save_adapter(name, out / "adapters" / name)
        write_json(out / RESULT, {"iterations": recipe.grpo.iterations, "seed": recipe.seed, "finished": True})
    return out


def assign(recipe: Recipe, env: Env) -> dict[str, str]:
    """Adapter by agent name.

    Raises:
        ConfigError: an agent, a frozen adapter or a league's script that does not exist.
    """
    if recipe.adapters is Adapters.PER_AGENT:
        assignment = {agent: agent for agent in env.agents}
    elif recipe.adapters is Adapters.SHARED:
        assignment = dict.fromkeys(env.agents, "team")
    else:
        assert isinstance(recipe.adapters, Mapping)
        for agent in recipe.adapters:
            if agent not in env.agents:
                raise UnknownNameError("agent", agent, env.agents)
        missing = [agent for agent in env.agents if agent not in recipe.adapters]
        if missing:
            raise ConfigError(f"adapters: no adapter is named for agent {missing[0]!r}")
        assignment = {agent: recipe.adapters[agent] for agent in env.agents}
    for name in recipe.frozen:
        if name not in assignment.values():
            raise UnknownNameError("adapter", name, sorted(set(assignment.values())))
    if recipe.league is not None:
        recipe.league.sides_of(env.agents)
        check_scripts(env, recipe.league.scripts)
        adapter_names(recipe, assignment)
    return assignment


def _check(recipe: Recipe, env: Env, assignment: Mapping[str, str]) -> None:
    """What can be known to fail before anything is made."""
    if recipe.model != STARTER:
        check_model_name(recipe.model)
    if recipe.world_model is not None and ADAPTER in adapter_names(recipe, assignment):
        raise ConfigError(f"adapter {ADAPTER!r} is the world model's; give the agents' another name")
    imagined = recipe.grpo.imagination
    if imagined is not None and imagined.model is ImaginedIn.WORLD and recipe.world_model is None:
        raise ConfigError("grpo.imagination plays in a world model, and the recipe has no world_model section")
    learning = sum(name not in recipe.frozen for name in assignment.values())
    if recipe.update.order is Order.SEQUENTIAL and learning and recipe.grpo.minibatches % learning:
        raise ConfigError(
            f"update.order=sequential: grpo.minibatches={recipe.grpo.minibatches} is no multiple of the {learning} "
            "agents that learn"
        )


def adapter_names(recipe: Recipe, assignment: Mapping[str, str]) -> tuple[str, ...]:
    """Every adapter that a run makes: those of its agents, and a league's."""
    names = tuple(dict.fromkeys(assignment.values()))
    return names if recipe.league is None else learners_of(recipe.league, names[0])


def prepare_folder(recipe: Recipe, out: Path, resume: bool, rank: int = 0) -> None:
    """Make or check the run folder.

    Raises:
        ConfigError: it holds something and `resume` is off, or it holds a run of another recipe.
    """
    file = out / "recipe.json"
    wanted = json.loads(recipe.model_dump_json())
    if file.is_file():
        if not resume and rank == 0:
            raise ConfigError(f"{str(out)!r} already holds a run; use --resume to go on, --fresh to start over")
        held = json.loads(file.read_text())
        for key in sorted((set(held) | set(wanted)) - {"rollout"}):
            if held.get(key) != wanted.get(key):
                raise ConfigError(
                    f"{str(out)!r} holds a run with {key}={_short(held.get(key))}, "
                    f"the recipe says {_short(wanted.get(key))}"
                )
        if rank == 0 and held.get("rollout") != wanted["rollout"]:  # where the engine is does not make another run
            write_json(file, wanted)
        return
    if resume and rank == 0 and out.exists() and any(out.iterdir()):
        raise ConfigError(f"{str(out)!r} is not a run: it has no recipe.json")
    if not resume and out.is_dir() and any(out.iterdir()) and rank == 0:
        raise ConfigError(f"{str(out)!r} is not empty")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)


def load_recipe_of(run: Path) -> Recipe:
    """The resolved recipe of a run folder.

    Raises:
        ConfigError: it is not a run folder.
    """
    file = run / "recipe.json"
    if not file.is_file():
        raise ConfigError(f"{str(run)!r} is not a run folder: it has no recipe.json")
    return Recipe.model_validate_json(file.read_text())


def load_model(recipe: Recipe, run: Path, adapters: Path) -> TransformersModel:
    """A run's base with the adapters of a folder.

    Args:
        recipe: of the run.
        run: the run folder.
        adapters: `warm` or `adapters` of the run.
    """
    model = TransformersModel.load(base_of(recipe, run), recipe.lora, recipe.dtype)
    for folder in _adapter_folders(run, adapters):
        model.load_adapter(folder.name, folder)
    return model


def load_players(recipe: Recipe, run: Path, adapters: Path) -> LanguageModel:
    """The same on the engine that the recipe's `rollout` names, for playing."""
    if recipe.rollout.engine is Engine.TRANSFORMERS:
        return load_model(recipe, run, adapters)
    folders = _adapter_folders(run, adapters)
    writer = load_model(recipe, run, adapters) if recipe.agent.codec.type == "latent" else None
    model = start_vllm(base_of(recipe, run), recipe.lora, recipe.dtype, recipe.rollout, writer)
    for folder in folders:
        model.load_adapter(folder.name, folder)
    return model


def base_of(recipe: Recipe, run: Path) -> str | Path:
    """The run's own base, or the model that the recipe names."""
    base = run / "base"
    return base if base.is_dir() else recipe.model


def _adapter_folders(run: Path, adapters: Path) -> list[Path]:
    if not adapters.is_dir():
        raise ConfigError(f"the run {str(run)!r} has no {adapters.name!r} folder; is it finished?")
    return sorted(path for path in adapters.iterdir() if path.is_dir() and not path.name.startswith("."))


def warm_start(
    recipe: Recipe,
    out: Path,
    env: Env,
    assignment: Mapping[str, str],
    reporter: Reporter,
    cache: WarmCache | None = None,
) -> dict[str, Any]:
    """Build or load the base, imitate scripted play, and write `warm/` (and `base/`)."""
    marker = out / "warm_start.json"
    if marker.is_file():
        return json.loads(marker.read_text())
    for name in ("warm", "base", _IMITATOR):
        shutil.rmtree(out / name, ignore_errors=True)
    names = adapter_names(recipe, assignment)
    basis = warm_basis(recipe)
    if cache is None:
        imitate(basis, out, env, names[0], reporter)
    else:
        cache.copy(
            warm_key(recipe, names[0]), out, lambda folder: imitate(basis, folder, env, names[0], reporter), reporter
        )
    base = out / "base"
    model = TransformersModel.load(base if base.is_dir() else recipe.model, recipe.lora, recipe.dtype)
    copied = names[0] if (out / _IMITATOR).is_dir() else None
    if copied is not None:
        model.load_adapter(copied, out / _IMITATOR)
    for name in names:
        if name not in model.adapters:
            model.add_adapter(name, derive_seed(recipe.seed, "adapter", name), copied)
        model.save_adapter(name, out / "warm" / name)
    found = json.loads((out / _IMITATION).read_text())
    write_json(marker, found)
    (out / _IMITATION).unlink()
    shutil.rmtree(out / _IMITATOR, ignore_errors=True)
    return found


def imitate(basis: Recipe, folder: Path, env: Env, adapter: str, reporter: Reporter) -> None:
    """The part of the warm start that runs can share: `base/` or `imitator/` in a folder, and what was found.

    Args:
        basis: from `warm_basis`.
        folder: an existing folder.
        env: of the task, for its words.
        adapter: the name that seeds the imitator under method `lora`.
        reporter: receives progress.
    """
    started = time.perf_counter()
    settings = basis.warm_start
    codec = codec_of(basis.agent.codec, env.language, basis.agent.spans)
    episodes = scripted_episodes(basis, codec, max(settings.episodes, 64 if basis.model == STARTER else 0), reporter)
    source = basis.model
    if basis.model == STARTER:
        texts = [turn.observation.text for e in episodes for t in e.trajectories.values() for turn in t.turns]
        texts += [t.final_observation.text for e in episodes for t in e.trajectories.values()]
        digits = basis.world_model is not None
        words = starter_words([*texts, *getattr(env, "words", ())], env.language, env.agents, digits)
        source = str(build_starter(words, folder / "blank", derive_seed(basis.seed, "starter"), basis.starter))
    model = TransformersModel.load(source, basis.lora, basis.dtype)
    log: list[dict[str, float]] = []
    if settings.episodes:
        turn_format = turn_format_of(model.tokenizer, basis.agent, codec)
        examples = supervised_examples(episodes, turn_format, basis.agent)
        examples, settings = mix_world_rows(basis, episodes, examples, turn_format, reporter)
        reporter.stage("warm start", settings.steps)
        callbacks: list[TrainerCallback] = [_Progress(reporter)]
        scratch = folder / "scratch"
        seed = derive_seed(basis.seed, "warm start")
        if settings.method is WarmStartMethod.FULL:
            log = fine_tune(model.base, model.tokenizer, examples, settings, scratch, seed, callbacks)
        else:
            model.add_adapter(adapter, derive_seed(basis.seed, "adapter", adapter))
            log = fine_tune(model.model, model.tokenizer, examples, settings, scratch, seed, callbacks)
            model.save_adapter(adapter, folder / _IMITATOR)
        shutil.rmtree(scratch, ignore_errors=True)
    if settings.episodes and settings.method is WarmStartMethod.FULL:
        _save_base(model, folder / "base")
    elif basis.model == STARTER:
        shutil.copytree(folder / "blank", folder / "base")
    shutil.rmtree(folder / "blank", ignore_errors=True)
    judged = [e.success for e in episodes if e.success is not None]
    found = {
        "episodes": len(episodes),
        "log": log,
        "wall_s": time.perf_counter() - started,
        "script_success": sum(judged) / len(judged) if judged else None,
    }
    write_json(folder / _IMITATION, found)


def _save_base(model: TransformersModel, folder: Path) -> None:
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    model.base.save_pretrained(beside)
    model.tokenizer.save_pretrained(beside)
    os.replace(beside, folder)


def _gate(
    recipe: Recipe,
    out: Path,
    model: TransformersModel,
    env: Env,
    assignment: Mapping[str, str],
    reporter: Reporter,
    rank: int,
    world: int,
) -> None:
    talks = recipe.agent.spans.say and bool(env.language.message)
    if not talks:
        return
    marker = out / "gate.json"
    if not marker.is_file() and rank == 0:
        reporter.stage("gate", 1)
        team = GenerativeTeam(model, env.language, recipe.agent, assignment)
        result = run_gate(recipe, team)
        reporter.advance(1)
        write_json(marker, {**asdict(result), "gap": result.gap, "passed": result.passed})
    _barrier(world)
    held = json.loads(marker.read_text())
    result = GateResult(held["success"], held["shuffled"], recipe.gate.min_gap, held["episodes"])
    if result.success is None or result.shuffled is None:
        reporter.say("gate: episodes have no success to judge the use of messages by")
        return
    reporter.say(
        f"gate: warm start {result.success:.2f}, with shuffled messages {result.shuffled:.2f}, "
        f"gap {result.success - result.shuffled:.2f} (needs {result.min_gap:.2f})"
    )
    check_gate(result)


def _reinforce(
    recipe: Recipe,
    out: Path,
    model: TransformersModel,
    players: LanguageModel,
    publisher: Publisher | None,
    env: Env,
    assignment: Mapping[str, str],
    trainable: tuple[str, ...],
    reporter: Reporter,
    rank: int,
    world: int,
) -> None:
    settings = recipe.grpo
    checkpoints = out / "checkpoints"
    held = latest_checkpoint(checkpoints)
    begin = held[1] if held is not None else 0
    keep_episodes_before(out / record_name(rank), begin)
    if rank == 0:
        _keep_log_before(out / "log.jsonl", begin)
    _barrier(world)
    table = GrammarTable()
    team = GenerativeTeam(players, env.language, recipe.agent, assignment, settings.temperature)
    critic = make_critic(recipe, out, model, env, trainable) if recipe.algorithm is Algorithm.PPO else None
    values = critic.values if critic is not None else None
    folder = out if recipe.keep_episodes else None
    league = make_league(recipe, out, model, env, team, rank, world) if recipe.league is not None else None
    if league is not None and held is None:
        league.clear()
    refresh, own = _own_world(recipe, out, model, begin, world)
    imaginer = make_imaginer(recipe, team, trainable, own)
    source = GameSource(
        recipe,
        team,
        table,
        frozenset(trainable),
        folder,
        rank,
        world,
        refresh,
        values=values,
        league=league,
        imaginer=imaginer,
        publisher=publisher,
    )
    reporter.stage("reinforcement learning", settings.iterations)
    reporter.advance(begin)
    reference = None
    if settings.beta and recipe.warm_start.method is WarmStartMethod.LORA:
        reference = "reference"
        model.add_adapter(reference, 0, trainable[0])
        for name in trainable[1:]:
            if held is None and not _same(model, name, trainable[0]):
                raise TrainingError("beta needs one warm start for all adapters")
    options: dict[str, Any] = {
        "callbacks": [_IterationLog(out / "log.jsonl", reporter, rank)],
        "update": recipe.update,
        "agents": tuple(agent for agent, name in assignment.items() if name in trainable),
        "entropy_end": settings.entropy_end,
    }
    kind: type[MultiAgentGRPOTrainer] = MultiAgentGRPOTrainer
    if critic is not None:
        kind, options["critic"] = MultiAgentPPOTrainer, critic
    trainer = kind(
        model.model,
        model.tokenizer,
        grpo_config(recipe, checkpoints, world),
        source,
        trainable,
        table,
        settings.hindsight_weight,
        reference,
        **options,
    )
    try:
        trainer.train(resume_from_checkpoint=str(held[0]) if held is not None else None)
    finally:
        source.close()
    model.base.eval()


def _own_world(
    recipe: Recipe, out: Path, model: TransformersModel, begin: int, world: int
) -> tuple[WorldRefresh | None, TokenWorldModel | None]:
    """What keeps the world model up to date, and the model itself; None where reinforcement learning needs neither."""
    imagined = recipe.grpo.imagination
    if recipe.world_model is not None and recipe.world_model.refresh_every:
        if world > 1:
            raise ConfigError("world_model.refresh_every is for runs of one process: rollouts are not shared for it")
        refresh = WorldRefresh(recipe, out, model, begin)
        return refresh, refresh.world
    if imagined is not None and imagined.model is ImaginedIn.WORLD:
        return None, load_world_model(out, model)
    return None, None


def make_league(
    recipe: Recipe, out: Path, model: TransformersModel, env: Env, team: GenerativeTeam, rank: int = 0, world: int = 1
) -> League:
    """The league that a recipe asks for, without a past."""
    if recipe.league is None:
        raise ConfigError("the recipe has no league")
    main = next(iter(assign(recipe, env).values()))
    exchange = gather if world > 1 else None
    return League(recipe.league, env, model, team, main, out, recipe.seed, rank, exchange)


def make_imaginer(
    recipe: Recipe, team: GenerativeTeam, trainable: Collection[str], model: WorldModel | None
) -> Imaginer | None:
    """Who lets the agents play on as a recipe asks for; None where it does not.

    Args:
        recipe: whose `grpo.imagination` counts.
        team: whose agents.
        trainable: the adapters that learn.
        model: the recipe's world model, if it has one.

    Raises:
        ConfigError: it wants to imagine in a world model and has none.
    """
    settings = recipe.grpo.imagination
    if settings is None:
        return None
    if settings.model is ImaginedIn.ORACLE:
        value = OracleValue.ROLLOUT if settings.value else OracleValue.NONE
        return Imaginer(settings, team, OracleWorldModel(team, value), trainable, oracle=True)
    if model is None:
        raise ConfigError("grpo.imagination plays in a world model, and the recipe has no world_model section")
    return Imaginer(settings, team, model, trainable)


def make_critic(
    recipe: Recipe, out: Path, model: TransformersModel, env: Env, learners: Collection[str] | None = None
) -> Critic:
    """The critic that a recipe asks for, fresh."""
    credit = recipe.grpo.credit
    base = out / "base"
    return Critic(
        model,
        env.agents,
        recipe.critic,
        derive_seed(recipe.seed, "critic"),
        base if base.is_dir() else recipe.model,
        acted=isinstance(credit, ChainedGAECredit),
        per_token=getattr(credit, "level", "turn") == "token",
        learners=learners,
    )


def grpo_config(recipe: Recipe, checkpoints: Path, world: int = 1) -> GRPOConfig:
    """TRL's config for a recipe."""
    settings = recipe.grpo
    per_iteration = settings.minibatches * settings.epochs // settings.accumulate
    cuda = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=str(checkpoints),
        max_steps=settings.iterations * per_iteration,
        per_device_train_batch_size=2,
        num_generations=2,
        steps_per_generation=settings.minibatches,
        gradient_accumulation_steps=settings.accumulate,
        num_iterations=settings.epochs,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=settings.warmup_iterations * per_iteration,
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        epsilon=settings.clip_low,
        epsilon_high=settings.clip_high,
        beta=settings.beta,
        entropy_coef=settings.entropy,
        loss_type=settings.loss,
        temperature=settings.temperature,
        max_completion_length=recipe.agent.max_tokens,
        logging_steps=per_iteration,
        save_strategy="steps",
        save_steps=settings.checkpoint_every * per_iteration,
        save_total_limit=2,
        report_to=settings.report_to,
        use_cpu=not cuda,  # without it, processes on a CPU do not find each other and train apart
        bf16=cuda and recipe.dtype == "bfloat16",
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        seed=derive_seed(recipe.seed, "trainer") % 2**31,
        ignore_data_skip=False,  # with True, the random state is put back too early within a pass over the data
        disable_tqdm=True,
        remove_unused_columns=False,
        shuffle_dataset=False,
        log_completions=False,
        ddp_find_unused_parameters=True if world > 1 else None,
    )


class _Progress(TrainerCallback):
    """Tells the reporter how far the supervised phase is."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step over."""
        last = state.log_history[-1].get("loss") if state.log_history else None
        self.reporter.advance(state.global_step, f"loss {last:.3f}" if last is not None else "")


class _IterationLog(TrainerCallback):
    """Appends one line per iteration to the run's log."""

    def __init__(self, path: Path, reporter: Reporter, rank: int) -> None:
        self.path = path
        self.reporter = reporter
        self.rank = rank

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """TRL's and our metrics together."""
        if not logs or ("success" not in logs and "return" not in logs):
            return
        per_iteration = args.logging_steps
        line = {"iteration": state.global_step // int(per_iteration) - 1, "step": state.global_step, **logs}
        if self.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        shown = "success" if "success" in logs else "return"
        self.reporter.advance(line["iteration"] + 1, f"{shown} {logs[shown]:.2f}")


def _keep_log_before(path: Path, iteration: int) -> None:
    if not path.is_file():
        return
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a torn last line
        if line["iteration"] < iteration:
            lines.append(text + "\n")
    beside = path.with_name(path.name + ".new")
    beside.write_text("".join(lines))
    os.replace(beside, path)


def _same(model: TransformersModel, first: str, second: str) -> bool:
    a, b = model.adapter_parameters(first), model.adapter_parameters(second)
    return all(torch.equal(a[key], b[key]) for key in a)


def _process() -> tuple[int, int]:
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _barrier(world: int) -> None:
    """Wait for all processes. The group is made here, since `accelerate` makes none on a CPU unless told to."""
    if world > 1:
        if not torch.distributed.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
        torch.distributed.barrier()


def _one_at_a_time(rank: int, world: int, work: Any) -> None:
    """Rank 0 works, the others wait. Its trainer must not find out about them, or it would wait for them in turn."""
    if rank == 0:
        hidden = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
        try:
            work()
        finally:
            os.environ.update(hidden)
    _barrier(world)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
