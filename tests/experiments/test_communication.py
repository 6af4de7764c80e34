"""How experiments `communication` and `channel` count and read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preconcert.agents import ChannelSettings, TurnCodec, codec_of
from preconcert.core import Latent, Message, Slot, Turn, TurnRequest
from preconcert.envs import make_env
from preconcert.experiments.channel_study import CHANNEL, FALLEN, channels, worst
from preconcert.experiments.communication import COMMUNICATION, CONTROLS
from preconcert.experiments.communication_report import pareto
from preconcert.experiments.communication_work import _worded, area, examples, lengths, silenced, talk_and_judge
from preconcert.experiments.experiment import CellResult, Scale, cells_of
from preconcert.experiments.two_bases import TWO_BASES, mix_and_judge
from preconcert.training.recipe import Recipe
from preconcert.training.reporter import Silent
from preconcert.training.rollout import EpisodeSpec, ScriptedPolicy, rollout


def test_area_is_the_share_of_the_range_of_bits() -> None:
    assert area([(0.0, 1.0), (3.0, 1.0)]) == pytest.approx(1.0)
    assert area([(0.0, 0.0), (1.0, 1.0), (3.0, 1.0)]) == pytest.approx(0.75)


def test_pareto_keeps_what_no_other_beats_in_both() -> None:
    points = [(10.0, 0.5), (20.0, 0.9), (15.0, 0.4), (30.0, 0.9), (5.0, 0.2)]
    assert pareto(points) == [(5.0, 0.2), (10.0, 0.5), (20.0, 0.9)]


def test_latent_messages_are_coded_number_by_number() -> None:
    latent = Latent(((-1.0, 1.0), (0.0, 0.5)), 5)
    message = Message("a", ("b",), "0,4 2,3", 0.0, 2, 0, latent=latent)
    worded = _worded(message)
    assert worded is not None
    assert worded.payload == "0 4 2 3"
    assert worded.raw_bits == pytest.approx(4 * math.log2(5)) == pytest.approx(message.raw_bits)


def test_a_prior_that_knows_the_messages_needs_fewer_bits() -> None:
    params = {"size": 4, "landmarks": 2, "horizon": 6}
    slots = make_env("rendezvous", params, 0).language.message

    def played(first: int) -> list[Any]:
        specs = [EpisodeSpec("rendezvous", params, first + n, sample=n) for n in range(40)]
        return rollout(specs, ScriptedPolicy("scripted"), ChannelSettings(), 0)

    found = lengths(played(0), played(100), slots)
    assert found["bits_raw"] is not None
    assert found["bits_coded"] is not None
    assert 0 < found["bits_coded"] < 0.8 * found["bits_raw"]
    shown = examples(played(0), "open")
    assert {each["about"] for each in shown} <= {"a", "b", "unknown"}


def fabricate(measures: Mapping[str, float], experiment: Any, scale: Scale) -> list[CellResult]:
    notes = {
        "messages": [
            {"words": "a north", "numbers": [], "sender": "agent_0", "step": n, "about": "ab"[n % 2], "action": "north"}
            for n in range(60)
        ]
    }
    found = []
    for cell in cells_of(experiment, scale):
        plan = experiment.plans[scale]
        names = set(measures)
        for arm in plan.arms:
            if arm.name == cell.arm:
                names |= {f"success_{name}" for name in {**plan.options, **arm.options}.get("channels", {})}
        own = {name: measures.get(name, 0.5) + 0.01 * cell.seed for name in sorted(names)}
        if cell.arm in ("none", "oracle"):
            own = {"success_on": measures["success_on"] - 0.4 + 0.01 * cell.seed}
        found.append(CellResult(cell, own, {}, None, {}, notes if cell.arm == "learned" else {}))
    return found


def test_communication_says_its_targets(tmp_path: Any) -> None:
    measures = {
        "success_on": 0.9, "success_shuffled": 0.3, "bits_raw": 20.0, "bits_coded": 9.0, "area": 0.7, "cap": 3.0,
        "bits_at_end": 3.4,
    }  # fmt: skip
    cells = fabricate(measures, COMMUNICATION, Scale.STANDARD)
    for each in cells:
        if each.cell.arm == "raw-state":
            each.measures["bits_raw"] = 100.0  # type: ignore[index]
        if each.cell.arm.startswith("latent"):
            each.measures["bits_raw"] = 40.0  # type: ignore[index]
    report = COMMUNICATION.report(COMMUNICATION.plans[Scale.STANDARD], cells)
    texts = [finding.text for finding in report.findings]
    assert "more (40 against 20 bits" in texts[0]
    assert any("rendezvous. Target: a learned arm within 3 points" in text and "Met: learned" in text for text in texts)
    assert not any("Met" in text and "latent-1 (" in text and "quarter" in text for text in texts)
    causal = [text for text in texts if "shuffling costs at least 20%" in text]
    assert len(causal) == 3
    assert all("Met by every arm" in text for text in causal), "arms of other tasks are not missed"
    assert any(table.name == "words-rendezvous" for table in report.tables)
    assert any("signal. Target: the observation in words and a learned arm clear" in text for text in texts)
    assert any("learned words meet their cap" in text and "Not met, by seed: 3.40, 3.41" in text for text in texts)
    (improved,) = (text for text in texts if "vectors over their supervised start" in text)
    assert " Met: over all tasks by latent-1, " in improved
    assert not any("latent-free" in text for text in texts[1:]), "nothing is learned there"
    for each in cells:
        if each.cell.arm == "raw-state":
            each.measures["bits_raw"] = 60.0  # type: ignore[index]
    texts = [each.text for each in COMMUNICATION.report(COMMUNICATION.plans[Scale.STANDARD], cells).findings]
    said = next(text for text in texts if text.startswith("rendezvous. Target: a learned arm within"))
    assert "Not met: none; as good, and cheapest: learned (0.92 with 20 bits), 0.334 of the bits, against" in said


def test_an_observation_that_nobody_reads_is_a_low_bar() -> None:
    cells = fabricate({"success_on": 0.9, "bits_raw": 20.0}, COMMUNICATION, Scale.STANDARD)
    for each in cells:
        if (each.cell.arm, each.cell.task) == ("raw-state", "signal"):
            each.measures.update(bits_raw=100.0, success_on=0.5 + 0.01 * each.cell.seed)  # type: ignore[attr-defined]
    found = COMMUNICATION.report(COMMUNICATION.plans[Scale.STANDARD], cells).findings
    told = {each.text.split(".")[0]: each.text for each in found if "Target: a learned arm within" in each.text}
    assert "Met: learned" in told["signal"]
    assert "not clearly better than silence here, which makes this a low bar" in told["signal"]
    assert not any("low bar" in text for task, text in told.items() if task != "signal")
    for each in cells:  # better in every seed, though seeds differ by more
        if each.cell.task == "signal" and each.cell.arm in ("none", "raw-state"):
            better = 0.1 if each.cell.arm == "raw-state" else 0.0
            each.measures["success_on"] = 0.3 + 0.1 * each.cell.seed + better  # type: ignore[index]
    found = COMMUNICATION.report(COMMUNICATION.plans[Scale.STANDARD], cells).findings
    assert not any("low bar" in each.text for each in found)


def test_a_target_without_figures_is_not_met() -> None:
    """Whatever failed, every task has every target."""
    cells = fabricate({"success_on": 0.9, "bits_raw": 20.0}, COMMUNICATION, Scale.STANDARD)
    held = [
        replace(each, error="it broke") if (each.cell.arm, each.cell.task) == ("raw-state", "signal") else each
        for each in cells
    ]
    report = COMMUNICATION.report(COMMUNICATION.plans[Scale.STANDARD], held)
    told = [each for each in report.findings if each.text.startswith("signal. Target")]
    assert len(told) == 3
    assert "Not judged: no figures of that observation, 5 seeds failed" in told[0].text
    assert "Not met" in told[1].text
    assert not any(each.clear for each in told)


class Speaking(ScriptedPolicy):
    """The script, whose messages are a codec's."""

    def __init__(self, codec: TurnCodec) -> None:
        super().__init__("scripted")
        self.codec = codec

    def message_slots(self, others: Sequence[str]) -> tuple[Slot, ...]:
        return self.codec.slots(others)

    def decide(self, requests: Sequence[TurnRequest]) -> list[Turn]:
        turns = super().decide(requests)
        return [turn if turn.message is None else replace(turn, message=self.codec.encode(turn)) for turn in turns]


