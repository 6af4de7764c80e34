"""The conformance test of environments: plays a few random episodes and names the first broken rule."""

from __future__ import annotations

import math
import pickle
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preconcert.core import Env, EnvError, Observation, Slot, StepResult, TaskLanguage
from preconcert.envs.check_view import Seen, check_determined, check_view, check_view_text, check_words
from preconcert.envs.task import Variety

_MEMBERS = ("agents", "horizon", "language", "reset", "step", "state", "snapshot", "restore", "legal_actions")


@dataclass
class _Trace:
    """One played episode."""

    first: Mapping[str, Observation]
    actions: list[dict[str, str]] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)
    states: list[str] = field(default_factory=list)

    def steps(self) -> list[tuple[Mapping[str, Observation], Mapping[str, str], Mapping[str, Observation]]]:
        """Views before, joint action and views after, step by step."""
        views = [self.first, *(result.observations for result in self.results)]
        return list(zip(views, self.actions, views[1:], strict=False))


def check_env(make: Callable[[int], Env], seeds: Sequence[int] = (0, 1, 2)) -> list[str]:
    """Test whether an environment keeps the `Env` protocol.

    Args:
        make: builds an instance from a seed, e.g. `lambda seed: MyEnv({}, seed, "train")`.
        seeds: the instances to play; two or more also show whether seeds matter.

    Returns:
        What was checked, one phrase each.

    Raises:
        EnvError: the first broken rule, in one line.
    """
    checked: list[str] = []
    global_before = _global_random_state()
    traces = []
    seen: Seen = {}
    varies = True
    for seed in seeds:
        env = make(seed)
        varies = getattr(env, "variety", None) is not Variety.NOTHING
        _check_members(env)
        trace = _play(env, seed, _random_choice(seed))
        _check_after_end(env, trace)
        _check_same(trace, _play(make(seed), seed, _again(trace)), f"two plays of seed {seed} with the same actions")
        _check_snapshot(make, seed, trace)
        _check_refusals(make(seed), seed)
        check_determined(env.language, trace.steps(), seen)
        traces.append(trace)
    if _global_random_state() != global_before:
        raise EnvError("the environment draws from the global random state; use np.random.default_rng(seed)")
    first_views = [_view(trace.first) for trace in traces]
    if len(traces) > 1 and varies and all(view == first_views[0] for view in first_views):
        warnings.warn(f"seeds {list(seeds)} all start with the same views", stacklevel=2)
    checked += [
        "members of the protocol", "agents, horizon and language", "views: types, legal actions, forecast fields",
        "a declared view reads every text, and its determined fields are",
        "rewards and the end", "same seed and actions, same episode", "snapshot and restore", "refusals", "states",
        "global random state untouched",
    ]
    return checked


def _global_random_state() -> str:
    numpy_state = np.random.get_state(legacy=True)  # noqa: NPY002 - watched, not used
    return repr((random.getstate(), [str(part) for part in numpy_state]))


def _check_members(env: Env) -> None:
    for member in _MEMBERS:
        if not hasattr(env, member):
            raise EnvError(f"{type(env).__name__} has no {member!r}, which the Env protocol requires")
    agents = env.agents
    if not isinstance(agents, tuple) or not agents or not all(isinstance(agent, str) and agent for agent in agents):
        raise EnvError(f"agents must be a non-empty tuple of names, not {agents!r}")
    if len(set(agents)) != len(agents):
        raise EnvError(f"agents must be unique: {agents!r}")
    if not isinstance(env.horizon, int) or env.horizon < 1:
        raise EnvError(f"horizon must be a positive int, not {env.horizon!r}")
    if not isinstance(env.language, TaskLanguage):
        raise EnvError(f"language must be a TaskLanguage, not {type(env.language).__name__}")
    _check_language(env.language)


