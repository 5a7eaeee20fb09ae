"""What an action is: a name, a function of one side and plain arguments, and how the arguments are drawn.

An action does the same to both models and returns what it saw; it knows not which of the two it has. Arguments are
plain values (names, numbers), so that a sequence can be printed, run again and made shorter.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .side import Inapplicable, Side

__all__ = ["ACTIONS", "Action", "Draw", "Step", "action"]

Arguments = dict[str, Any]
Step = tuple[str, Arguments]


class Draw:
    """Chooses arguments by looking at the ordinary model."""

    def __init__(self, rng: random.Random, side: Side) -> None:
        self.rng, self.side = rng, side

    def one(self, choices: Any) -> Any:
        """One of them; without any, the action is not for this model."""
        choices = list(choices)
        if not choices:
            raise Inapplicable("nothing to choose from")
        return self.rng.choice(choices)

    def seed(self) -> int:
        return self.rng.randrange(1000)

    def module(self, *kinds: type[nn.Module], but: tuple[type[nn.Module], ...] = ()) -> str:
        """The name of a module of one of the kinds; not the model itself."""
        found = self.side.model.named_modules()
        return self.one(name for name, one in found if name and isinstance(one, kinds) and not isinstance(one, but))

    def parameter(self, wanted: Callable[[str, nn.Parameter], bool] = lambda name, parameter: True) -> str:
        found = self.side.model.named_parameters(remove_duplicate=False)
        return self.one(name for name, parameter in found if wanted(name, parameter))

    def via(self) -> str:
        return self.rng.choice(("iteration", "attribute", "get"))

    def layers(self, least: int = 2) -> str:
        """The name of a list of layers, with so many in it."""
        found = self.side.model.named_modules()
        kinds = nn.ModuleList | nn.Sequential
        return self.one(name for name, one in found if name and isinstance(one, kinds) and len(one) >= least)

    def kept(self, prefix: str) -> str:
        return self.one(key for key in self.side.kept if key.startswith(prefix))


@dataclass(frozen=True)
class Action:
    """``holds``: afterwards the user may hold weights in memory, or has written some; ``ends``: it is the last one."""

    name: str
    run: Callable[..., object]
    draw: Callable[[Draw], Arguments]
    often: float
    holds: bool
    ends: bool
    only: Callable[[Side], bool]


ACTIONS: dict[str, Action] = {}


def action(
    draw: Callable[[Draw], Arguments] = lambda draw: {},
    *,
    often: float = 1.0,
    holds: bool = False,
    ends: bool = False,
    only: Callable[[Side], bool] = lambda side: True,
) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Enter a function under its name. ``often``: how often it is chosen, among others; ``only``: for which models."""

    def enter(run: Callable[..., object]) -> Callable[..., object]:
        name = run.__name__
        assert name not in ACTIONS, name
        ACTIONS[name] = Action(name, run, draw, often, holds, ends, only)
        return run

    return enter
