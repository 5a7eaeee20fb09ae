"""The command ``odewei``. Needs the extra ``cli``, and says so in one line where it is missing.

Knows the command line only; what a command does is elsewhere. Mistakes of the user are one line on stderr: exit status
2 for a command line that cannot be understood, 1 for everything else.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from odewei.errors import OdeweiError
from odewei.scheduler.budget import parse_nbytes

if TYPE_CHECKING:
    import click

__all__ = ["group", "main"]


def main() -> None:
    """The entry of the installed script; ends by SystemExit."""
    for module in ("click", "rich"):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            print(f'odewei needs {module} for its command line: pip install "odewei[cli]"', file=sys.stderr)
            raise SystemExit(1) from None
    group()(prog_name="odewei")


def group() -> click.Group:
    """The command with its subcommands. Raises ModuleNotFoundError where click is missing."""
    import click

    from odewei import __version__

    @click.group()
    @click.version_option(__version__, prog_name="odewei")
    def odewei() -> None:
        """Run PyTorch models whose weights do not fit in memory."""

    odewei.add_command(_demo())
    odewei.add_command(_align())
    return odewei


def _demo() -> click.Command:
    import click

    from odewei.demo.needs import default_cache_dir

    @click.command()
    @click.option("--size", default="2GiB", show_default=True, callback=_nbytes, help="Weights of the large model.")
    @click.option("--budget", callback=_nbytes, help="Memory for its weights.  [default: a quarter of them]")
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
    @click.pass_context
    def demo(
        context: click.Context,
        size: int,
        budget: int | None,
        cache_dir: Path,
        io: Literal["direct", "buffered", "auto"],
        tokens: int,
        passes: int,
        only: Literal["real-weights", "real-size"] | None,
    ) -> None:
        """Real weights and a real size: streamed and resident, side by side."""
        with _mistakes_in_one_line():
            from odewei.demo.show import DemoSettings, run_demo

            equal = run_demo(DemoSettings(cache_dir, size, budget, io, tokens, passes, only))
        context.exit(0 if equal else 1)

    return demo


def _align() -> click.Command:
    import click

    @click.command()
    @click.argument("source", type=click.Path(exists=True, path_type=Path))
    @click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
    def align(source: Path, folder: Path) -> None:
        """Copy a safetensors checkpoint so that it is read with less work.

        SOURCE is a file, an index or a folder; the copy in FOLDER is an ordinary checkpoint whose data lies at pages.
        """
        with _mistakes_in_one_line():
            from odewei.align import align as write

            write(source, folder, on_file=lambda file: click.echo(f"wrote {file}"))

    return align


def _nbytes(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    import click

    if value is None:
        return None
    try:
        return parse_nbytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@contextmanager
def _mistakes_in_one_line() -> Iterator[None]:
    import click

    try:
        yield
    except OdeweiError as error:
        raise click.ClickException(str(error)) from error
