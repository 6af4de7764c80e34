"""Each row goes through its own adapter, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from preconcert.core import ModelError
from preconcert.models import TransformersModel, route_rows
from preconcert.models.routing import lora_layers

IDS = torch.arange(6 * 7).reshape(6, 7) % 9 + 3
MIXES: list[list[str | None]] = [
    ["red", "red", "blue", "blue", None, "red"],
    ["red", "red", None, "blue", "blue", "blue"],
    ["blue", "red", "blue", None, "red", "blue"],
    ["red"] * 6,
    [None] * 6,
]


def loss(model: TransformersModel, rows: list[int]) -> torch.Tensor:
    """A sum over rows of something that depends on every token, so that the losses of sub-batches add up."""
    logps = model.model(input_ids=IDS[rows]).logits[:, :-1].log_softmax(-1)
    return -logps.gather(2, IDS[rows][:, 1:, None]).sum()


def gradients(model: TransformersModel) -> dict[str, torch.Tensor]:
    found = {}
    for name in model.adapters:
        for key, value in model.adapter_parameters(name).items():
            found[f"{name} {key}"] = torch.zeros_like(value) if value.grad is None else value.grad.clone()
            value.grad = None
    return found


@pytest.mark.parametrize("names", MIXES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_one_adapter_at_a_time(
    model: TransformersModel, names: list[str | None], checkpointing: bool
) -> None:
    model.model.train()
    wanted = {key: value.requires_grad for key, value in model.model.named_parameters()}
    expected_loss, expected = 0.0, {key: value * 0 for key, value in gradients(model).items()}
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        if name is None:
            with model.model.disable_adapter(), torch.no_grad():
                expected_loss += float(loss(model, rows))
            continue
        model.model.set_adapter(name)
        part = loss(model, rows)
        part.backward()
        expected_loss += float(part.detach())
        for key, value in gradients(model).items():
            expected[key] += value
    # peft's own ways of choosing an adapter, `disable_adapter` included, switch `requires_grad` of all the others off.
    for key, value in model.model.named_parameters():
        value.requires_grad_(wanted[key])
    if checkpointing:
        model.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.base.enable_input_require_grads()
    with route_rows(model.model, names):
        whole = loss(model, list(range(6)))
        if any(names):
            whole.backward()
    assert float(whole.detach()) == pytest.approx(expected_loss, rel=1e-5)
    for key, value in gradients(model).items():
        assert torch.allclose(value, expected[key], atol=1e-4, rtol=1e-4), key
    assert all(value.grad is None for key, value in model.model.named_parameters() if "lora_" not in key)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in lora_layers(model.model).values())


def test_results_do_not_depend_on_how_names_hash(model: TransformersModel) -> None:
    """The order of the adapters in a batch comes from the rows, so renaming them changes no bit."""
    results = []
    for rename in ({}, {"red": "zebra", "blue": "ant"}):
        for old, new in rename.items():
            model.add_adapter(new, 0, source=old)
        for names in MIXES[:3]:
            with route_rows(model.model, [rename.get(str(name), name) for name in names]):
                whole = loss(model, list(range(6)))
                whole.backward()
            found = gradients(model)
            prefixes = [f"{rename.get(name, name)} " for name in ("red", "blue")]
            ordered = [found[key] for prefix in prefixes for key in sorted(found) if key.startswith(prefix)]
            results.append([whole.detach(), *ordered])
    for one, other in zip(results[:3], results[3:], strict=True):
        assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def test_routes_nest_and_generation_may_run_inside(model: TransformersModel) -> None:
    names: list[str | None] = ["red", "blue", None, "red", "red", "red"]
    with torch.no_grad():
        with route_rows(model.model, names):
            alone = loss(model, list(range(6)))
        outer = route_rows(model.model, names)
        with route_rows(model.model, ["blue"] * 6):
            inside = loss(model, list(range(6)))
        assert loss(model, list(range(6))) == alone
        assert inside != alone
        outer.close()
        outer.close()
        model.model.set_adapter("blue")
        assert torch.allclose(loss(model, list(range(6))), inside, rtol=1e-6)


def test_dropout_and_autocast(checkpoint: Callable[[str], Path]) -> None:
    from preconcert.models import LoraSettings

    model = TransformersModel.load(checkpoint("starter"), LoraSettings(dropout=0.5))
    model.add_adapter("red", 0)
    with torch.no_grad():
        for value in model.adapter_parameters("red").values():
            value.fill_(0.05)
    rows = list(range(6))
    with torch.no_grad(), route_rows(model.model, ["red"] * 6):
        model.model.train()
        assert loss(model, rows) != loss(model, rows)
        model.model.eval()
        plain = loss(model, rows)
        assert plain == loss(model, rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert float(loss(model, rows)) == pytest.approx(float(plain), rel=0.05)


def test_what_cannot_be_routed(model: TransformersModel) -> None:
    with pytest.raises(ModelError, match="unknown adapter 'blu'; did you mean 'blue'"):
        route_rows(model.model, ["blu"])
    with route_rows(model.model, ["red"] * 5), pytest.raises(ModelError, match=r"6 rows .* 5 are routed"):
        loss(model, list(range(6)))
    assert not any(layer._forward_hooks for layer in lora_layers(model.model).values())
