"""The command ``odewei``. Needs the extra ``cli``, and says so in one line where it is missing.

Knows the command line only; what a command does is elsewhere. Each command is a module of this package, with its
``click.Command`` under the name ``command``, and is imported when it is used. Results are on stdout, and what is only
to be watched (progress, what was written where) on stderr. Exit status: 0; 1 for what failed, or was found to be
wrong; 2 for a command line that cannot be understood; 130 after Ctrl-C. Mistakes of the user are one line on stderr.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click

__all__ = ["COMMANDS", "group", "main"]

# In the order of the help. A command of two words, "a-b", is the module a_b.
COMMANDS = (
    "demo",
    "inspect",
    "plan",
    "bench",
    "align",
    "verify",
    "run",
    "profile",
)


def main() -> None:
    """The entry of the installed script; ends by SystemExit."""
    try:
        for module in ("click", "rich"):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise
                print(f'odewei needs {module} for its command line: pip install "odewei[cli]"', file=sys.stderr)
                raise SystemExit(1) from None
        group()(prog_name="odewei")
    except KeyboardInterrupt:  # while modules are imported; later the group sees to it
        raise SystemExit(130) from None


def group() -> click.Group:
    """The command with its subcommands. Raises ModuleNotFoundError where click is missing."""
    import click

    from odewei import __version__
    from odewei.cli.common import LazyGroup

    @click.group(cls=LazyGroup, package=__name__, commands_in_order=COMMANDS)
    @click.version_option(__version__, prog_name="odewei")
    def odewei() -> None:
        """Run PyTorch models whose weights do not fit in memory."""

    return odewei