@pytest.mark.parametrize("task", [task.name for task in COMMUNICATION.plans[Scale.STANDARD].tasks])
@pytest.mark.parametrize("name", CONTROLS)
def test_observations_can_be_played_through_every_control(task: str, name: str) -> None:
    recipe = Recipe.model_validate({"task": task, "agent": {"codec": "raw-state"}})
    codec = codec_of(recipe.agent.codec, make_env(task, {}, 0).language, recipe.agent.spans)
    mode = {key: value for key, value in CONTROLS[name].items() if key == "mode"}
    specs = [EpisodeSpec(task, {}, number, sample=number) for number in range(4)]
    played = rollout(specs, Speaking(codec), ChannelSettings.model_validate(mode), 0)
    texts = [message.payload for e in played for t in e.trajectories.values() for u in t.turns for message in u.inbox]
    assert bool(texts) == (name != "off")


def test_caps_can_be_met() -> None:
    """A cap below the shortest message could not, however few the words."""
    for cell in cells_of(COMMUNICATION, Scale.STANDARD):
        price = cell.recipe.grpo.message_price
        if price is None:
            continue
        language = make_env(cell.recipe.task, cell.recipe.params, 0).language
        shortest = math.log2(len(language.message[0].choices) + 1)
        assert price.cap_bits is not None
        assert price.cap_bits > shortest, cell.name


