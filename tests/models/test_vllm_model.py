"""What `VLLMModel` makes of an engine, with an engine that needs no vLLM; `test_vllm.py` has the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from preconcert.core import Latent, ModelError
from preconcert.models import (
    ChoiceRequest,
    GenerateRequest,
    LatentSettings,
    LoraSettings,
    Placed,
    ScoreRequest,
    SpeakRequest,
    TransformersModel,
    VLLMSettings,
    check_backend,
)
from preconcert.models.vllm_embeddings import PromptEmbeddings
from preconcert.models.vllm_heads import HeadFit, fitted_checkpoint
from preconcert.models.vllm_instructions import GRAMMAR, ROWS, Row, Spelling, instructions, read_instructions
from preconcert.models.vllm_model import VLLMModel
from preconcert.models.vllm_start import read_base
from preconcert.prompts.automaton import AutomatonBuilder
from tests.models.checkpoints import WORDS, build_chat_checkpoint
from tests.models.logits_engine import LogitsEngine
from tests.models.vllm_worlds import LORA, build_base, build_reference, distance, grammars, requests


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm-model")


@pytest.fixture(scope="module")
def base(place: Path) -> Path:
    return build_base(place)


@pytest.fixture(scope="module")
def reference(base: Path, place: Path) -> TransformersModel:
    return build_reference(base, place)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))


@pytest.fixture
def model(base: Path, reference: TransformersModel, place: Path) -> Iterator[VLLMModel]:
    folder, config, tokenizer = read_base(base, "float32")
    engine = LogitsEngine(fitted_checkpoint(folder, config), LORA)
    settings = VLLMSettings(latents=True)
    made = VLLMModel(engine, tokenizer, config, LORA, settings, folder, [int(tokenizer.eos_token_id)], reference)
    for name in ("red", "blue"):
        made.load_adapter(name, place / name)
    yield made
    made.close()


def engine_of(model: VLLMModel) -> LogitsEngine:
    assert isinstance(model.engine, LogitsEngine)
    return model.engine


def test_it_keeps_the_contract(model: VLLMModel) -> None:
    assert len(check_backend(model, WORDS)) == 14
    assert model.adapters == ("red", "blue")


@pytest.mark.parametrize("latents", [False, True])
def test_it_writes_what_transformers_writes(model: VLLMModel, reference: TransformersModel, latents: bool) -> None:
    asked = requests(reference, 60, latents)
    assert distance(model.generate(asked), reference.generate(asked)) < 1e-5


def test_scores_and_choices_are_those_of_transformers(model: VLLMModel, reference: TransformersModel) -> None:
    asked = requests(reference, 40) + requests(reference, 10, latents=True)
    texts = [
        ScoreRequest(one.prompt_ids, written.ids, one.adapter, grammar, one.latents)
        for one, written in zip(asked, reference.generate(asked), strict=True)
        for grammar in {None, one.automaton}
    ]
    for mine, theirs in zip(model.score(texts), reference.score(texts), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    north, south, east = (tuple(reference.tokenizer.encode(w, add_special_tokens=False)) for w in WORDS[:3])
    for options in ((north,), (south, north), (north + east, south, east)):
        choices = [ChoiceRequest(one.prompt_ids, options, one.adapter) for one in asked[:5]]
        for mine, theirs in zip(model.choose(choices), reference.choose(choices), strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)


def test_vectors_are_written_by_the_writer(model: VLLMModel, reference: TransformersModel) -> None:
    asked = [SpeakRequest((3, 4, 5), "red", 1), SpeakRequest((3, 4), "blue", 2)]
    assert model.speak(asked) == reference.speak(asked)
    model.writer = None
    with pytest.raises(ModelError, match="hidden states"):
        model.speak(asked)


def test_latent_messages_need_prompt_embeddings(model: VLLMModel, reference: TransformersModel) -> None:
    model._embeddings = None
    with pytest.raises(ModelError, match="latents=true"):
        model.generate(requests(reference, 3, latents=True))
    assert model.codecs == {}


def test_a_published_adapter_gets_a_name_of_its_own(
    model: VLLMModel, reference: TransformersModel, place: Path
) -> None:
    request = GenerateRequest((3, 4, 5), 1, "red", max_tokens=4)
    before = model.generate([request])
    model.publish("red", place / "blue", 3)
    assert distance(model.generate([request]), reference.generate([replace(request, adapter="blue")])) < 1e-5
    model.publish("red", place / "red", 3)
    assert distance(model.generate([request]), before) < 1e-5
    assert model.adapters == ("red", "blue")
    assert model.version("red") == 3
    log = engine_of(model).log
    assert log == ["load red@0", "load blue@0", "load red@3", "unload red@0", "load red@3.1", "unload red@3"]


def test_a_version_in_use_is_not_taken_away(model: VLLMModel, place: Path) -> None:
    with model._store.using(["red", None]) as inner:
        assert inner == {"red": "red@0", None: None}
        model.publish("red", place / "blue", 1)
        assert engine_of(model).log[-1] == "load red@1"
    assert engine_of(model).log[-1] == "unload red@0"


def test_unfit_adapters_are_refused_and_change_nothing(model: VLLMModel, tmp_path: Path, base: Path) -> None:
    other = TransformersModel.load(base, LoraSettings(r=2))
    other.add_adapter("small", 0)
    other.save_adapter("small", tmp_path / "small")
    for path in (tmp_path / "nothing", tmp_path / "small"):
        with pytest.raises(ModelError, match=r"r=2|no adapter folder"):
            model.publish("red", path, 1)
    assert model.version("red") == 0
    with pytest.raises(ModelError, match="did you mean 'blue'"):
        model.generate([GenerateRequest((3,), 0, "bleu")])


def test_an_engine_that_does_not_follow_is_found_out(model: VLLMModel, reference: TransformersModel) -> None:
    engine = engine_of(model)
    write = engine.write
    [_, _, forced] = grammars(reference.tokenizer)
    assert model.generate([GenerateRequest((3,), 0, automaton=forced)])[0].logprobs == (0.0, 0.0, 0.0)
    asked = [one for one in requests(reference, 40) if one.automaton is not None and one.watch and one.max_tokens > 3]
    engine.write = lambda rows: [replace(one, ids=(1,) * len(one.ids)) for one in write(rows)]  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="grammar does not allow"):
        model.generate(asked)
    engine.write = lambda rows: [replace(one, tables=({},) * len(one.ids)) for one in write(rows)]  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="lacks the log-probabilities"):
        model.generate(asked)


@pytest.mark.parametrize("kind", ["starter", "qwen3", "llama"])
def test_larger_heads_compute_the_same(checkpoint: Callable[[str], Path], kind: str, tmp_path: Path) -> None:
    source = checkpoint(kind)
    fit = HeadFit.of(AutoConfig.from_pretrained(source))
    assert fit is not None
    assert (fit.size, fit.larger) == (8, 32)
    fit.checkpoint(source, tmp_path / "base")
    small = TransformersModel.load(source, LORA)
    small.add_adapter("red", 0)
    with torch.no_grad():
        for key, value in small.adapter_parameters("red").items():
            if "lora_B" in key:
                value.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    small.save_adapter("red", tmp_path / "small")
    fit.adapter(tmp_path / "small", tmp_path / "large")
    large = TransformersModel.load(tmp_path / "base", LORA)
    large.load_adapter("red", tmp_path / "large")
    texts = [ScoreRequest((5, 6, 7), tuple(range(3, 12)) * 30, adapter) for adapter in (None, "red")]
    for one, other in zip(small.score(texts), large.score(texts), strict=True):
        assert one == pytest.approx(other, abs=2e-5)


def test_instructions_survive_the_way(reference: TransformersModel) -> None:
    [one, many, _] = (Spelling.of(grammar, 90) for grammar in grammars(reference.tokenizer))
    assert one.stop is None
    assert one.steps == 4  # a choice, two forced words, a choice; the words around them cost nothing
    assert many.stop == 89
    rows = [Row((1, number), None, 4, one, seed=2**64 - number - 1, temperature=0.3, watch=(1,)) for number in (1, 2)]
    extra = instructions(rows)
    for row in rows:
        read = read_instructions(extra, 90, "cpu", row.prompt_ids, [])
        assert read is not None
        assert (read.seed, read.temperature, read.offset, read.watch) == (row.seed, 0.3, 1, {1})
    forced = read_instructions(instructions([Row((1,), None, 2, forced=(7, 8))]), 90, "cpu")
    assert forced is not None
    assert forced.forced == (7, 8)
    assert read_instructions({"other": 1}, 90, "cpu") is None
    assert read_instructions(None, 90, "cpu") is None


@pytest.mark.parametrize(
    "extra",
    [
        {ROWS: "x"},
        {ROWS: []},
        {ROWS: ["a:b"]},
        {ROWS: [":-1:1.0::"]},
        {ROWS: [":1:nan::"]},
        {ROWS: [":1:1.0:f:5,x"]},
        {ROWS: [":1:1.0:f:90"]},
        {ROWS: [":1:1.0::"], GRAMMAR: "[[1]]"},
        {ROWS: [":1:1.0::"], GRAMMAR: "no"},
        {ROWS: [":1:1.0::"], GRAMMAR: "[]"},
        {ROWS: [":1:1.0::"], GRAMMAR: "[[5,0]]"},
        {ROWS: [":1:1.0::"], GRAMMAR: "[[95,1],[]]"},
    ],
)
def test_unreadable_instructions_are_refused(extra: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        read_instructions(extra, 90, "cpu")


def test_a_grammar_of_everything_has_no_way_to_end() -> None:
    builder = AutomatonBuilder()
    builder.choice([(0,), (1, 2), (1, 3)])
    with pytest.raises(ModelError, match="leaves none to end with"):
        Spelling.of(builder.build(), 4)


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("held", ["bfloat16", "float32"])
def test_prompts_are_embedded_in_the_type_that_the_engine_holds(
    base: Path, place: Path, reference: TransformersModel, tmp_path: Path, stored: str, held: str
) -> None:
    AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, stored)).save_pretrained(tmp_path)
    embeddings = PromptEmbeddings(tmp_path, AutoConfig.from_pretrained(base), held)
    embeddings.speech.load("red", place / "red")
    asked = next(one for one in requests(reference, 40, latents=True) if one.latents and one.adapter == "red")
    found = embeddings.of(asked.prompt_ids, asked.adapter, asked.latents)
    assert found.dtype == getattr(torch, held)
    exact = PromptEmbeddings(base, AutoConfig.from_pretrained(base))
    exact.speech.load("red", place / "red")
    assert torch.allclose(found.float(), exact.of(asked.prompt_ids, asked.adapter, asked.latents), atol=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3"])
def test_prompts_are_embedded_as_the_models_own_layer_does_it(kind: str, dtype: str, tmp_path: Path) -> None:
    folder = build_chat_checkpoint(tmp_path / kind, kind)
    model = TransformersModel.load(folder, LORA, dtype=dtype)
    model.add_adapter("red", 0)
    model.add_codec("red", LatentSettings(tokens=2, dims=3), 0)
    model.save_adapter("red", tmp_path / "red")
    embeddings = PromptEmbeddings(folder, AutoConfig.from_pretrained(folder), dtype)
    embeddings.speech.load("red", tmp_path / "red")
    prompt, said = tuple(range(5, 15)), Latent(((0.5, -1.0, 0.0), (1.0, 0.5, -0.5)), 5)
    own = model.base.get_input_embeddings()(torch.tensor([prompt]))[0]
    found = embeddings.of(prompt, "red", (Placed(4, said),))
    assert torch.equal(found[[0, 1, 2, 3, 6, 7, 8, 9]], own[[0, 1, 2, 3, 6, 7, 8, 9]])
    every = model.base.get_input_embeddings()(torch.arange(len(model.tokenizer)))
    size = float(every.float().square().mean().sqrt())
    assert model.codecs["red"].scale == pytest.approx(size, rel=0.01), "vectors start at the size of embeddings"
