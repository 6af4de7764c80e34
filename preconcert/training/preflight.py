"""What of a run can be known to fail before anything is made: `check_run`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from preconcert.agents import codec_of
from preconcert.core import ConfigError, Env
from preconcert.models import check_model_name
from preconcert.training.imagination import ImaginedIn, check_memory
from preconcert.training.message_price import check_price
from preconcert.training.recipe import STARTER, Recipe
from preconcert.training.run_folder import adapter_names
from preconcert.training.update import Order
from preconcert.training.world_stage import ADAPTER


def check_run(recipe: Recipe, env: Env, assignment: Mapping[str, str]) -> None:
    """Refuse what could only fail later, after a warm start or in the midst of reinforcement learning.

    Args:
        recipe: of the run.
        env: of its task.
        assignment: adapter by agent.

    Raises:
        ConfigError: something is missing, or parts do not go together in this task.
        ModelError: no such model.
    """
    if recipe.model != STARTER:
        check_model_name(recipe.model)
    wanted = recipe.grpo.report_to
    if wanted != "none" and importlib.util.find_spec(wanted) is None:
        raise ConfigError(f"grpo.report_to={wanted}: the package {wanted!r} is not installed; pip install {wanted}")
    learning = sum(name not in recipe.frozen for name in assignment.values())
    if recipe.update.order is Order.SEQUENTIAL and learning and recipe.grpo.minibatches % learning:
        raise ConfigError(
            f"update.order=sequential: grpo.minibatches={recipe.grpo.minibatches} is no multiple of the {learning} "
            "agents that learn"
        )
    if recipe.grpo.message_price is not None:
        check_price(recipe.grpo.message_price, codec_of(recipe.agent.codec, env.language, recipe.agent.spans).speech)
    _check_world(recipe, assignment)
    _check_imagined(recipe)


def _check_world(recipe: Recipe, assignment: Mapping[str, str]) -> None:
    if recipe.world_model is None:
        return
    if ADAPTER in adapter_names(recipe, assignment):
        raise ConfigError(f"adapter {ADAPTER!r} is the world model's; give the agents' another name")
    for name in ("truncate", "cap_bits", "cap_episode_bits"):
        if any(getattr(each, name, None) is not None for each in (recipe.channel, *recipe.channels.values())):
            raise ConfigError(f"a world_model foretells whole messages, and a channel with {name} cuts them")


def _check_imagined(recipe: Recipe) -> None:
    imagined, valued = recipe.grpo.imagination, recipe.grpo.message_credit
    if recipe.world_model is None:
        if imagined is not None and imagined.model is ImaginedIn.WORLD:
            raise ConfigError("grpo.imagination plays in a world model, and the recipe has no world_model section")
        if valued is not None and valued.model is ImaginedIn.WORLD:
            raise ConfigError(
                "grpo.message_credit imagines in a world model, and the recipe has no world_model section"
            )
    by_oracle = imagined is not None and imagined.model is ImaginedIn.ORACLE and imagined.value
    if by_oracle or (valued is not None and valued.model is ImaginedIn.ORACLE):
        check_memory(recipe.agent)
