"""The insides of TRL that `training/grpo.py` overrides or leans on are as they were when it was written."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import pytest
import trl
from trl import GRPOTrainer

from preconcert.training.grpo import MultiAgentGRPOTrainer

PINNED = "1.16"
SIGNATURES = {
    "_generate_and_score_completions": ("self", "inputs"),
    "_compute_loss": ("self", "model", "inputs"),
    "_get_per_token_logps_and_entropies": (
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
        "compute_aux_loss", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
        "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
    ),
    "training_step": ("self", "model", "inputs", "num_items_in_batch"),
    "create_optimizer": ("self", "model"),
    "create_model_card": ("self", "model_name", "dataset_name", "tags"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_prepare_inputs": ("self", "generation_batch"),
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "_save": ("self", "output_dir", "state_dict"),
}  # fmt: skip
READ = {
    "_compute_loss": (
        'inputs["advantages"]', 'advantages.dim() == 1', 'inputs.get("old_per_token_logps")', 'inputs["tool_mask"]',
        'inputs["num_items_in_batch"]', 'inputs["ref_per_token_logps"]', "self._get_per_token_logps_and_entropies(",
        "self.accelerator.num_processes", "self.args.steps_per_generation",
    ),
    "_prepare_inputs": (
        "self._generate_and_score_completions(generation_batch)", "shuffle_sequence_dict(", "split_tensor_dict(",
        "self._step % generate_every == 0",
    ),
}  # fmt: skip
ADVICE = (
    f"preconcert/training/grpo.py, batch.py and sequential.py were written against TRL {PINNED}; read them again "
    "before moving to another version"
)


def test_the_version_is_the_pinned_one() -> None:
    assert trl.__version__.startswith(PINNED + "."), f"TRL {trl.__version__} is installed. {ADVICE}"
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"trl=={PINNED}.*" in project["dependencies"], ADVICE


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_as_pinned(name: str) -> None:
    method = getattr(GRPOTrainer, name, None)
    assert method is not None, f"GRPOTrainer has no {name} any more. {ADVICE}"
    found = tuple(inspect.signature(inspect.unwrap(method)).parameters)
    assert found == SIGNATURES[name], f"GRPOTrainer.{name} takes {', '.join(found)} now. {ADVICE}"


@pytest.mark.parametrize("name", READ)
def test_the_source_reads_what_we_hand_over(name: str) -> None:
    source = inspect.getsource(inspect.unwrap(getattr(GRPOTrainer, name)))
    for text in READ[name]:
        assert text in source, f"GRPOTrainer.{name} does not contain {text!r} any more. {ADVICE}"


def test_every_override_is_pinned() -> None:
    """A hook that is overridden without being in the list above would escape these tests."""
    ours = {name for name, value in vars(MultiAgentGRPOTrainer).items() if callable(value) and name != "__init__"}
    overridden = {name for name in ours if hasattr(GRPOTrainer, name)}
    assert overridden <= SIGNATURES.keys(), f"pin these too: {sorted(overridden - SIGNATURES.keys())}"
