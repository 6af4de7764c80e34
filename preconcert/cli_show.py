"""Commands that show a team at play: an episode, a page, a service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preconcert.cli_options import (
    ApiKey,
    AsJson,
    FallbackRun,
    Greedy,
    Patience,
    Plan,
    PlannerKind,
    PlayOverrides,
    RunFolder,
    WorldModelKind,
    around,
    need_extra,
    planned_with,
)
from preconcert.cli_text import make_console, print_json, quiet
from preconcert.core import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from preconcert.experiments.evaluation import SpecialPlay
    from preconcert.experiments.planned import Planned
    from preconcert.experiments.replay import Replay
    from preconcert.training.recipe import Recipe


def play(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="A finished run's folder; none with --server.", show_default=False),
    ] = None,
    overrides: PlayOverrides = None,
    seed: Annotated[int, typer.Option(min=0, help="Which held-out instance.")] = 0,
    greedy: Greedy = False,
    plan: Plan = False,
    planner: PlannerKind = None,
    model: WorldModelKind = None,
    fallback: FallbackRun = None,
    patience: Patience = None,
    server: Annotated[
        str | None,
        typer.Option("--server", metavar="URL", help="Ask the team of a running `serve`.", show_default=False),
    ] = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """One held-out episode, as people read it."""
    from preconcert.config import load_run, override_play

    if server is not None:
        own = ([] if run is None else [str(run)]) + (overrides or [])
        planned, others = planned_with(plan, planner, model, greedy, own)
        if others:
            raise ConfigError(f"--server plays what it serves; {others[0]!r} goes to `preconcert serve`")
        if fallback is not None or patience is not None:
            raise ConfigError("--server plays the team that it serves; --fallback is for runs in a folder")
        _play_remotely(server, api_key, seed, greedy, planned, as_json)
        return
    if run is None:
        raise ConfigError("play needs a run's folder, or --server URL")
    with quiet():
        from preconcert.experiments.fallback import Fallback
        from preconcert.experiments.terminal import episode_view

        planned, others = planned_with(plan, planner, model, greedy, overrides or [])
        special = around(planned, fallback, patience)
        recipe = override_play(load_run(run), others)
        replay = _replays(run, recipe, [seed], seed, greedy, special)[0]
    if as_json:
        how = None if planned is None else {**planned.settings.model_dump(mode="json"), "model": planned.world.value}
        behind = {"run": str(special.silent), "patience": special.patience} if isinstance(special, Fallback) else None
        channel = recipe.channel.model_dump(mode="json")
        print_json(
            {
                "run": str(run),
                "greedy": greedy,
                "channel": channel,
                "planner": how,
                "fallback": behind,
                **replay.to_json(),
            }
        )
    else:
        console = make_console()
        console.print(episode_view(replay, console.width))


def watch(
    run: RunFolder,
    overrides: PlayOverrides = None,
    episodes: Annotated[int, typer.Option(min=1, max=200, help="How many episodes the page plays.")] = 6,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file; RUN/replay.html if not given.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the task instances, as for `eval`.")] = 0,
    greedy: Greedy = False,
    plan: Plan = False,
    planner: PlannerKind = None,
    model: WorldModelKind = None,
    fallback: FallbackRun = None,
    patience: Patience = None,
) -> None:
    """Write a page that replays held-out episodes; one file that loads nothing."""
    from preconcert.config import load_run, override_play

    with quiet():
        from preconcert.experiments.curve import read_curve
        from preconcert.experiments.evaluation import heldout_specs, no_message_ceiling, saved_evaluation
        from preconcert.experiments.replay import headline, page, write_page

        planned, others = planned_with(plan, planner, model, greedy, overrides or [])
        special = around(planned, fallback, patience)
        held = load_run(run)
        recipe = override_play(held, others)
        seeds = [spec.seed for spec in heldout_specs(recipe, episodes, seed)]
        replays = _replays(run, recipe, seeds, seed, greedy, special)
        ceiling = no_message_ceiling(held)  # beside figures of the run as it was trained
        figures, note = headline(saved_evaluation(run), ceiling)
        params = ", ".join(f"{key} {value}" for key, value in recipe.params.items())
        summary = [
            ("run", str(run)),
            ("model", recipe.model),
            ("agents", ", ".join(replays[0].agents)),
            ("parameters", params or "defaults"),
            ("seed", str(recipe.seed)),
            ("decisions", _decisions(greedy, special)),
            *([("played with", ", ".join(others))] if others else []),
        ]
        curve = read_curve(run / "log.jsonl", ceiling)
        file = out or run / "replay.html"
        try:
            write_page(file, page(f"A team that plays {recipe.task}", summary, figures, note, curve, replays))
        except OSError as error:
            raise ConfigError(f"{str(file)!r} cannot be written: {error.strerror}") from error
    print(file)


def serve(
    run: RunFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Play otherwise, as for `play`; vllm.KEY=VALUE for vLLM.", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    engine: Annotated[str, typer.Option(help="vllm, transformers, or auto: vllm where it is and a GPU too.")] = "auto",
    api_key: ApiKey = None,
    max_sessions: Annotated[int, typer.Option(min=1, help="Open at once.")] = 256,
    idle: Annotated[float, typer.Option(min=1, help="Seconds until a session nobody asks for is closed.")] = 600,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request is told to come again.")] = 120,
    max_context: Annotated[int, typer.Option(min=8, help="Tokens of prompt and answer.")] = 4096,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request.")] = 262_144,
) -> None:
    """Serve a run's team over HTTP: sessions, agents as OpenAI models, and a page to watch."""
    from preconcert.config import load_run, override_play, section

    need_extra("serve", ("fastapi", "uvicorn", "httpx", "prometheus_client"))
    with quiet():
        from preconcert.experiments.live import live_page, live_replay
        from preconcert.models import VLLMSettings
        from preconcert.serving.app import Face
        from preconcert.serving.launch import EngineKind
        from preconcert.serving.launch import serve as carry_out
        from preconcert.serving.settings import ServiceSettings
        from preconcert.serving.team import ServedTeam

        if engine not in list(EngineKind):
            raise UnknownNameError("engine", engine, [kind.value for kind in EngineKind])
        own = [each.removeprefix("vllm.") for each in overrides or [] if each.startswith("vllm.")]
        vllm = section(VLLMSettings, own, "vllm.")
        recipe = override_play(load_run(run), [each for each in overrides or [] if not each.startswith("vllm.")])
        settings = ServiceSettings(
            api_key=api_key,
            max_sessions=max_sessions,
            idle_s=idle,
            timeout_s=timeout,
            max_context=max_context,
            max_body=max_body,
        )

        def face(team: ServedTeam, name: str) -> Face:
            page = live_page(
                team.task, list(team.assignment), team.params, name, team.world is not None, api_key is not None
            )
            return Face(page, live_replay)

        carry_out(run, recipe, settings, face, EngineKind(engine), vllm, host, port)