def test_the_channel_study_reads_the_worst_case_and_its_targets() -> None:
    cells = fabricate({"success_on": 0.9, "success_erasure_0.3": 0.2}, CHANNEL, Scale.STANDARD)
    assert all(worst(each) is None for each in cells if each.cell.arm == "none")
    told = [each for each in cells if each.cell.arm == "slots" and each.cell.seed == 0]
    assert worst(told[0]) == pytest.approx(0.2)
    report = CHANNEL.report(CHANNEL.plans[Scale.STANDARD], cells)
    assert any("at total erasure" in finding.text for finding in report.findings)
    assert {"erasure_1", "noise_0.3", "delay_4", "cap_0"} <= set(channels("latent"))
    assert "noise_0.3" not in channels("text")


@pytest.mark.parametrize("scale", Scale)
def test_teams_fall_back_on_the_arm_without_messages(scale: Scale) -> None:
    cells = {(each.task, each.seed, each.arm): each for each in cells_of(CHANNEL, scale)}
    found = 0
    for (task, seed, arm), cell in cells.items():
        if arm in FALLEN:
            assert silenced(cell.recipe) == cells[task, seed, "none"].recipe
            assert cell.recipe == cells[task, seed, FALLEN[arm]].recipe
            found += 1
    assert found


def test_a_team_that_falls_back_shares_the_runs_of_the_others(tmp_path: Path) -> None:
    cells = {each.arm: each for each in cells_of(CHANNEL, Scale.SMOKE) if each.seed == 0}
    found = {}
    warm = tmp_path / "warm"
    for arm in ("none", "latent"):
        found[arm] = talk_and_judge(cells[arm].recipe, tmp_path / arm, cells[arm].options, warm, Silent())
    made = {path.name for path in warm.iterdir()}
    arm = "latent-fallback"
    told = talk_and_judge(cells[arm].recipe, tmp_path / arm, cells[arm].options, warm, Silent()).measures
    assert {path.name for path in warm.iterdir()} == made, "something was trained again"
    talking = found["latent"].measures
    assert told["success_on"] == talking["success_on"]
    assert told["fallen_back_on"] == 0
    assert told["fallen_back_erasure_1"] > 0
    assert told["fallen_back_erasure_1"] == told["fallen_back_cap_0"]
    assert told["success_erasure_1"] == told["success_cap_0"]


@pytest.mark.parametrize("arm", ["learned", "latent-1", "oracle"])
def test_a_cell_is_trained_and_played_through_every_channel(arm: str, tmp_path: Path) -> None:
    cell = next(each for each in cells_of(COMMUNICATION, Scale.SMOKE) if (each.arm, each.seed) == (arm, 0))
    found = talk_and_judge(cell.recipe, tmp_path / "cell", cell.options, tmp_path / "warm", Silent())
    if arm == "oracle":
        assert set(found.measures) == {"success_on"}
        return
    played = {f"success_{name}" for name in CONTROLS} | {"success_cap_0", "success_cap_8"}
    assert played <= set(found.measures)
    assert found.measures["success_cap_0"] == found.measures["success_off"]
    assert found.notes["messages"]
    if arm == "learned":
        assert found.measures["cap"] == 3.0
        assert found.measures["bits_at_end"] is not None
    if arm == "latent-1":
        messages = found.measures["messages_per_episode"]
        assert messages is not None
        assert found.measures["bits_raw"] == pytest.approx(messages * 2 * math.log2(4))


def test_two_bases_are_trained_judged_and_reported(tmp_path: Path) -> None:
    cells = [each for each in cells_of(TWO_BASES, Scale.SMOKE) if each.seed == 0]
    found = []
    for cell in cells:
        held = mix_and_judge(cell.recipe, tmp_path / cell.name, cell.options, tmp_path / "warm", Silent())
        assert {f"success_{name}" for name in ("on", "greedy", "shuffled", "constant", "off")} <= set(held.measures)
        found.append(CellResult(cell, held.measures, held.curves, None, {}))
    told = TWO_BASES.report(TWO_BASES.plans[Scale.SMOKE], found)
    assert len(told.findings) == 2
    assert [len(table.rows) for table in told.tables] == [2]
