"""Embeddings of many documents. One reading of the weights serves a whole batch, so batches are large.

python examples/embed.py path/to/checkpoint documents.txt --memory-budget 2GiB --output embeddings.npy
python examples/embed.py --tiny
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

import odewei
from odewei.torch import init_on_demand_weights_model


def main() -> None:
    parser = argparse.ArgumentParser(description="Embed the lines of a text file.")
    parser.add_argument("folder", nargs="?", type=Path, help="a checkpoint of transformers, as it was downloaded")
    parser.add_argument("documents", nargs="?", type=Path, help="a text file, a document a line")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and a few documents instead")
    parser.add_argument("--batch", type=int, default=64, help="documents that share one reading of the weights")
    parser.add_argument("--memory-budget", default="auto")
    parser.add_argument("--output", type=Path, help="where to write the embeddings, as .npy")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.tiny:
            from tiny import write_bert

            arguments.folder, arguments.documents = write_bert(Path(scratch)), Path(scratch, "documents.txt")
            arguments.documents.write_text("\n".join("abcdefgh"[place % 8 :] for place in range(100)))
            arguments.memory_budget = "100KiB"  # less than half of it
        if arguments.folder is None or arguments.documents is None:
            parser.error("give a folder and a text file, or --tiny")
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    config = AutoConfig.from_pretrained(arguments.folder)
    model = init_on_demand_weights_model(
        lambda: AutoModel.from_config(config),
        arguments.folder,
        memory_budget=arguments.memory_budget,
        on_missing="init",  # some checkpoints lack a pooling layer, which mean pooling does not use
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    found = []
    started = time.perf_counter()
    for batch in batches(arguments.documents, arguments.batch):
        found.append(embed(model, tokenizer, batch))
    embeddings = np.concatenate(found)
    seconds = time.perf_counter() - started
    print(f"{len(embeddings)} documents in {seconds:.1f} s: {len(embeddings) / seconds:.1f} a second")
    print(odewei.report(model))
    odewei.close(model)
    if arguments.output is not None:
        np.save(arguments.output, embeddings)


def batches(path: Path, size: int) -> Iterator[list[str]]:
    with path.open() as lines:
        while batch := [line.strip() for line in islice(lines, size)]:
            yield batch


def embed(model: torch.nn.Module, tokenizer: object, documents: list[str]) -> np.ndarray:
    """The mean of a document's token vectors, of length 1."""
    inputs = tokenizer(documents, return_tensors="pt", padding=True, truncation=True)
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    means = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(means.float(), dim=-1).numpy()


if __name__ == "__main__":
    main()
