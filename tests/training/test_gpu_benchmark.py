"""The benchmark of a GPU, tried out at a size that a CPU manages."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu


def test_a_tiny_run_measures_everything(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--tiny", "--engine", "transformers", "--json"])
    result = json.loads(capsys.readouterr().out)
    found = {each["what"]: each["value"] for each in result["found"]}
    assert found["generation, transformers"] > 0
    assert found["GRPO update"] > 0
    assert found["publishing, transformers: until the first token"] > 0
    text = gpu.table(result)
    assert text.count("\n| ") == len(found) + 1
    assert "| generation, transformers | tokens/s |" in text


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    gpu.main([])
    assert capsys.readouterr().out.startswith("skipped: ")


@pytest.mark.parametrize("arguments", [["--tniy"], ["--engine", "vlm"], ["--engine"], ["--tiny", "--save"]])
def test_what_cannot_be_asked(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"there are|needs a value|makes none"):
        gpu.main(arguments)


def test_operations_are_those_of_the_weights() -> None:
    """For one token, twice the number of weights it goes through, the head among them."""
    shape = gpu.TINY[0]
    attention = shape.width * shape.head_size * 2 * (shape.heads + shape.kv_heads)
    weights = shape.layers * (attention + 3 * shape.width * shape.ffn)
    head = shape.width * shape.vocabulary
    scores = shape.layers * 2 * shape.heads * shape.head_size
    assert gpu.forward(shape, 1, 1, 1) == 2 * weights + 2 * head + scores
    assert gpu.peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu.peak_of("NVIDIA H100 PCIe") == 756e12
    assert gpu.peak_of("Something else") is None
