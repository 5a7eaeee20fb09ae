"""``odewei demo``: the demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from odewei.cli.common import (
    NBYTES,
    json_option,
    plain_values,
    print_json,
    progress_console,
    result_console,
    silent_console,
)
from odewei.demo.needs import default_cache_dir

__all__ = ["command"]


@click.command("demo")
@click.option("--size", default="2GiB", show_default=True, type=NBYTES, help="Weights of the large model.")
@click.option("--budget", type=NBYTES, help="Memory for its weights.  [default: a quarter of them]")
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=default_cache_dir,
    help="Where the large checkpoint is written once.  [default: the user's cache]",
)
@click.option("--io", type=click.Choice(["direct", "buffered", "auto"]), default="direct", show_default=True)
@click.option("--tokens", type=click.IntRange(1, 4096), default=64, show_default=True, help="Tokens a pass.")
@click.option("--passes", type=click.IntRange(1), default=3, show_default=True, help="Measured passes a mode.")
@click.option("--only", type=click.Choice(["real-weights", "real-size"]), help="One of the two parts.")
@json_option
@click.pass_context
def command(
    context: click.Context,
    size: int,
    budget: int | None,
    cache_dir: Path,
    io: Literal["direct", "buffered", "auto"],
    tokens: int,
    passes: int,
    only: Literal["real-weights", "real-size"] | None,
    as_json: bool,
) -> None:
    """Real weights and a real size: streamed and resident, side by side."""
    from odewei.demo.show import DemoSettings, run_demo

    settings = DemoSettings(cache_dir, size, budget, io, tokens, passes, only)
    console = silent_console() if as_json else result_console()
    result = run_demo(settings, console, progress_console())
    if as_json:
        print_json(plain_values(result) | {"equal": result.equal})
    context.exit(0 if result.equal else 1)