def _check_language(language: TaskLanguage) -> None:
    check_words("language.actions", language.actions)
    for part, slots in (("message", language.message), ("forecast", language.forecast)):
        names = [slot.name for slot in slots]
        if len(set(names)) != len(names):
            raise EnvError(f"language.{part}: slot names must be unique: {names!r}")
        for slot in slots:
            if not isinstance(slot, Slot):
                raise EnvError(f"language.{part} must hold Slots, not {slot!r}")
            check_words(f"language.{part} slot {slot.name!r}", slot.choices)
            if slot.null is not None and slot.null not in slot.choices:
                raise EnvError(f"language.{part} slot {slot.name!r}: null {slot.null!r} is not in {slot.choices!r}")
    if language.default_action and language.default_action not in language.actions:
        raise EnvError(f"language.default_action {language.default_action!r} is not one of {language.actions!r}")
    if language.words:
        check_words("language.words", language.words)
    if language.rewards:
        check_words("language.rewards", language.rewards)
        for word in language.rewards:
            if _number(word) is None:
                raise EnvError(f"language.rewards: {word!r} is not a number")
    check_view(language)


def _check_views(env: Env, views: Mapping[str, Observation], step: int, over: bool) -> None:
    if not isinstance(views, Mapping) or set(views) != set(env.agents):
        got = sorted(views) if isinstance(views, Mapping) else type(views).__name__
        raise EnvError(f"step {step}: observations must be a mapping by exactly {list(env.agents)!r}, got {got!r}")
    for agent, view in views.items():
        where = f"observation of {agent!r} at step {step}"
        if not isinstance(view, Observation):
            raise EnvError(f"{where} must be an Observation, not {type(view).__name__}")
        if view.agent != agent:
            raise EnvError(f"{where} belongs to {view.agent!r}")
        if not isinstance(view.text, str) or not view.text:
            raise EnvError(f"{where}: text must be a non-empty str, not {view.text!r}")
        if view.step != step:
            raise EnvError(f"{where}: step is {view.step!r}")
        strangers = [other for other in view.sees if other == agent or other not in env.agents]
        if strangers:
            raise EnvError(f"{where}: sees {strangers!r}, not among the other agents")
        for slot in env.language.forecast:
            if slot.name not in view.fields:
                raise EnvError(f"{where}: fields lack the forecast slot {slot.name!r}")
            if view.fields[slot.name] not in slot.choices:
                raise EnvError(f"{where}: field {slot.name!r} = {view.fields[slot.name]!r} is not in {slot.choices!r}")
        check_view_text(env.language, view, where)
        if not over:
            check_words(f"{where}: legal_actions", view.legal_actions)
            unknown = [action for action in view.legal_actions if action not in env.language.actions]
            if unknown:
                raise EnvError(f"{where}: legal actions {unknown!r} are not in language.actions")
            if tuple(env.legal_actions(agent)) != view.legal_actions:
                raise EnvError(
                    f"{where}: legal_actions {view.legal_actions!r}, "
                    f"but env.legal_actions gives {env.legal_actions(agent)!r}"
                )


def _check_result(env: Env, result: StepResult, step: int) -> None:
    if not isinstance(result, StepResult):
        raise EnvError(f"step {step}: step must return a StepResult, not {type(result).__name__}")
    if not isinstance(result.done, bool) or not isinstance(result.truncated, bool):
        raise EnvError(f"step {step}: done and truncated must be bool: {result.done!r}, {result.truncated!r}")
    if result.success is not None and not isinstance(result.success, bool):
        raise EnvError(f"step {step}: success must be bool or None, not {result.success!r}")
    if result.truncated and not result.done:
        raise EnvError(f"step {step}: truncated but not done")
    if not isinstance(result.rewards, Mapping) or set(result.rewards) != set(env.agents):
        raise EnvError(f"step {step}: rewards must be a mapping by exactly {list(env.agents)!r}: {result.rewards!r}")
    for agent, reward in result.rewards.items():
        if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward):
            raise EnvError(f"step {step}: reward of {agent!r} must be a finite float, not {reward!r}")
        if env.language.rewards and env.language.reward_word(reward) is None:
            raise EnvError(f"step {step}: reward {reward!r} of {agent!r} has no word in {env.language.rewards!r}")
    _check_views(env, result.observations, step, result.done)
    if not result.done and step >= env.horizon:
        raise EnvError(f"the episode is not over after horizon = {env.horizon} steps")


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _random_choice(seed: int) -> Callable[[int, Mapping[str, Observation]], dict[str, str]]:
    rng = np.random.default_rng(seed)
    return lambda step, views: {agent: str(rng.choice(view.legal_actions)) for agent, view in views.items()}


def _again(trace: _Trace, start: int = 0) -> Callable[[int, Mapping[str, Observation]], dict[str, str]]:
    return lambda step, views: trace.actions[start + step]


