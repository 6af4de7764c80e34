"""The embedded backend keeps the contract, whatever the checkpoint, the batch and the grammar's holes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import HyperCLOVAXConfig, HyperCLOVAXForCausalLM

from preconcert.core import GrammarError, ModelError
from preconcert.models import (
    CompletionEnd,
    GenerateRequest,
    LanguageModel,
    LoraSettings,
    ScoreRequest,
    TransformersModel,
    check_backend,
)
from preconcert.prompts.automaton import Automaton, AutomatonBuilder
from tests.models.checkpoints import WORDS, build_chat_model, build_chat_tokenizer


def grammar(first: int, gaps: tuple[int, ...], eos: int = 2) -> Automaton:
    """A forced beginning of `first` tokens, then choices with forced gaps of these lengths between them."""
    builder = AutomatonBuilder()
    if first:
        builder.literal([3] * first)
    for number, gap in enumerate(gaps):
        builder.choice([(4,), (5,), (6, 7), (8 + number % 3, 4)])
        if gap:
            builder.literal([9] * gap)
    builder.literal([eos])
    return builder.build()


def test_an_architecture_that_decodes_otherwise_is_refused(tmp_path: Path) -> None:
    """Its own forward pass divides its logits by a number that decoding knows nothing of."""
    tokenizer = build_chat_tokenizer()
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3,
    }
    for scaling in (1.0, 0.25):
        folder = tmp_path / str(scaling)
        torch.manual_seed(0)
        HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**shape, logits_scaling=scaling)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    TransformersModel.load(tmp_path / "1.0", LoraSettings(r=4))
    with pytest.raises(ModelError, match=r"'hyperclovax' cannot be decoded here.* nats away"):
        TransformersModel.load(tmp_path / "0.25", LoraSettings(r=4))


@pytest.mark.parametrize("temperature", [1e-7, 1e-300, 5e-324])
def test_the_smallest_temperatures_write_the_likeliest(model: TransformersModel, temperature: float) -> None:
    for cold, coldest in zip(
        model.generate(requests_of(15, temperature=temperature)),
        model.generate(requests_of(15, temperature=0.0)),
        strict=True,
    ):
        assert cold.ids == coldest.ids
        assert np.allclose([value for value, drawn in zip(cold.logprobs, cold.sampled, strict=True) if drawn], 0)


def requests_of(count: int, **changes: object) -> list[GenerateRequest]:
    """Ragged in every respect: prompts, adapters, grammars, limits."""
    rng = np.random.default_rng(0)
    grammars = [None, grammar(0, (0, 3, 1)), grammar(4, (2, 0, 0, 5)), grammar(1, (7,)), grammar(2, ())]
    requests = []
    for number in range(count):
        prompt = tuple(int(i) for i in rng.integers(3, 12, size=1 + (5 * number) % 13))
        plain = GenerateRequest(
            prompt, number, (None, "red", "blue")[number % 3], grammars[number % 5], max_tokens=(30, 4, 9)[number % 3]
        )
        requests.append(replace(plain, **changes))  # type: ignore[arg-type]
    return requests


def assert_same(model: TransformersModel, requests: list[GenerateRequest]) -> None:
    for request, completion in zip(requests, model.generate(requests), strict=True):
        (alone,) = model.generate([request])
        assert (alone.ids, alone.sampled, alone.ended) == (completion.ids, completion.sampled, completion.ended)
        assert np.allclose(alone.logprobs, completion.logprobs, atol=1e-5)


def test_contract(checkpoint: Callable[[str], Path], kind: str) -> None:
    model = TransformersModel.load(checkpoint(kind))
    assert isinstance(model, LanguageModel)
    assert len(check_backend(model, WORDS)) == 15
    assert model.adapters == ()
    assert model.model is model.base


def test_ragged_rows_equal_single_rows(model: TransformersModel) -> None:
    assert_same(model, requests_of(30))


def test_without_adapters(checkpoint: Callable[[str], Path]) -> None:
    assert_same(TransformersModel.load(checkpoint("qwen3")), requests_of(10, adapter=None))


def test_cache_equals_plain_forward(model: TransformersModel) -> None:
    """Holes and jumps against a forward pass of the model itself, one sequence at a time."""
    for request in requests_of(15, adapter=None, temperature=0.7):
        (completion,) = model.generate([request])
        ids = torch.tensor([request.prompt_ids + completion.ids])
        with model.model.disable_adapter(), torch.no_grad():
            logits = model.model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].double() / 0.7
        states = request.automaton.walk(completion.ids) if request.automaton else []
        for place, token in enumerate(completion.ids):
            row = logits[place]
            if request.automaton is not None:
                allowed = torch.tensor(list(request.automaton.transitions[states[place]]))
                row = torch.full_like(row, -torch.inf).index_copy(0, allowed, row[allowed])
            assert abs(float(row.log_softmax(-1)[token]) - completion.logprobs[place]) < 1e-4


def test_large_batches_are_split(checkpoint: Callable[[str], Path]) -> None:
    model = TransformersModel.load(checkpoint("starter"))
    requests = requests_of(20, adapter=None)
    whole = model.generate(requests)
    model.max_rows = 6
    parts = model.generate(requests)
    assert [one.ids for one in whole] == [one.ids for one in parts]
    texts = [ScoreRequest(r.prompt_ids, c.ids, r.adapter, r.automaton) for r, c in zip(requests, whole, strict=True)]
    for completion, logprobs in zip(whole, model.score(texts), strict=True):
        assert np.allclose(completion.logprobs, logprobs, atol=1e-5)


def test_equal_prompts_are_read_once(checkpoint: Callable[[str], Path]) -> None:
    model = TransformersModel.load(checkpoint("starter"))
    request = GenerateRequest((3, 4, 5, 6), seed=0, automaton=grammar(0, (1, 1)))
    together = model.generate([replace(request, seed=seed) for seed in range(8)])
    assert model.prefill_tokens == 4
    for seed, completion in enumerate(together):
        assert model.generate([replace(request, seed=seed)])[0].ids == completion.ids


def test_nothing_to_decide_needs_no_forward(checkpoint: Callable[[str], Path]) -> None:
    model = TransformersModel.load(checkpoint("starter"))
    request = GenerateRequest((3,), seed=0, automaton=grammar(2, ()))
    whole, cut = model.generate([request, replace(request, max_tokens=2)])
    assert (whole.ids, whole.logprobs, whole.sampled) == ((3, 3, 2), (0.0,) * 3, (False,) * 3)
    assert (whole.ended, cut.ids, cut.ended) == (CompletionEnd.GRAMMAR, (3, 3), CompletionEnd.LENGTH)
    assert model.prefill_tokens == 0
    assert model.generate([]) == []
    assert model.score([]) == []
    assert model.score([ScoreRequest((3,), ())]) == [()]


def test_samples_follow_the_distribution(checkpoint: Callable[[str], Path]) -> None:
    model = TransformersModel.load(checkpoint("starter"))
    request = GenerateRequest((3, 4), seed=0, automaton=grammar(0, (0,)), max_tokens=1, temperature=0.5)
    drawn = model.generate([replace(request, seed=seed) for seed in range(2000)])
    counts: dict[int, int] = {}
    for completion in drawn:
        counts[completion.ids[0]] = counts.get(completion.ids[0], 0) + 1
    for completion in drawn[:50]:
        expected = np.exp(completion.logprobs[0])
        assert abs(counts[completion.ids[0]] / 2000 - expected) < 4 * np.sqrt(expected / 2000)


def test_training_state_is_left_alone(model: TransformersModel) -> None:
    model.model.train()
    model.base.base_model.eval()
    flags = {name: module.training for name, module in model.model.named_modules()}
    wanted = {name: value.requires_grad for name, value in model.model.named_parameters()}
    active = model.model.active_adapter
    before = torch.get_rng_state()
    model.generate(requests_of(6))
    assert {name: module.training for name, module in model.model.named_modules()} == flags
    assert {name: value.requires_grad for name, value in model.model.named_parameters()} == wanted
    assert model.model.active_adapter == active
    assert torch.equal(before, torch.get_rng_state())


def test_generates_while_gradient_checkpointing_is_on(model: TransformersModel) -> None:
    requests = requests_of(6)
    before = [completion.ids for completion in model.generate(requests)]
    model.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.base.enable_input_require_grads()
    model.model.train()
    assert [completion.ids for completion in model.generate(requests)] == before


# --- sessions -------------------------------------------------------------------------------------------------------


def test_sessions_reuse_what_was_read(model: TransformersModel) -> None:
    requests = [
        GenerateRequest((3, 4, 5)[: 1 + n % 3], n, ("red", "blue")[n % 2], grammar(n % 2, (2, n % 4)), session=f"s{n}")
        for n in range(6)
    ]
    model.generate(requests)
    assert (model.prefill_tokens, model.reused_tokens) == (
        sum(len(r.prompt_ids) + n % 2 for n, r in enumerate(requests)),
        0,
    )
    for turn in range(3):
        done = model.generate([replace(request, session=None) for request in requests])
        requests = [
            replace(request, prompt_ids=request.prompt_ids + one.ids + (4 + turn,), seed=request.seed + 10)
            for request, one in zip(requests, done, strict=True)
        ]
        read, reused = model.prefill_tokens, model.reused_tokens
        held = model.generate(requests)
        read, reused = model.prefill_tokens - read, model.reused_tokens - reused
        assert read + reused == sum(len(request.prompt_ids) + n % 2 for n, request in enumerate(requests))
        # New are one token of the world and, of each completion, the last choice and what was forced after it.
        assert read <= sum(1 + 1 + 1 + 3 + n % 2 for n, _ in enumerate(requests))
        fresh = model.generate([replace(request, session=None) for request in requests])
        for one, other in zip(held, fresh, strict=True):
            assert one.ids == other.ids
            assert np.allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_sessions_survive_order_subsets_and_company(checkpoint: Callable[[str], Path]) -> None:
    model = TransformersModel.load(checkpoint("qwen3"))
    text = tuple(3 + n % 8 for n in range(20))
    base = [GenerateRequest(text[: 10 + n], n, automaton=grammar(0, (1, 2)), session=f"s{n}") for n in range(5)]
    model.generate(base[:3])
    model.generate(base[3:])
    for chosen in ([4, 0, 2], [1], [3, 1, 0, 2, 4]):
        requests = [replace(base[n], prompt_ids=(*base[n].prompt_ids, 5, 6), seed=50 + n) for n in chosen]
        before = model.reused_tokens
        held = model.generate(requests)
        assert model.reused_tokens - before >= sum(len(base[n].prompt_ids) for n in chosen)
        for one, other in zip(held, model.generate([replace(r, session=None) for r in requests]), strict=True):
            assert one.ids == other.ids
            assert np.allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_sessions_forget_changed_weights_adapters_and_prompts(model: TransformersModel) -> None:
    request = GenerateRequest((3, 4, 5, 6), 0, "red", grammar(0, (1, 1)), session="s")

    def reused(changed: GenerateRequest) -> int:
        before = model.reused_tokens
        (held,) = model.generate([changed])
        (fresh,) = model.generate([replace(changed, session=None)])
        assert held.ids == fresh.ids
        assert np.allclose(held.logprobs, fresh.logprobs, atol=1e-5)
        return model.reused_tokens - before

    assert reused(request) == 0
    assert reused(request) == 3
    assert reused(replace(request, prompt_ids=(3, 4, 7, 8))) == 2
    assert reused(replace(request, adapter="blue")) == 0
    assert reused(replace(request, adapter="blue")) == 3
    with torch.no_grad():
        next(iter(model.adapter_parameters("blue").values())).mul_(2)
    assert reused(replace(request, adapter="blue")) == 0
    model.close_session("s")
    model.close_session("nobody")
    assert reused(replace(request, adapter="blue")) == 0
    with pytest.raises(ModelError, match="twice"):
        model.generate([request, request])


def test_sessions_of_rows_that_have_nothing_to_decide(checkpoint: Callable[[str], Path]) -> None:
    model = TransformersModel.load(checkpoint("starter"))
    text = (3, 4, 5)
    for turn in range(3):
        requests = [
            GenerateRequest(text[: 2 + turn], 0, automaton=grammar(1, ()), session="forced"),
            GenerateRequest(text[: 2 + turn], 0, automaton=grammar(1, (0,)) if turn else None, session="chosen"),
        ]
        requests = requests[:1] if turn == 2 else requests
        for one, other in zip(
            model.generate(requests), model.generate([replace(r, session=None) for r in requests]), strict=True
        ):
            assert one.ids == other.ids
            assert np.allclose(one.logprobs, other.logprobs, atol=1e-5)


# --- other architectures --------------------------------------------------------------------------------------------


def test_sliding_attention_within_its_window() -> None:
    tokenizer = build_chat_tokenizer()
    model = build_chat_model(len(tokenizer), "qwen3", 0, sliding_window=44)
    sliding = TransformersModel(model, tokenizer, LoraSettings())
    requests = [replace(request, max_tokens=20) for request in requests_of(15, adapter=None)]
    assert_same(sliding, requests)
    with pytest.raises(ModelError, match="longer than the model's 44"):
        sliding.generate([GenerateRequest((3,) * 30, 0, max_tokens=20)])


def test_other_kinds_of_state_are_refused() -> None:
    tokenizer = build_chat_tokenizer()
    model = build_chat_model(len(tokenizer), "qwen3", 0)
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        TransformersModel(model, tokenizer, LoraSettings())


# --- adapters -------------------------------------------------------------------------------------------------------


def test_fresh_adapters_follow_their_seed_alone(checkpoint: Callable[[str], Path]) -> None:
    values = []
    for noise in range(2):
        model = TransformersModel.load(checkpoint("llama"))
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        for extra in range(noise):
            model.add_adapter(f"extra{extra}", 5)
        model.add_adapter("a", 7)
        assert torch.equal(before, torch.get_rng_state())
        values.append({key: value.detach().clone() for key, value in model.adapter_parameters("a").items()})
    assert values[0].keys() == values[1].keys()
    assert all(torch.equal(values[0][key], values[1][key]) for key in values[0])


def test_every_adapter_trains_and_the_base_does_not(model: TransformersModel) -> None:
    model.adapter_parameters("red")[next(iter(model.adapter_parameters("red")))].requires_grad_(False)
    model.add_adapter("green", 3)
    frozen = [name for name, value in model.model.named_parameters() if "lora_" in name and not value.requires_grad]
    assert len(frozen) == 1
    assert not any(value.requires_grad for name, value in model.model.named_parameters() if "lora_" not in name)
    model.delete_adapter("red")
    assert model.adapters == ("blue", "green")
    assert all(value.requires_grad for name, value in model.model.named_parameters() if "lora_" in name)


def test_peft_reads_what_is_saved_and_the_other_way_round(
    model: TransformersModel, checkpoint: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model.save_adapter("red", tmp_path / "red")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint(kind)), tmp_path / "red")
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        logps = theirs(input_ids=ids).logits[0, :-1].log_softmax(-1)
    expected = logps.gather(1, ids[0, 1:, None])[:, 0]
    assert np.allclose(model.score([ScoreRequest((3,), (4, 5, 6, 7), "red")])[0], expected, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    model.load_adapter("blue", tmp_path / "theirs")
    assert np.allclose(model.score([ScoreRequest((3,), (4, 5, 6, 7), "blue")])[0], expected, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["red", "theirs"]


def test_unusable_adapter_folders(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = TransformersModel.load(checkpoint("qwen3"), LoraSettings(r=4))
    with pytest.raises(ModelError, match="unknown adapter"):
        model.save_adapter("a", tmp_path / "a")
    model.add_adapter("a", 0)
    model.save_adapter("a", tmp_path / "a")
    before = {key: value.detach().clone() for key, value in model.adapter_parameters("a").items()}

    def refused(folder: Path, match: str, by: TransformersModel = model) -> None:
        for name in ("a", "new"):
            with pytest.raises(ModelError, match=match) as caught:
                by.load_adapter(name, folder)
            assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "no adapter folder")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        broken = shutil.copytree(tmp_path / "a", tmp_path / f"torn-{file}")
        (broken / file).write_bytes((broken / file).read_bytes()[:100])
        refused(broken, "not an adapter configuration|corrupt")
        (broken / file).unlink()
        refused(broken, f"has no {file}")
    other = TransformersModel.load(checkpoint("llama"), LoraSettings(r=4))
    wide = TransformersModel.load(checkpoint("starter"), LoraSettings(r=4, targets=("q_proj",)))
    refused(tmp_path / "a", "another architecture", wide)
    assert wide.adapters == ()
    refused(tmp_path / "a", "r=4", TransformersModel.load(checkpoint("qwen3"), LoraSettings(r=8)))
    other.load_adapter("a", tmp_path / "a")  # the shapes of the two tiny models are the same
    assert model.adapters == ("a",)
    assert all(torch.equal(before[key], value) for key, value in model.adapter_parameters("a").items())


@pytest.mark.parametrize("name", ["", "a.b", "a b", "a/b", "__base__", "keys", "train"])
def test_names_that_no_adapter_can_have(checkpoint: Callable[[str], Path], name: str) -> None:
    model = TransformersModel.load(checkpoint("starter"))
    with pytest.raises(ModelError, match="cannot name"):
        model.add_adapter(name, 0)
    assert model.adapters == ()


@pytest.mark.parametrize("name", ["a", "lora", "lora_A", "default", "q_proj", "weight", "agent_0"])
def test_odd_names_work(checkpoint: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    model = TransformersModel.load(checkpoint("starter"), LoraSettings(r=2))
    model.add_adapter("other", 1)
    model.add_adapter(name, 0)
    with torch.no_grad():
        for value in model.adapter_parameters(name).values():
            value.fill_(0.1)
    request = ScoreRequest((3,), (4, 5), name)
    before = model.score([request])
    model.save_adapter(name, tmp_path / "saved")
    model.delete_adapter(name)
    model.load_adapter(name, tmp_path / "saved")
    assert np.allclose(model.score([request]), before)


def test_taken_and_unknown_names(model: TransformersModel) -> None:
    with pytest.raises(ModelError, match="exists already"):
        model.add_adapter("red", 0)
    with pytest.raises(ModelError, match="did you mean 'blue'"):
        model.add_adapter("green", 0, source="blu")
    with pytest.raises(ModelError, match="did you mean 'red'"):
        model.score([ScoreRequest((3,), (4,), "rde")])
    assert model.adapters == ("red", "blue")


def test_targets_must_exist_and_spare_the_head(checkpoint: Callable[[str], Path]) -> None:
    for targets, match in ((("nothing",), "cannot be made"), (("q_proj", "lm_head"), "head")):
        model = TransformersModel.load(checkpoint("llama"), LoraSettings(targets=targets))
        with pytest.raises(ModelError, match=match):
            model.add_adapter("a", 0)
        assert model.adapters == ()
        model.generate([GenerateRequest((3,), 0, max_tokens=2)])


# --- errors ---------------------------------------------------------------------------------------------------------


def test_requests_that_cannot_be_served(checkpoint: Callable[[str], Path]) -> None:
    model = TransformersModel.load(checkpoint("starter"))
    good = GenerateRequest((3,), 0)
    for bad, match in (
        (replace(good, prompt_ids=()), "empty prompt"),
        (replace(good, adapter="red"), "unknown adapter 'red'"),
        (replace(good, max_tokens=600), r"601 tokens .* 512"),
        (replace(good, temperature=-1.0), "temperature"),
    ):
        with pytest.raises(ModelError, match=match):
            model.generate([good, bad])
    with pytest.raises(GrammarError):
        model.score([ScoreRequest((3,), (9,), None, grammar(0, (0,)))])


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_folders(checkpoint: Callable[[str], Path], tmp_path: Path, missing: str) -> None:
    broken = shutil.copytree(checkpoint("qwen3"), tmp_path / "model")
    (broken / missing).write_text("{ torn")
    with pytest.raises(ModelError, match="model folder") as torn:
        TransformersModel.load(broken)
    assert "\n" not in str(torn.value)
    (broken / missing).unlink()
    with pytest.raises(ModelError, match=f"has no .*{missing}"):
        TransformersModel.load(broken)


def test_names_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("nobody/no-such-model", "no-such-model"):
        with pytest.raises(ModelError, match=f"no model '{name}'") as caught:
            TransformersModel.load(name)
        assert "\n" not in str(caught.value)
    for name in ("./nowhere", str(tmp_path / "nowhere"), "a/b/c", ""):
        with pytest.raises(ModelError, match="no model folder"):
            TransformersModel.load(name)


def test_unknown_dtype_and_device(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="did you mean 'float32'"):
        TransformersModel.load(checkpoint("starter"), dtype="float3")
    with pytest.raises(ModelError, match="'warp'"):
        TransformersModel.load(checkpoint("starter"), device="warp")


def test_bfloat16_runs(checkpoint: Callable[[str], Path]) -> None:
    model = TransformersModel.load(checkpoint("qwen3"), dtype="bfloat16")
    model.add_adapter("red", 0)
    model.add_adapter("blue", 1)
    requests = requests_of(9)
    assert [one.ids for one in model.generate(requests)] == [one.ids for one in model.generate(requests)]
