"""The weights of a checkpoint, with those that are there and cannot be read: errors only where they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from odewei.errors import CheckpointError
from odewei.loaders.base import WeightInfo
from odewei.loaders.names import Names

__all__ = ["KnownWeights", "named"]


class KnownWeights(Mapping[str, WeightInfo]):
    """What can be read, by name; to ask for what is ``refused`` raises its error. Iterating names the former only.

    A refused one *is* in the mapping (``in``), so that nobody takes it for missing.
    """

    def __init__(self, infos: Mapping[str, WeightInfo], refused: Mapping[str, CheckpointError]) -> None:
        self.infos, self.refused = infos, refused
        for error in refused.values():  # frames would keep what their callers have in hand, a model say
            error.__traceback__ = error.__context__ = None

    def __getitem__(self, name: str) -> WeightInfo:
        found = self.infos.get(name)
        if found is None:
            if name in self.refused:
                raise again(self.refused[name])
            raise KeyError(name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.infos or name in self.refused

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __repr__(self) -> str:
        return f"<KnownWeights: {len(self.infos)} weights, {len(self.refused)} refused>"


def again(error: CheckpointError) -> CheckpointError:
    """The same error, to be raised by another thread or for another time."""
    return type(error)(error.problem, module=error.module, weight=error.weight, file=error.file, cure=error.cure)


def named(found: Mapping[str, WeightInfo], names: Names, file: str | None) -> Mapping[str, WeightInfo]:
    """``found`` under the model's names, what is refused included. Raises CheckpointError as ``Names.apply`` does."""
    if not isinstance(found, KnownWeights) or not found.refused:
        return names.apply(found, file=file)
    every: dict[str, WeightInfo | CheckpointError] = {**found.refused, **found.infos}
    infos: dict[str, WeightInfo] = {}
    refused: dict[str, CheckpointError] = {}
    for name, value in names.apply(every, file=file).items():
        if isinstance(value, CheckpointError):
            refused[name] = value
        else:
            infos[name] = value
    return KnownWeights(infos, refused)
