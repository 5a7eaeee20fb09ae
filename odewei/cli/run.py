"""``odewei run``: text from the checkpoint in a folder, streamed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from odewei.cli.common import NBYTES, json_option, print_json, progress_console
from odewei.scheduler.budget import format_nbytes

if TYPE_CHECKING:
    from rich.status import Status

    from odewei.pretrained.generation import Progress

__all__ = ["command"]


@click.command("run")
@click.argument("model", metavar="MODEL_FOLDER")
@click.option("--prompt", required=True, help="The text to continue; '-' reads it from stdin.")
@click.option("--chat", is_flag=True, help="Format the prompt as a message, by the tokenizer's template.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(1))
@click.option("--memory-budget", type=NBYTES, help="Memory for weights.  [default: what the machine can spare]")
@click.option("--prefetch-depth", type=click.IntRange(0), help="Layers to read ahead.  [default: as the budget allows]")
@click.option("--device", default="cpu", show_default=True, help="Where to compute.")
@click.option("--dtype", default="auto", show_default=True, help="Of floating weights: bfloat16, say.")
@click.option(
    "--sample/--greedy", default=None, help="Draw tokens, or take the likeliest.  [default: as the folder says]"
)
@click.option("--seed", default=0, show_default=True, help="For --sample.")
@click.option("--revision", help="Of a repository on the hub, whose id may stand for MODEL_FOLDER.")
@click.option("--local-files-only", is_flag=True, help="Download nothing.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint.")
@json_option
def command(
    model: str,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    memory_budget: int | None,
    prefetch_depth: int | None,
    device: str,
    dtype: str,
    sample: bool | None,
    seed: int,
    revision: str | None,
    local_files_only: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Generate text with a model that need not fit in memory.

    MODEL_FOLDER has a config.json, weights and a tokenizer, as saved by transformers. The text is on stdout as it
    comes, tokens a second and memory are on stderr.
    """
    from odewei.pretrained.generation import Prompt, generate_text
    from odewei.pretrained.hub import locate
    from odewei.pretrained.options import StreamOptions, check_options

    options: StreamOptions = {
        "memory_budget": "auto" if memory_budget is None else memory_budget,
        "prefetch_depth": "auto" if prefetch_depth is None else prefetch_depth,
        "device": device,
    }
    check_options(dict(options))
    text = sys.stdin.read() if prompt == "-" else prompt
    with _quiet_transformers(), progress_console().status("reading the configuration") as status:
        folder = locate(model, revision=revision, local_files_only=local_files_only, with_code=trust_remote_code)
        out = _Output(status, shows_text=not as_json)
        answer, last = generate_text(
            folder,
            Prompt(text=text, max_new_tokens=max_new_tokens, chat=chat, sample=sample, seed=seed),
            on_text=out.text,
            on_progress=out.progress,
            dtype=dtype,
            trusts_code=trust_remote_code,
            options=options,
        )
    out.end()
    if as_json:
        print_json({"text": answer, **asdict(last), "tokens_per_second": last.tokens_per_second})
    progress_console().print(_line(last))


class _Output:
    """The text on stdout and the status line on stderr, which do not write over each other: where both are one
    terminal, the line ends with the first piece of text.
    """

    def __init__(self, status: Status, *, shows_text: bool) -> None:
        self._status = status
        self._shows_text = shows_text
        self._shares_terminal = shows_text and sys.stdout.isatty()
        self._wrote = False

    def text(self, piece: str) -> None:
        if not self._shows_text:
            return
        if self._shares_terminal:
            self._status.stop()
        self._wrote = True
        click.echo(piece, nl=False)

    def progress(self, progress: Progress) -> None:
        if not (self._shares_terminal and self._wrote):
            self._status.update(_line(progress))

    def end(self) -> None:
        if self._wrote:
            click.echo()


def _line(progress: Progress) -> str:
    speed = progress.tokens_per_second
    first = progress.first_token_seconds
    parts = [
        f"{progress.new_tokens} tokens",
        "" if speed is None else f"{speed:.2f} tokens/s",
        "" if first is None else f"first after {first:.2f} s",
        f"{format_nbytes(progress.peak_bytes)} of {format_nbytes(progress.budget_bytes)} used",
        f"weights {format_nbytes(progress.weight_bytes)}",
        f"read {format_nbytes(progress.bytes_read)}",
    ]
    return " · ".join(filter(None, parts))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No notes and progress bars of transformers on stderr meanwhile, if it is there."""
    try:
        from transformers.utils import logging
    except ImportError:
        yield
        return
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
