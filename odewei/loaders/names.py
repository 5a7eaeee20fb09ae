"""What the model calls the weights of a checkpoint. Pure: names in, names out.

A weight that was renamed is found under the model's name and keeps the checkpoint's in its ``WeightInfo``, so that
messages name what is in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from odewei.errors import CheckpointError, MissingWeightError, OptionsError

__all__ = ["Names", "Rename", "brief"]

Rename = Mapping[str, str | None] | Callable[[str], str | None]
"""From the checkpoint's name to the model's; None leaves the weight out. A mapping keeps names that it lacks."""

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Names:
    """``prefix`` is taken off first, as it is written ("model."); weights without it are left out. What remains goes
    through ``rename``.
    """

    rename: Rename | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.prefix, str):
            raise OptionsError(
                f"prefix={self.prefix!r} is not a text",
                cure='Give what names in the checkpoint begin with, such as "model."',
            )
        if not (self.rename is None or isinstance(self.rename, Mapping) or callable(self.rename)):
            raise OptionsError(
                f"rename={self.rename!r} is neither a mapping nor a function",
                cure="Give a mapping, or a function, from the checkpoint's name to the model's",
            )

    def apply(self, found: Mapping[str, _Value], *, file: str | None = None) -> dict[str, _Value]:
        """``found`` under the model's names, in the same order; ``file`` is for messages.

        Raises CheckpointError when two weights would have one name, or nothing has the prefix, MissingWeightError
        when ``rename`` maps what the checkpoint lacks.
        """
        if self.rename is None and not self.prefix:
            return dict(found)
        kept = self._without_prefix(found, file)
        if isinstance(self.rename, Mapping):
            _check_known(self.rename, kept, file)
        sources: dict[str, str] = {}
        for short, source in kept.items():
            name = self._new(short, file)
            if name is None:
                continue
            if name in sources:
                raise CheckpointError(
                    f"two weights of the checkpoint, {sources[name]!r} and {source!r}, would both be called {name!r}",
                    weight=source,
                    file=file,
                    cure="Have rename give each its own name, or None for one of them",
                )
            sources[name] = source
        return {name: found[source] for name, source in sources.items()}

    def values(self, found: Mapping[str, _Value]) -> dict[str, _Value]:
        """What is no weight, under the model's names. ``rename`` is not checked: that it knows weights is enough."""
        short = {name.removeprefix(self.prefix): value for name, value in found.items() if name.startswith(self.prefix)}
        names = {name: self._new(name, None) for name in short}
        return {new: short[name] for name, new in names.items() if new is not None}

    def metadata(self, found: object) -> dict[str, Mapping[str, object]]:
        """What ``state_dict()`` keeps of each module, by the model's names of modules, as far as that can be told: a
        ``rename`` is of weights, and whoever renames a state dictionary by hand loses it too.
        """
        if self.rename is not None or not isinstance(found, Mapping):
            return {}
        kept = {f"{path}.": values for path, values in found.items() if isinstance(values, Mapping)}
        return {
            path.removeprefix(self.prefix).removesuffix("."): values
            for path, values in kept.items()
            if path.startswith(self.prefix)
        }

    def _without_prefix(self, found: Mapping[str, object], file: str | None) -> dict[str, str]:
        kept = {name.removeprefix(self.prefix): name for name in found if name.startswith(self.prefix)}
        if found and not kept:
            raise CheckpointError(
                f"no weight's name begins with {self.prefix!r}; the names are {brief(found)}",
                file=file,
                cure="Give the prefix as it is in the names, with its dot",
            )
        return kept

    def _new(self, name: str, file: str | None) -> str | None:
        if self.rename is None:
            return name
        new: object = self.rename.get(name, name) if isinstance(self.rename, Mapping) else self.rename(name)
        if new is None or isinstance(new, str):
            return new
        raise OptionsError(
            f"rename gives {new!r}, a {type(new).__qualname__}, for a name",
            weight=name,
            file=file,
            cure="Have it return the model's name, or None to leave the weight out",
        )


def _check_known(rename: Mapping[str, str | None], kept: Mapping[str, str], file: str | None) -> None:
    for name in rename:
        if name not in kept:
            raise MissingWeightError(
                f"rename maps a weight that the checkpoint does not have; the names are {brief(kept)}",
                weight=str(name),
                file=file,
                cure="Correct the name (without the prefix, if one is given), or take it out of rename",
            )


def brief(names: Collection[str]) -> str:
    """A few of the names, for a message."""
    shown = ", ".join(repr(name) for name in list(names)[:5]) or "none"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
