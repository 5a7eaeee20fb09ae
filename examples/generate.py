"""Text generation with a model that does not fit in memory.

python examples/generate.py path/to/checkpoint --memory-budget 6GiB --prompt "Once upon a time" --prompt "In the end"
python examples/generate.py --tiny
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import odewei
from odewei.torch import init_on_demand_weights_model


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate text.")
    parser.add_argument("folder", nargs="?", type=Path, help="a checkpoint of transformers, as it was downloaded")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights instead")
    parser.add_argument("--prompt", action="append", help="several share each reading of the weights")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--memory-budget", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.tiny:
            from tiny import write_llama

            arguments.folder = write_llama(Path(scratch))
            arguments.prompt = arguments.prompt or ["a b c", "x y"]
            arguments.memory_budget = "400KiB"  # less than half of it
        if arguments.folder is None:
            parser.error("give a folder, or --tiny")
        run(arguments.folder, arguments.prompt or ["Once upon a time"], arguments.tokens, arguments.memory_budget)


def run(folder: Path, prompts: list[str], tokens: int, memory_budget: str) -> None:
    config = AutoConfig.from_pretrained(folder)
    model = init_on_demand_weights_model(
        lambda: AutoModelForCausalLM.from_config(config), folder, memory_budget=memory_budget
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    started = time.perf_counter()
    with torch.no_grad():
        answers = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    seconds = time.perf_counter() - started
    for answer in tokenizer.batch_decode(answers, skip_special_tokens=True):
        print(answer)
    print(f"\n{tokens} tokens for each of {len(prompts)} prompts in {seconds:.1f} s\n\n{odewei.report(model)}")
    odewei.close(model)


if __name__ == "__main__":
    main()
