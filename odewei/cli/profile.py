"""``odewei profile``: record a few passes of a checkpoint's model, and say what they wait for."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from odewei.cli.common import json_option, print_json, progress_console
from odewei.errors import OptionsError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from odewei.profiling import Timeline

__all__ = ["command"]


@click.command("profile")
@click.argument("checkpoint")
@click.option("--tokens", type=click.IntRange(1, 65536), default=64, show_default=True, help="Tokens a pass.")
@click.option("--passes", type=click.IntRange(1), default=3, show_default=True, help="Recorded passes.")
@click.option("--warm-up", type=click.IntRange(0), default=1, show_default=True, help="Passes before these.")
@click.option("--at-once", type=click.IntRange(1), default=1, show_default=True, help="Passes at the same time.")
@click.option("--memory-budget", default="auto", show_default=True, help='Memory for weights, "6GiB" say.')
@click.option("--device", default="cpu", show_default=True, help="Where to compute.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Where trace.json and timeline.png are written.  [default: here]",
)
@json_option
def command(
    checkpoint: str,
    tokens: int,
    passes: int,
    warm_up: int,
    at_once: int,
    memory_budget: str,
    device: str,
    out: Path,
    as_json: bool,
) -> None:
    """Record a few passes: what is read, copied, computed and waited for, layer by layer, and what would help.

    CHECKPOINT is a folder in the layout of Hugging Face, or the id of a repository. The inputs are random tokens.
    trace.json opens in ui.perfetto.dev and chrome://tracing; timeline.png needs the extra "plot".
    """
    out.mkdir(parents=True, exist_ok=True)
    import torch

    import odewei

    model = importlib.import_module("odewei").from_pretrained(checkpoint, memory_budget=memory_budget, device=device)
    try:
        one = _inputs(model, tokens)
        with torch.inference_mode():
            for _ in odewei.map(model, [one] * (warm_up * at_once), concurrency=at_once):
                pass
            with odewei.profile(model) as timeline:
                for _ in odewei.map(model, [one] * (passes * at_once), concurrency=at_once):
                    pass
    finally:
        odewei.close(model)
    files = _write(timeline, out)
    if as_json:
        print_json(_document(checkpoint, tokens, timeline, files))
    else:
        click.echo(str(timeline))


def _inputs(model: nn.Module, tokens: int) -> dict[str, torch.Tensor]:
    """Random tokens. Raises OptionsError for a model that takes something else."""
    import torch

    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if getattr(model, "main_input_name", None) != "input_ids" or not isinstance(vocabulary, int):
        raise OptionsError(
            f"a {type(model).__name__} does not take tokens only, and its inputs are not known here",
            cure="Call it inside of odewei.profile(model), in Python",
        )
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, tokens), generator=draw)
    ids = ids.to(next(model.parameters()).device)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids[:, :1]
    return found


def _write(timeline: Timeline, folder: Path) -> list[str]:
    """The names of the files that were written, which people are told of on stderr."""
    written = [folder / "trace.json"]
    timeline.save(written[0])
    console = progress_console()
    try:
        timeline.plot(folder / "timeline.png")
    except OptionsError as error:
        console.print(f"no timeline.png: {error}", markup=False, soft_wrap=True)
    else:
        written.append(folder / "timeline.png")
    for file in written:
        console.print(f"wrote {file}", markup=False, soft_wrap=True)
    return [str(file) for file in written]


def _document(checkpoint: str, tokens: int, timeline: Timeline, files: list[str]) -> dict[str, object]:
    return {
        "checkpoint": checkpoint,
        "tokens": tokens,
        "summary": timeline.summary.as_dict(),
        "advice": list(timeline.advice),
        "layers": [asdict(layer) for layer in timeline.layers],
        "files": files,
    }