def _play_remotely(
    url: str, api_key: str | None, seed: int, greedy: bool, planned: Planned | None, as_json: bool
) -> None:
    """`play` with the turns of a service."""
    need_extra("serve", ("httpx",))
    with quiet():
        from preconcert.core import derive_seed
        from preconcert.experiments.replay import replay_of
        from preconcert.experiments.terminal import episode_view
        from preconcert.serving.client import RemoteTeam, ServiceClient
        from preconcert.training.rollout import EpisodeSpec, rollout

        if planned is not None and planned.world.value != "token":
            raise ConfigError(f"--model {planned.world.value} is for runs in a folder; a service plans with its own")
        client = ServiceClient(url, api_key)
        about = client.get("/v1/agents")
        if not isinstance(about, dict) or "task" not in about:
            raise ConfigError(f"what answers at {url} is no preconcert service")
        spec = EpisodeSpec(about["task"], about["params"], seed, "heldout")
        team = RemoteTeam(client, [spec], seed, greedy, None if planned is None else planned.settings)
        try:
            (episode,) = rollout([spec], team, team.channel, derive_seed(seed, "eval"))
        finally:
            team.close()
            client.close()
        replay = replay_of(episode)
    if as_json:
        how = None if planned is None else {**planned.settings.model_dump(mode="json"), "model": planned.world.value}
        channel = team.channel.model_dump(mode="json")
        print_json({"server": url, "greedy": greedy, "channel": channel, "planner": how, **replay.to_json()})
    else:
        console = make_console()
        console.print(episode_view(replay, console.width))


def _decisions(greedy: bool, special: SpecialPlay | None) -> str:
    from preconcert.experiments.fallback import Fallback
    from preconcert.experiments.planned import Planned

    if isinstance(special, Planned):
        return f"planned, {special.settings.type} with the {special.world.value} model"
    how = "greedy" if greedy else "sampled"
    if isinstance(special, Fallback):
        return f"{how}; from step {special.patience} on as {special.silent} where nothing is heard"
    return how


def _replays(
    run: Path, recipe: Recipe, seeds: list[int], seed: int, greedy: bool, special: SpecialPlay | None
) -> list[Replay]:
    """Play held-out instances and lay them out for reading."""
    from preconcert.agents import ChannelMode, FallbackTeam
    from preconcert.experiments.evaluation import Players, heldout_specs, play
    from preconcert.experiments.planned import Planned, WorldKind
    from preconcert.experiments.replay import replay_of
    from preconcert.training.rollout import EpisodeSpec

    players = Players(run, recipe)
    specs = [EpisodeSpec(recipe.task, recipe.params, each, "heldout") for each in seeds]
    if recipe.channel.mode in (ChannelMode.SHUFFLED, ChannelMode.RANDOM):  # they look at the messages of others
        specs += [spec for spec in heldout_specs(recipe, 16, seed) if spec.seed not in seeds]
    if isinstance(special, Planned) and special.world is WorldKind.SHUFFLED:  # nor with answers
        specs += [spec for spec in heldout_specs(recipe, 16, seed) if spec.seed not in {each.seed for each in specs}]
    policy = players.team(greedy) if special is None else special.team(players, run, greedy)
    alone = policy.deaf if isinstance(policy, FallbackTeam) else None
    return [replay_of(each, alone=alone) for each in play(specs, policy, recipe.channel, seed)[: len(seeds)]]
