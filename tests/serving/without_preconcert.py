"""What a stranger does with exports: transformers and peft alone. Run as a script, in isolation.

    python -I without_preconcert.py JOBS.json

Each job is an export's folder, where base and tokenizer are, chats, and texts to score; the answers go to standard
output as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.modules["preconcert"] = None  # type: ignore[assignment]  # importing it fails from here on

import torch  # noqa: E402 - after the block
from peft import AutoPeftModelForCausalLM, PeftModel  # noqa: E402 - after the block
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402 - after the block


def logprobs(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """Of each token of a completion, from one pass over the text."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
    table = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return table[torch.arange(len(completion)), torch.tensor(completion)].tolist()


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Load one export as its card says."""
    os.chdir(job["folder"])
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    model: Any = AutoModelForCausalLM.from_pretrained(job["base"], dtype="float32").eval()
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in job["chats"]]
    texts = [(each["prompt"], each["completion"]) for each in job["texts"]]
    scores: dict[str, list[list[float]]] = {"": [logprobs(model, *text) for text in texts]}
    for name in job["adapters"]:
        if isinstance(model, PeftModel):
            model.load_adapter(f"adapters/{name}", adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, f"adapters/{name}", adapter_name=name).eval()
        model.set_adapter(name)
        scores[name] = [logprobs(model, *text) for text in texts]
    # Where an adapter says that its base is, there it is.
    alone = AutoPeftModelForCausalLM.from_pretrained(f"adapters/{job['adapters'][0]}", dtype="float32").eval()
    found = {"prompts": prompts, "scores": scores, "alone": [logprobs(alone, *text) for text in texts]}
    (code,) = re.findall(r"```python\n(import json\n.*?)```", Path("README.md").read_text(), re.DOTALL)
    said = io.StringIO()
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(said):
        exec(code, names)
    greedy = names["model"].generate(
        **names["inputs"], do_sample=False, max_new_tokens=200, prefix_allowed_tokens_fn=names["allowed"]
    )
    start = names["inputs"]["input_ids"].shape[1]
    return {**found, "said": said.getvalue(), "greedy": greedy[0, start:].tolist()}


def main() -> None:
    """All jobs of a file."""
    answers = [work(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