def _play(env: Env, seed: int, choose: Callable[[int, Mapping[str, Observation]], dict[str, str]]) -> _Trace:
    """Play to the end with every check on."""
    views = env.reset()
    _check_views(env, views, 0, over=False)
    trace = _Trace(views, states=[_state(env)])
    for step in range(env.horizon):
        trace.actions.append(choose(step, views))
        result = env.step(trace.actions[-1])
        _check_result(env, result, step + 1)
        trace.results.append(result)
        trace.states.append(_state(env))
        if result.done:
            break
        views = result.observations
    return trace


def _state(env: Env) -> str:
    state = env.state()
    if not isinstance(state, str) or not state:
        raise EnvError(f"state() must give a non-empty str, not {state!r}")
    return state


def _check_after_end(env: Env, trace: _Trace) -> None:
    _expect_refusal("a step after the end", lambda: env.step(trace.actions[-1]))


def _check_refusals(env: Env, seed: int) -> None:
    first = env.agents[0]
    start = _random_choice(seed)(0, env.reset())
    _expect_refusal(
        f"the illegal action 'no_such_action' of {first!r}", lambda: env.step({**start, first: "no_such_action"})
    )
    _expect_refusal(
        f"a step without {first!r}", lambda: env.step({agent: act for agent, act in start.items() if agent != first})
    )
    _expect_refusal("an action of 'no_such_agent'", lambda: env.step({**start, "no_such_agent": start[first]}))


def _expect_refusal(what: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except EnvError:
        return
    except Exception as error:  # whatever a user's code raises is named in the finding
        raise EnvError(f"{what} raised {type(error).__name__} ({error}) instead of EnvError") from error
    raise EnvError(f"{what} was accepted; it must raise EnvError")


def _check_snapshot(make: Callable[[int], Env], seed: int, trace: _Trace) -> None:
    """From the middle of the episode: pickled into a fresh instance, and kept while the same instance went on."""
    env, middle = make(seed), len(trace.actions) // 2
    env.reset()
    for actions in trace.actions[:middle]:
        env.step(actions)
    kept = env.snapshot()
    try:
        data = pickle.dumps(kept)
    except Exception as error:
        raise EnvError(f"snapshot of type {type(kept).__name__} cannot be pickled: {error}") from error
    for actions in trace.actions[middle:]:
        env.step(actions)
    fresh = make(seed)
    fresh.reset()
    for name, instance, snapshot in (("kept", env, kept), ("pickled", fresh, pickle.loads(data))):
        instance.restore(snapshot)
        where = f"seed {seed} restored from a {name} snapshot of step {middle}"
        if instance.state() != trace.states[middle]:
            raise EnvError(f"{where}: state {instance.state()!r} instead of {trace.states[middle]!r}")
        for offset, actions in enumerate(trace.actions[middle:], start=middle):
            result = instance.step(actions)
            if _told(result) != _told(trace.results[offset]):
                raise EnvError(f"{where}: step {offset + 1} differs: {_difference(result, trace.results[offset])}")


def _check_same(one: _Trace, other: _Trace, what: str) -> None:
    if _view(one.first) != _view(other.first):
        raise EnvError(f"{what} start with different views: {_view(one.first)!r} and {_view(other.first)!r}")
    for step, (result, again) in enumerate(zip(one.results, other.results, strict=False), start=1):
        if _told(result) != _told(again):
            raise EnvError(f"{what} differ at step {step}: {_difference(result, again)}")
    if one.states != other.states:
        raise EnvError(f"{what} pass through different states")


def _view(views: Mapping[str, Observation]) -> dict[str, tuple[Any, ...]]:
    return {
        agent: (view.text, view.legal_actions, view.step, dict(view.fields), view.sees)
        for agent, view in sorted(views.items())
    }


def _told(result: StepResult) -> tuple[Any, ...]:
    """A result as plain values, comparable whatever mappings an environment uses."""
    return _view(result.observations), dict(result.rewards), result.done, result.success, result.truncated


def _difference(result: StepResult, other: StepResult) -> str:
    names = ("observations", "rewards", "done", "success", "truncated")
    for name, one, two in zip(names, _told(result), _told(other), strict=True):
        if one != two:
            return f"{name} {one!r} and {two!r}"
    return "nothing"
