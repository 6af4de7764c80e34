"""The real vLLM on exports: it loads them, reads the same prompts, and writes the same tokens."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from preconcert.models import GenerateRequest, TransformersModel
from preconcert.serving.export import export_run
from tests.serving.exported import make_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and its export."""
    root = tmp_path_factory.mktemp("served")
    run = make_run("agents", root)
    return run, export_run(run, root / "export", episodes=2)


@pytest.fixture(scope="module")
def engine(export: tuple[Path, Path]) -> Any:
    """An engine of this process on the export alone."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM

    return LLM(
        model=str(export[1] / "base"), dtype="float32", enable_lora=True, max_lora_rank=8, max_loras=2,
        max_model_len=256, enforce_eager=True, max_num_seqs=8,
    )  # fmt: skip


def test_greedy_completions_are_those_of_the_run(export: tuple[Path, Path], engine: Any) -> None:
    """For the base and each adapter, freely and within the exported grammar."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    from preconcert.agents import GenerativeTeam
    from preconcert.envs import make_env
    from preconcert.training.run_folder import assign, load_model, load_recipe_of

    run, folder = export
    recipe = load_recipe_of(run)
    env = make_env(recipe.task, recipe.params, 3, "heldout")
    model: TransformersModel = load_model(recipe, run, run / "adapters")
    team = GenerativeTeam(model, env.language, recipe.agent, assign(recipe, env))
    eos = team.format.eos
    defaults = json.loads((folder / "base" / "generation_config.json").read_text())
    for agent, observation in env.reset().items():
        others = [other for other in env.agents if other != agent]
        chat = [{"role": "system", "content": agent}, team.format.chat(agent, observation, (), others)[1]]
        prompt = team.format.prompt_ids(agent, observation, (), others)
        automaton = team.format.automaton(others, env.language.actions)
        grammar = StructuredOutputsParams(grammar=(folder / "grammars" / f"{agent}.ebnf").read_text())
        for adapter in (None, "agent_0", "agent_1"):
            lora = None
            if adapter is not None:
                number = 1 + ("agent_0", "agent_1").index(adapter)
                lora = LoRARequest(adapter, number, str(folder / "adapters" / adapter))
            for form, bounds in ((None, None), (automaton, grammar)):
                sampling = SamplingParams(
                    temperature=0.0, max_tokens=defaults["max_new_tokens"], structured_outputs=bounds
                )
                (answer,) = engine.chat([chat], sampling, lora_request=lora, use_tqdm=False)
                assert tuple(answer.prompt_token_ids) == prompt
                asked = GenerateRequest(prompt, 0, adapter, form, defaults["max_new_tokens"], 0.0)
                wanted = model.generate([asked])[0].ids
                found = tuple(answer.outputs[0].token_ids)
                assert found == wanted
                if form is not None:
                    assert found[-1] == eos
                    assert answer.outputs[0].text.split() == team.format.text(wanted).split()


def test_sampling_is_that_of_the_run_unless_asked_otherwise(engine: Any) -> None:
    sampling = engine.get_default_sampling_params()
    assert (sampling.temperature, sampling.top_p, sampling.top_k) in ((1.0, 1.0, 0), (1.0, 1.0, -1))
