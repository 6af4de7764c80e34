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
    message_check.json    values of messages against the real ablation, where they are trained on
    warm_start.json, gate.json, result.json   what each stage found; written when it is over
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import GRPOConfig

from preconcert.agents import GenerativeTeam
from preconcert.core import (
    ConfigError,
    Env,
    TrainingError,
    WorldModel,
    derive_seed,
    keep_episodes_before,
)
from preconcert.envs import make_env
from preconcert.models import LanguageModel, TransformersModel
from preconcert.training.checkpoint_marker import latest_checkpoint
from preconcert.training.credit import ChainedGAECredit
from preconcert.training.critic import Critic
from preconcert.training.gate import GateResult, check_gate, run_gate
from preconcert.training.grpo import MultiAgentGRPOTrainer
from preconcert.training.imagination import ImaginedIn, Imaginer, valued_oracle
from preconcert.training.json_file import write_json
from preconcert.training.latent_stage import train_latent_stage
from preconcert.training.league import League, gather
from preconcert.training.message_credit import CHECK, MessageCredit, passed
from preconcert.training.ppo import MultiAgentPPOTrainer
from preconcert.training.preflight import check_run
from preconcert.training.recipe import Algorithm, Recipe
from preconcert.training.reporter import Reporter, Silent
from preconcert.training.rows import GrammarTable
from preconcert.training.run_folder import RESULT, adapter_names, assign, base_of, load_model, prepare_folder
from preconcert.training.sampler import Publisher, check_engine, publisher_of, rollout_engine
from preconcert.training.source import GameSource, record_name
from preconcert.training.warm_cache import WarmCache
from preconcert.training.warm_stage import warm_start
from preconcert.training.warm_start import WarmStartMethod
from preconcert.training.world_stage import WorldRefresh, load_world_model, train_stage
from preconcert.world_models import OracleWorldModel, TokenWorldModel

PUBLISHED = "published"
"""Where adapters are written on their way to a sampling engine."""


def check_begin(recipe: Recipe) -> tuple[Env, dict[str, str]]:
    """Refuse a run that cannot begin here, as far as that is known without a folder.

    Returns:
        An environment of its task, and the adapters by agent.

    Raises:
        ConfigError: as `check_run` and `check_engine` say.
        ModelError: no such model.
    """
    env = make_env(recipe.task, recipe.params, 0, "train")
    assignment = assign(recipe, env)
    check_run(recipe, env, assignment)
    check_engine(recipe.rollout, _process()[1])
    return env, assignment


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
    env, assignment = check_begin(recipe)
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
    worth = make_message_credit(recipe, team, trainable, own, world)
    checked = passed(out / CHECK)
    _barrier(world)
    if worth is not None and not checked:
        reporter.stage("values of messages against the world", 1)
        found = worth.check(recipe.task, recipe.params, recipe.channel, out / CHECK if rank == 0 else None)
        reporter.say(f"values of messages: rank correlation with the real ablation {found.correlation:.2f}")
        _barrier(world)
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
        worth=worth,
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
        "speech_weight": settings.speech_weight,
        "codec_lr": settings.codec_lr,
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
    valued = recipe.grpo.message_credit
    if any(each is not None and each.model is ImaginedIn.WORLD for each in (imagined, valued)):
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
        oracle = valued_oracle(team) if settings.value else OracleWorldModel(team)
        return Imaginer(settings, team, oracle, trainable, oracle=True)
    if model is None:
        raise ConfigError("grpo.imagination plays in a world model, and the recipe has no world_model section")
    return Imaginer(settings, team, model, trainable)


def make_message_credit(
    recipe: Recipe, team: GenerativeTeam, trainable: Collection[str], model: WorldModel | None, world: int = 1
) -> MessageCredit | None:
    """Who values messages as a recipe asks for; None where it does not.

    Args:
        recipe: whose `grpo.message_credit` counts.
        team: whose agents.
        trainable: the adapters that learn.
        model: the recipe's world model, if it has one.
        world: number of processes.

    Raises:
        ConfigError: it wants to imagine in a world model and has none.
    """
    settings = recipe.grpo.message_credit
    if settings is None:
        return None
    if settings.model is ImaginedIn.ORACLE:
        model = valued_oracle(team)
    if model is None:
        raise ConfigError("grpo.message_credit imagines in a world model, and the recipe has no world_model section")
    return MessageCredit(settings, team, model, trainable, recipe.seed, world)


def make_critic(
    recipe: Recipe, out: Path, model: TransformersModel, env: Env, learners: Collection[str] | None = None
) -> Critic:
    """The critic that a recipe asks for, fresh."""
    credit = recipe.grpo.credit
    return Critic(
        model,
        env.agents,
        recipe.critic,
        derive_seed(recipe.seed, "critic"),
        base_of(recipe, out),
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
