"""What the commands share: options, consoles, JSON, and how a mistake ends.

Knows click and rich, and of the library its errors and how it writes bytes. Light to import: every command is imported
for the help.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.markup import escape

from odewei.errors import OdeweiError
from odewei.scheduler.budget import parse_nbytes

__all__ = [
    "BUDGET",
    "INTERRUPTED",
    "NBYTES",
    "LazyGroup",
    "json_option",
    "mistakes_in_one_line",
    "plain",
    "plain_values",
    "print_json",
    "progress_console",
    "result_console",
    "silent_console",
]

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    _ParamType = click.ParamType[int]
else:  # older versions of click have no type arguments
    _ParamType = click.ParamType

_Decorated = TypeVar("_Decorated", bound=Callable[..., object])

_WIDE = 120  # columns

INTERRUPTED = 130
"""The exit status after Ctrl-C: 128 and the number of SIGINT, as shells have it."""


class _Nbytes(_ParamType):
    """Bytes, written as ``odewei`` takes them everywhere: ``4096``, ``6GB``, ``6GiB``."""

    name = "bytes"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_nbytes(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


NBYTES = _Nbytes()
"""The type of an option that is a number of bytes."""


class _Budget(_Nbytes):
    """A memory budget: bytes, or ``auto``."""

    name = "bytes|auto"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto":
            return value
        nbytes = super().convert(value, param, ctx)
        if nbytes == 0:
            self.fail("a budget of 0 bytes holds nothing", param, ctx)
        return nbytes


BUDGET = _Budget()
"""The type of an option that is a number of bytes or "auto"."""


def json_option(command: _Decorated) -> _Decorated:
    """A decorator: the flag ``--json``, which the command gets as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, and nothing else.")(
        command
    )


def plain(text: str) -> str:
    """Text from a file as it is written in a table: it may look like markup, or hold what moves a terminal's cursor."""
    return escape("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text))


def print_json(document: Mapping[str, object] | Sequence[object]) -> None:
    """The one document on stdout of a command that was asked for ``--json``. Raises ValueError for NaN and infinity."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def plain_values(result: DataclassInstance) -> dict[str, Any]:
    """A frozen result as JSON has it: dataclasses and tuples taken apart, paths as text."""
    found = json.loads(json.dumps(asdict(result), default=str))
    assert isinstance(found, dict)
    return found


def result_console() -> Console:
    """Where results are printed for people: stdout. A file or a pipe is wider than rich believes."""
    console = Console(highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=_WIDE)


def silent_console() -> Console:
    """Where results for people go when JSON was asked for: nowhere."""
    return Console(quiet=True)


def progress_console() -> Console:
    """Where progress is shown, with ``--json`` too: stderr."""
    return Console(highlight=False, stderr=True)


class LazyGroup(click.Group):
    """A group whose commands are modules of a package, imported when they are looked up.

    ``commands_in_order`` are their names; the command ``a-b`` is ``command`` in the module ``a_b`` of ``package``.
    Mistakes in any of them end in one line.
    """

    def __init__(self, *, package: str, commands_in_order: Sequence[str], **settings: Any) -> None:
        super().__init__(**settings)
        self._package = package
        self._in_order = tuple(commands_in_order)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._in_order)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._in_order:
            return None
        command = importlib.import_module(f"{self._package}.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        with mistakes_in_one_line():
            return super().invoke(ctx)


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Errors of the library and of the system end in one line and status 1, Ctrl-C in none and status 130.

    A pipe that was closed (``| head``) is left to click, which ends without a word. The group wraps every command in
    it; what is none of these is a bug, and keeps its traceback.
    """
    try:
        yield
    except OdeweiError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
