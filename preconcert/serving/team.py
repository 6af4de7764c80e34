"""A run as sessions need it: its agents on one shared model, and for every session a policy with its own memory."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from preconcert.agents import AgentSettings, ChannelMode, ChannelSettings, GenerativeTeam
from preconcert.agents.planners import PlannerSettings, PlanningTeam
from preconcert.core import ConfigError, TaskLanguage, UnknownNameError, WorldModel
from preconcert.envs import make_env
from preconcert.prompts import TurnFormat
from preconcert.prompts.sized_cache import SizedCache
from preconcert.serving.shared_model import SharedModel
from preconcert.training.recipe import Recipe
from preconcert.training.run_folder import assign
from preconcert.training.world_stage import load_world_model

_LANGUAGES = 32
"""Languages of clients that are kept."""
_LANGUAGE_BYTES = 64 * 2**20
"""Of their texts and compiled grammars, all languages together."""


class ServedTeam:
    """What a service plays with.

    Args:
        model: shared by all sessions.
        task: the team's task.
        params: its parameters.
        agents: how agents read and write.
        assignment: adapter by agent.
        channel: how messages travel.
        world: makes a world model to plan with; None where there is none.

    Raises:
        ConfigError: the channel exchanges messages between episodes, which sessions must not notice of each other.
    """

    def __init__(
        self,
        model: SharedModel,
        task: str,
        params: Mapping[str, Any],
        agents: AgentSettings,
        assignment: Mapping[str, str | None],
        channel: ChannelSettings | None = None,
        world: Callable[[], WorldModel] | None = None,
    ) -> None:
        self.model = model
        self.task = task
        self.params = dict(params)
        self.agents = agents
        self.assignment = dict(assignment)
        self.channel = channel or ChannelSettings()
        self.world = world
        if self.channel.mode is ChannelMode.SHUFFLED:
            raise ConfigError(
                "channel.mode=shuffled exchanges messages between episodes, and sessions are apart; "
                "serve the run with messages=on"
            )
        self.language = make_env(task, self.params, 0, "heldout").language
        self._team = GenerativeTeam(model, self.language, agents, self.assignment)
        self._team.format.longest_kept = model.max_context
        self._others: OrderedDict[TaskLanguage, GenerativeTeam] = OrderedDict()
        self._kept = SizedCache(_LANGUAGE_BYTES)
        self._lock = threading.Lock()

    def policy(
        self,
        temperature: float,
        plan: PlannerSettings | None = None,
        language: TaskLanguage | None = None,
        assignment: Mapping[str, str | None] | None = None,
    ) -> GenerativeTeam | PlanningTeam:
        """A policy for one session.

        Args:
            temperature: 0 decides greedily.
            plan: search in the world model; None does not.
            language: what can be said; None for that of the task.
            assignment: adapter by agent; None for that of the run.

        Raises:
            ConfigError: there is no world model, or the codec of the messages does not fit the language.
            UnknownNameError: an adapter that the model does not have.
        """
        self.check_players(assignment or {})
        team = self._team if language in (None, self.language) else self._speaking(language)
        mine = team.apart(temperature, assignment)
        if plan is None:
            return mine
        if self.world is None:
            raise ConfigError("plan: this run has no world model to plan with; train it with world_model={}")
        if self.agents.codec.type == "latent":
            raise ConfigError("plan: planners imagine messages in words, and the agents of this run talk in vectors")
        return PlanningTeam(mine, self.world(), plan)

    @property
    def format(self) -> TurnFormat:
        """How turns and prompts of the team's own task are written."""
        return self._team.format

    def check_players(self, assignment: Mapping[str, str | None]) -> None:
        """Are these adapters there?

        Raises:
            UnknownNameError: one is not.
        """
        for adapter in assignment.values():
            if adapter is not None and adapter not in self.model.adapters:
                raise UnknownNameError("adapter", adapter, self.model.adapters)

    def adapter_of(self, name: str) -> str | None:
        """Who answers to a name: an agent's adapter, or an adapter itself.

        Raises:
            UnknownNameError: neither.
        """
        if name in self.assignment:
            return self.assignment[name]
        if name in self.model.adapters:
            return name
        raise UnknownNameError("model", name, dict.fromkeys([*self.assignment, *self.model.adapters]))

    def _speaking(self, language: TaskLanguage | None) -> GenerativeTeam:
        """The team on another language."""
        assert language is not None
        with self._lock:
            team = self._others.get(language)
            if team is None:
                team = GenerativeTeam(self.model, language, self.agents, {}, 1.0)
                team.format.cache, team.format.longest_kept = self._kept, self.model.max_context
                self._others[language] = team
                if len(self._others) > _LANGUAGES:
                    self._others.popitem(last=False)
            self._others.move_to_end(language)
            return team


def team_of_run(run: Path, recipe: Recipe, model: SharedModel) -> ServedTeam:
    """A finished run's team.

    Args:
        run: its folder.
        recipe: its recipe, perhaps played otherwise.
        model: the run's base with its adapters; that of the world model is added, where there is one.

    Raises:
        ConfigError: it is no run, or its channel cannot be served.
    """
    env = make_env(recipe.task, recipe.params, 0, "heldout")
    world: Callable[[], WorldModel] | None = None
    if recipe.world_model is not None:
        loaded = load_world_model(run, model)

        def world() -> WorldModel:
            return copy.copy(loaded)  # with a count of its own; everything else never changes

    assignment = assign(recipe, env)
    return ServedTeam(model, recipe.task, recipe.params, recipe.agent, assignment, recipe.channel, world)
