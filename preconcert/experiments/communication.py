"""Experiment `communication`: what is a message worth, and how few bits does it take?

Arms are forms of messages, trained alike but for what the limits below name: none, the sender's observation
(`raw-state`), its plan (`intention`), the task's words (`slots`), as few of them as pay (`learned`, under a cap that
dual ascent meets), and vectors (`latent`, quantised, of several lengths; as they are; and without any training,
`aligned`). The oracle is the task's own player that sees everything. Every trained team is played again with its
messages shuffled, constant, random and lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preconcert.experiments.communication_report import HEAVY, LEARNED, LOOSE, NONE, ORACLE, PATH, RAW, report
from preconcert.experiments.experiment import Experiment, ExperimentArm, ExperimentTask, Plan, Scale

WORK = "preconcert.experiments.communication_work:talk_and_judge"
_LEAN: Mapping[str, Any] = {"gate": {"min_gap": 0.0, "episodes": 16}, "keep_episodes": False, "adapters": "shared"}
CONTROLS: Mapping[str, Mapping[str, Any]] = {
    "on": {},
    "greedy": {"greedy": True},
    "shuffled": {"mode": "shuffled"},
    "constant": {"mode": "constant"},
    "random": {"mode": "random"},
    "off": {"mode": "off"},
    "warm": {"warm": True},
}
"""What every team is played through; `greedy` with the likeliest words, `warm` before reinforcement learning."""
SUBJECTS = {"rendezvous": "open", "box-push": "goal", "signal": "target"}
"""After which word of an observation stands what there is to say."""


def latent(tokens: int, dims: int = 2, levels: int = 4, method: str = "learned") -> dict[str, Any]:
    """The codec of vectors."""
    return {"type": "latent", "tokens": tokens, "dims": dims, "levels": levels, "method": method}


WIDER = {"box-push": 4, "signal": 4}
"""By task, numbers per vector, where a word is one of more than five: two numbers of four levels, shaken as they are in
training, tell about four apart."""
LONGER = {"box-push": 1200}
"""By task, steps of the supervised phase: three times the default where that leaves vectors hardly used. `signal` has
as many in its recipe."""


READING = {"signal": 6000}
"""By task, steps of the warm start where messages are observations. What is told must be found among the words of all
candidates there, and is learned after some 4000 steps where one word takes fewer than 2000."""


def vectors(tokens: int, levels: int = 4, method: str = "learned") -> dict[str, Any]:
    """The overrides of an arm that talks in vectors, for all tasks and for those in `WIDER` and `LONGER`."""
    on_task: dict[str, dict[str, Any]] = {
        task: {"agent.codec": latent(tokens, dims, levels, method)} for task, dims in WIDER.items()
    }
    for task, steps in LONGER.items():
        on_task[task]["latent_start.steps"] = steps
    return {"overrides": {"agent.codec": latent(tokens, levels=levels, method=method)}, "on_task": on_task}


def capped_at(caps: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """By task, a price on messages that holds them to so many bits each."""
    return {task: {"grpo.message_price": {"cap_bits": cap}} for task, cap in caps.items()}


def arms(
    tokens: tuple[int, ...], tight: Mapping[str, float], loose: Mapping[str, float]
) -> tuple[ExperimentArm, ...]:
    """All forms of messages.

    Args:
        tokens: lengths of quantised latent messages.
        tight: by task, bits per message that the learned words are held to; elsewhere they have no cap.
        loose: the same, for an arm on these tasks alone.
    """
    found = [
        ExperimentArm(NONE, "no messages", {"agent.spans.say": False}),
        ExperimentArm(
            RAW,
            "observation in words",
            {"agent.codec": "raw-state"},
            {task: {"warm_start.steps": steps} for task, steps in READING.items()},
        ),
        ExperimentArm("intention", "plan in words", {"agent.codec": "intention"}),
        ExperimentArm("slots", "the task's words", {"agent.codec": "slots"}),
        ExperimentArm(LEARNED, "learned words, tight cap", {"agent.codec": "learned"}, capped_at(tight)),
        ExperimentArm(LOOSE, "learned words, loose cap", {"agent.codec": "learned"}, capped_at(loose), tuple(loose)),
    ]
    found += [ExperimentArm(f"latent-{k}", f"latent, k = {k}, quantised", **vectors(k)) for k in tokens]
    # The control of what `speech_weight` and `codec_lr` are for: everything counts the same, learns as fast.
    heavy = vectors(2)
    heavy["overrides"] |= {"grpo.speech_weight": 1.0, "grpo.codec_lr": 2.5e-3}
    found += [
        ExperimentArm("latent-float", "latent, k = 2, not quantised", **vectors(2, levels=0)),
        ExperimentArm(
            "latent-free", "latent, k = 2, aligned without training", **vectors(2, levels=0, method="aligned")
        ),
        ExperimentArm(
            PATH,
            "latent, k = 2, quantised, pathwise gradient",
            {"agent.codec": latent(2), "grpo.speech": "path"},
            tasks=("rendezvous",),
        ),
        ExperimentArm(HEAVY, "latent, k = 2, quantised, at full weight", **heavy),
        ExperimentArm(ORACLE, "oracle", options={"player": "expert"}),
    ]
    return tuple(found)


def _task(name: str, episodes: int, steps: int, grpo: Mapping[str, Any], **more: Any) -> ExperimentTask:
    recipe = {**_LEAN, "task": name, "warm_start": {"episodes": episodes, "steps": steps}, "grpo": dict(grpo), **more}
    return ExperimentTask(name, recipe)


_OPTIONS: Mapping[str, Any] = {"channels": CONTROLS, "subjects": SUBJECTS}
_SMOKE_ARMS = (NONE, LEARNED, "latent-1", ORACLE)
SMOKE = Plan(
    arms=tuple(arm for arm in arms((1,), {"rendezvous": 3.0}, {}) if arm.name in _SMOKE_ARMS),
    tasks=(
        ExperimentTask(
            "rendezvous",
            {
                **_LEAN,
                "task": "rendezvous",
                "params": {"size": 3, "landmarks": 2, "horizon": 4},
                "starter": {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "ffn": 32},
                "warm_start": {"episodes": 64, "steps": 15, "batch": 64},
                "latent_start": {"steps": 3, "batch": 4},
                "grpo": {"iterations": 2, "seeds": 2, "group": 2, "minibatches": 2, "checkpoint_every": 1},
            },
        ),
    ),
    seeds=2,
    options={**_OPTIONS, "episodes": 8, "fitting": 8, "caps": [0, 8]},
)
_TIGHT = {"rendezvous": 3.0, "box-push": 4.0}
"""Of the 4.3 and 10.3 bits of the task's words. On `signal` a message is one word: nothing can be left out, so nothing
is capped."""
_LOOSE = {"rendezvous": 4.0, "box-push": 8.0}
STANDARD = Plan(
    arms=arms((1, 2, 4, 8), _TIGHT, _LOOSE),
    tasks=(
        _task("rendezvous", 3000, 600, {"iterations": 16, "seeds": 8, "group": 8}),
        _task("box-push", 4000, 900, {"iterations": 16, "seeds": 8, "group": 4, "hindsight_weight": 0.1}),
        _task(
            "signal",
            12000,
            2000,
            {"iterations": 30, "seeds": 8, "group": 8, "hindsight_weight": 0.1, "bind_action": False},
            agent={"spans": {"intend": False}},
            latent_start={"steps": 1200},
        ),
    ),
    seeds=5,
    options={**_OPTIONS, "episodes": 100, "fitting": 100, "caps": [0, 2, 4, 8, 16, 32]},
)
FULL = Plan(
    arms=STANDARD.arms,
    tasks=(
        _task("rendezvous", 3000, 600, {"iterations": 60, "seeds": 16, "group": 8}),
        _task("box-push", 8000, 2000, {"iterations": 60, "seeds": 16, "group": 8, "hindsight_weight": 0.1}),
        _task(
            "signal",
            12000,
            2000,
            {"iterations": 100, "seeds": 16, "group": 8, "hindsight_weight": 0.1, "bind_action": False},
            agent={"spans": {"intend": False}},
            latent_start={"steps": 1200},
        ),
    ),
    seeds=10,
    options={**STANDARD.options, "episodes": 200, "fitting": 200},
)

COMMUNICATION = Experiment(
    name="communication",
    question=(
        "How few bits do agents need to act together as if they told each other all they see, in words or in vectors, "
        "and do they use what they are told?"
    ),
    plans={Scale.SMOKE: SMOKE, Scale.STANDARD: STANDARD, Scale.FULL: FULL},
    work=WORK,
    report=report,
    limits=(
        "The models are starters of about 0.13 million parameters, made from nothing and taught by a script that talks "
        "in the task's words. Vectors are distilled from a team that reads those words.",
        "Each arm has the same learning rates and as many iterations. Latent arms have a supervised phase more. On "
        "`box-push` and `signal` a vector has four numbers and that phase 1200 steps, on `rendezvous` two and 400.",
        "On `signal` teams that tell each other their observations have a warm start of 6000 steps, three times that "
        "of the others, without which nobody reads them.",
        "On `signal` a message of the task's words is one word, which cannot be shortened: learned words have no cap "
        "there.",
        "Vectors that are aligned without training are the sender's hidden states; the reader is trained like all.",
        "Shuffled messages come from another donor at every step: what shuffling costs is also that donors contradict "
        "one another.",
        "The observations of these tasks are short: a message in them costs tens of bits, and there is little to save. "
        "Where agents see more, the ratio is another.",
        "The entropy code's prior counts words by place, by the message before and by sender. A better prior would "
        "give shorter codes to every form of message.",
    ),
)
