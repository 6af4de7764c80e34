"""Teams whose agents have different bases: they talk in vectors, the one form of message that needs no common words.

Parts: `train_mixed` (every agent's own warm start, then codecs and adapters of all of them together) and `MixedTeam`
(the policies by agent). Only the supervised phase runs over several bases: reinforcement learning through TRL has one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preconcert.agents import GenerativeTeam, SlotsSettings, codec_of, turn_format_of
from preconcert.agents.codecs import LatentCodecSettings
from preconcert.core import ConfigError, UnknownNameError, derive_seed
from preconcert.envs import make_env
from preconcert.models import LatentMethod, LatentSettings, TransformersModel
from preconcert.training.imitation import scripted_episodes
from preconcert.training.json_file import write_json
from preconcert.training.latent_lines import lines_of
from preconcert.training.latent_stage import TEACHER
from preconcert.training.latent_start import LatentStart, Seat, train_latents
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Reporter, Silent
from preconcert.training.run_folder import RESULT, assign, base_of, load_model
from preconcert.training.warm_cache import WarmCache, in_words
from preconcert.training.warm_stage import warm_start

_ASKED = "mixed.json"
"""What was asked for."""


class MixedTeam:
    """The agents of a mixed team, each with a model of its own.

    Args:
        recipes: by agent.
        models: by agent, with an adapter of the agent's name.
        temperature: 0 decides greedily.
    """

    def __init__(
        self, recipes: Mapping[str, Recipe], models: Mapping[str, TransformersModel], temperature: float = 1.0
    ) -> None:
        self.policies: dict[str, GenerativeTeam] = {}
        for agent, recipe in recipes.items():
            language = make_env(recipe.task, recipe.params, 0).language
            self.policies[agent] = GenerativeTeam(models[agent], language, recipe.agent, {agent: agent}, temperature)

    @classmethod
    def load(cls, folder: Path, temperature: float = 1.0) -> MixedTeam:
        """The team that `train_mixed` left.

        Raises:
            ConfigError: it is not finished.
        """
        if not (folder / RESULT).is_file():
            raise ConfigError(f"{str(folder)!r} holds no finished mixed team")
        recipes: dict[str, Recipe] = {}
        models: dict[str, TransformersModel] = {}
        for place in sorted(path for path in folder.iterdir() if (path / "recipe.json").is_file()):
            recipes[place.name] = Recipe.model_validate_json((place / "recipe.json").read_text())
            models[place.name] = load_model(recipes[place.name], place, place / "adapters")
        return cls(recipes, models, temperature)


def train_mixed(
    recipe: Recipe,
    bases: Mapping[str, Mapping[str, Any]],
    out: Path,
    reporter: Reporter | None = None,
    warm_cache: Path | None = None,
) -> Path:
    """Train a team whose agents have different bases to talk in vectors.

    Args:
        recipe: of all agents, with `agent.codec=latent`.
        bases: by agent what is different in its recipe: `model`, `starter`, `lora`, `dtype` or `warm_start`.
        out: the folder; what it has from an interrupted call is gone on with.
        reporter: receives progress.
        warm_cache: shared warm starts.

    Returns:
        The folder: one of each agent's name, with `base/` and `adapters/`.

    Raises:
        ConfigError: the recipe's agents do not talk in vectors, the task has no messages, or the folder holds another
            team.
        UnknownNameError: there is no such agent.
    """
    reporter = reporter or Silent()
    codec = recipe.agent.codec
    if not isinstance(codec, LatentCodecSettings):
        raise ConfigError(f"a mixed team talks in vectors: set agent.codec=latent, not {codec.type}")
    if codec.method is not LatentMethod.LEARNED:
        raise ConfigError(f"agent.codec.method={codec.method.value} sends embeddings, which bases do not share")
    env = make_env(recipe.task, recipe.params, 0, "train")
    if not env.language.message:
        raise ConfigError(f"the task {recipe.task} has no messages")
    for agent, changed in bases.items():
        if agent not in env.agents:
            raise UnknownNameError("agent", agent, env.agents)
        for key in changed:
            if key not in _MAY_DIFFER:
                raise UnknownNameError("key in which bases can differ", key, _MAY_DIFFER)
    asked = {"recipe": recipe.model_dump(mode="json"), "bases": {agent: dict(bases[agent]) for agent in bases}}
    if (out / _ASKED).is_file() and json.loads((out / _ASKED).read_text()) != json.loads(json.dumps(asked)):
        raise ConfigError(f"{str(out)!r} holds a mixed team of another recipe or of other bases")
    if (out / RESULT).is_file():
        return out
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _ASKED, asked)
    cache = WarmCache(warm_cache) if warm_cache is not None else None
    recipes: dict[str, Recipe] = {}
    models: dict[str, TransformersModel] = {}
    shape = LatentSettings(**codec.model_dump(exclude={"type"}))
    for agent in env.agents:
        content = copy.deepcopy(recipe.model_dump(mode="json"))
        content |= {**bases.get(agent, {}), "adapters": "per_agent"}
        recipes[agent] = Recipe.model_validate(content)
        place = out / agent
        place.mkdir(parents=True, exist_ok=True)
        (place / "recipe.json").write_text(recipes[agent].model_dump_json())
        spoken = recipes[agent].model_copy(update={"agent": in_words(recipes[agent].agent)})
        warm_start(spoken, place, env, assign(spoken, env), reporter, cache)
        own = recipes[agent]
        models[agent] = TransformersModel.load(base_of(own, place), own.lora, own.dtype)
        models[agent].load_adapter(agent, place / "warm" / agent)
        models[agent].add_adapter(TEACHER, 0, agent)
        models[agent].add_codec(agent, shape, derive_seed(recipe.seed, "codec", agent))
    words = codec_of(SlotsSettings(), env.language, recipe.agent.spans)
    vectors = codec_of(codec, env.language, recipe.agent.spans)
    episodes = scripted_episodes(recipe, words, max(1, recipe.warm_start.episodes), reporter)
    lines = lines_of(
        episodes,
        {agent: turn_format_of(models[agent].tokenizer, recipe.agent, vectors) for agent in env.agents},
        {agent: turn_format_of(models[agent].tokenizer, recipe.agent, words) for agent in env.agents},
        recipe.agent,
    )
    start = LatentStart({agent: Seat(models[agent], agent, TEACHER) for agent in env.agents}, recipe.latent_start)
    reporter.stage("latent messages", recipe.latent_start.steps)
    log = train_latents(start, lines, derive_seed(recipe.seed, "latents"), reporter)
    for agent in env.agents:
        models[agent].save_adapter(agent, out / agent / "adapters" / agent)
    write_json(out / RESULT, {"log": log, "seed": recipe.seed, "finished": True})
    return out


_MAY_DIFFER = ("model", "starter", "lora", "dtype", "warm_start")
