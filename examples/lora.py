"""Fine-tuning: adapters (LoRA) are trained in memory, through frozen weights that stream in both directions.

Blocks are checkpointed: the backward pass computes each block again, so that its weights are needed, and in memory, one
block at a time, and the budget holds.

python examples/lora.py path/to/checkpoint text.txt --memory-budget 6GiB --output adapter
python examples/lora.py --tiny
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import odewei
from odewei.torch import init_on_demand_weights_model


def main() -> None:
    parser = argparse.ArgumentParser(description="Train adapters on the lines of a text file.")
    parser.add_argument("folder", nargs="?", type=Path, help="a checkpoint of transformers, as it was downloaded")
    parser.add_argument("text", nargs="?", type=Path, help="a text file, a sample a line")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and a few lines instead")
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"], help="layers that get an adapter")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--memory-budget", default="auto")
    parser.add_argument("--output", type=Path, help="where to write the adapter")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.tiny:
            from tiny import write_llama

            arguments.folder, arguments.text = write_llama(Path(scratch, "model")), Path(scratch, "text.txt")
            arguments.text.write_text("a b c d e\n" * 32)
            arguments.epochs, arguments.memory_budget = 5, "400KiB"  # less than half of the weights
        if arguments.folder is None or arguments.text is None:
            parser.error("give a folder and a text file, or --tiny")
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    config = AutoConfig.from_pretrained(arguments.folder)
    streamed = init_on_demand_weights_model(
        lambda: AutoModelForCausalLM.from_config(config), arguments.folder, memory_budget=arguments.memory_budget
    )
    streamed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    model = get_peft_model(streamed, LoraConfig(r=8, target_modules=arguments.targets)).train()
    model.print_trainable_parameters()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2 if arguments.tiny else 2e-4)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    losses = []
    for _ in range(arguments.epochs):
        for batch in batches(arguments.text, arguments.batch):
            inputs = tokenizer(batch, return_tensors="pt", padding=True, truncation=True, return_token_type_ids=False)
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            loss = model(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            print(f"step {len(losses)}: loss {losses[-1]:.3f}")
    print(odewei.report(streamed))
    if arguments.output is not None:
        model.save_pretrained(arguments.output)
    odewei.close(streamed)


def batches(path: Path, size: int) -> Iterator[list[str]]:
    lines = path.read_text().splitlines()
    return (lines[start : start + size] for start in range(0, len(lines), size))


if __name__ == "__main__":
    main()
