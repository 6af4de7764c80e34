"""Teams of two architectures and widths that talk in vectors; the supervised phase of latent messages itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from preconcert.agents import AgentSettings, ChannelSettings, SlotsSettings, codec_of, turn_format_of
from preconcert.core import ConfigError, Episode, TrainingError, UnknownNameError
from preconcert.envs import make_env
from preconcert.models import LatentSettings, TransformersModel
from preconcert.training.latent_lines import lines_of
from preconcert.training.latent_start import LatentStart, LatentStartSettings, Seat, train_latents
from preconcert.training.mixed import MixedTeam, train_mixed
from preconcert.training.recipe import Recipe
from preconcert.training.rollout import ScriptedPolicy, rollout
from tests.training.teams import AGENTS, PARAMS, TASK, load, parameters_of, recipe_of, specs, weights_of

SHAPE: dict[str, Any] = {"tokens": 2, "dims": 3, "levels": 4}
LATENT = AgentSettings(codec={"type": "latent", **SHAPE})


def start_on(models: Mapping[str, TransformersModel], **settings: Any) -> tuple[LatentStart, list[Any]]:
    """The losses for a few scripted episodes; one model per agent or one for both."""
    env = make_env(TASK, PARAMS, 0)
    words = codec_of(SlotsSettings(), env.language, LATENT.spans)
    vectors = codec_of(LATENT.codec, env.language, LATENT.spans)
    episodes: list[Episode] = rollout(specs(6, 1), ScriptedPolicy("scripted"), ChannelSettings(), 0)
    for seed, (agent, model) in enumerate(models.items()):
        if agent not in model.codecs:
            model.add_codec(agent, LatentSettings(**SHAPE), seed)
    lines = lines_of(
        episodes,
        {agent: turn_format_of(models[agent].tokenizer, LATENT, vectors) for agent in AGENTS},
        {agent: turn_format_of(models[agent].tokenizer, LATENT, words) for agent in AGENTS},
        LATENT,
    )
    seats = {agent: Seat(models[agent], agent) for agent in AGENTS}
    return LatentStart(seats, LatentStartSettings(**{"batch": 4, **settings})), lines


def test_the_receivers_loss_reaches_the_sender_and_nothing_else(starter: TransformersModel) -> None:
    """Without distillation and separation: the sender's queries get a gradient through its receiver's words alone."""
    start, lines = start_on(dict.fromkeys(AGENTS, starter), distil=0.0, separate=0.0, anchor=0.0)
    parameters = start.parameters()
    for parameter in starter.base.parameters():
        parameter.requires_grad_(any(parameter is p for p in parameters))
    moments = [(each, 1) for each in lines if len(each["agent_0"]) > 1]
    loss, parts = start.loss(moments, 0)
    assert set(parts) == {"cross_entropy"}
    loss.backward()
    for agent in AGENTS:
        for key, value in parameters_of(starter, agent).items():
            moves = value.grad is not None and bool((value.grad != 0).any())
            # The width of the Gaussian is not trained: a supervised loss could only shrink it.
            assert moves == (key != "codec.log_deviation"), f"{agent} {key}"
    rest = [p for name, p in starter.base.named_parameters() if "lora" not in name and "codec" not in name]
    assert all(p.grad is None for p in rest)


@pytest.mark.parametrize(("alone", "named"), [("distil", "distillation"), ("separate", ""), ("anchor", "distance")])
def test_further_losses_have_their_weights(starter: TransformersModel, alone: str, named: str) -> None:
    none = {"distil": 0.0, "separate": 0.0, "anchor": 0.0}
    start, lines = start_on(dict.fromkeys(AGENTS, starter), **{**none, alone: 0.5})
    plain, _ = start_on(dict.fromkeys(AGENTS, starter), **none)
    moments = [(each, 1) for each in lines if len(each["agent_0"]) > 1]
    with torch.no_grad():
        whole, parts = start.loss(moments, 0)
        bare, _ = plain.loss(moments, 0)
    extra = parts[named] if named else float(torch.log(torch.tensor(2.0))) - parts["separation"]
    assert float(whole - bare) == pytest.approx(0.5 * extra, abs=1e-5)
    assert extra > 0
    if alone == "anchor":
        with torch.no_grad():
            later, _ = start.loss(moments, 0, done=0.35)
            over, parts = start.loss(moments, 0, done=0.7)
        assert float(later - bare) == pytest.approx(0.25 * extra, abs=1e-5)
        assert float(over) == pytest.approx(float(bare), abs=1e-6)
        assert "distance" not in parts


def test_training_lowers_the_loss_and_leaves_the_base_alone(starter: TransformersModel) -> None:
    before = {key: p.detach().clone() for key, p in starter.base.named_parameters() if "base_layer" in key}
    flags = {key: p.requires_grad for key, p in starter.base.named_parameters()}
    start, lines = start_on(dict.fromkeys(AGENTS, starter), steps=12, lr=5e-3)
    flags |= {key: p.requires_grad for key, p in starter.base.named_parameters()}
    log = train_latents(start, lines, 0)
    assert log[-1]["loss"] < log[0]["loss"]
    after = dict(starter.base.named_parameters())
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {key: p.requires_grad for key, p in after.items()} == flags


def test_two_bases_exchange_gradients(checkpoint: Callable[[str], Path], starter: TransformersModel) -> None:
    """A chat model and the starter: different widths, tokenizers and spellings."""
    other = load(checkpoint("llama"))
    start, lines = start_on({"agent_0": starter, "agent_1": other}, separate=0.2)
    before = [weights_of(model) for model in (starter, other)]
    log = train_latents(LatentStart(start.seats, LatentStartSettings(steps=2, batch=4)), lines, 0)
    assert all(value > 0 for value in (log[-1]["cross_entropy"], log[-1]["distillation"]))
    for model, held, agent in ((starter, before[0], "agent_0"), (other, before[1], "agent_1")):
        moved = {key.split()[0] for key, value in weights_of(model).items() if not torch.equal(value, held[key])}
        assert moved == {agent}


def test_codecs_of_different_shapes_are_refused(starter: TransformersModel) -> None:
    starter.add_codec("agent_0", LatentSettings(tokens=1, dims=3, levels=4), 0)
    starter.add_codec("agent_1", LatentSettings(tokens=2, dims=3, levels=4), 0)
    with pytest.raises(TrainingError, match="one shape"):
        LatentStart({agent: Seat(starter, agent) for agent in AGENTS}, LatentStartSettings())


def test_a_mixed_team_is_trained_loaded_and_plays(tmp_path: Path) -> None:
    plain = recipe_of().model_dump(mode="json")
    plain |= {"agent": {"codec": {"type": "latent", **SHAPE}}, "latent_start": {"steps": 2, "batch": 4}}
    recipe = Recipe.model_validate(plain)
    other = {"starter": {"family": "llama", "layers": 1, "width": 48, "heads": 2, "kv_heads": 2, "ffn": 32}}
    out = train_mixed(recipe, {"agent_1": other}, tmp_path / "team")
    assert train_mixed(recipe, {"agent_1": other}, out) == out
    team = MixedTeam.load(out)
    widths = {agent: policy.model.base.config.hidden_size for agent, policy in team.policies.items()}  # type: ignore[attr-defined]
    assert widths == {"agent_0": 32, "agent_1": 48}
    episode = rollout(specs(2, 1), team.policies, ChannelSettings(), 0)[0]
    turns = [turn for t in episode.trajectories.values() for turn in t.turns[1:]]
    assert all(message.latent is not None for turn in turns for message in turn.inbox)
    assert any(turn.inbox for turn in turns)


def test_bad_mixed_teams_are_refused(tmp_path: Path) -> None:
    recipe = recipe_of()
    with pytest.raises(ConfigError, match=r"agent\.codec=latent"):
        train_mixed(recipe, {}, tmp_path)
    latent = Recipe.model_validate({**recipe.model_dump(mode="json"), "agent": {"codec": {"type": "latent"}}})
    with pytest.raises(UnknownNameError, match="agent_9"):
        train_mixed(latent, {"agent_9": {}}, tmp_path)
    with pytest.raises(UnknownNameError, match="grpo"):
        train_mixed(latent, {"agent_0": {"grpo": {}}}, tmp_path)
