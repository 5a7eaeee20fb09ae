"""The names of a checkpoint read so that they fit a model: without what training has wrapped around them.

Knows names of modules and weights. Which readings there are ``loaders.prefixes`` says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn

from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.known_weights import KnownWeights
from odewei.loaders.prefixes import WRAPPERS, Reading, find_readings
from odewei.matched_loader import RenamedLoader
from odewei.survey import Modules

__all__ = ["all_found", "names_of", "readings_of"]

_log = logging.getLogger("odewei")
_Value = TypeVar("_Value")


def all_found(modules: Modules, known: Mapping[str, WeightInfo]) -> bool:
    """Whether the checkpoint has every parameter under a name that it has in the model."""
    lacking: set[int] = set()
    found: set[int] = set()
    for prefix, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                (found if (f"{prefix}.{name}" if prefix else name) in known else lacking).add(id(parameter))
    return lacking <= found


def readings_of(
    model: nn.Module, source: WeightsLoader, names: Mapping[str, list[str]], partial: bool
) -> Iterator[WeightsLoader]:
    """``source`` under the names that the model has, if only one reading of its names gives them. Then, where wrappers
    are a part of these, without them: wrappers' own hooks may put them in.
    """
    known, values = source.weights(), source.values()
    refused = known.refused if isinstance(known, KnownWeights) else {}
    readings = find_readings(
        [*known, *refused, *values], names, aliases={name: found[1:] for name, found in names.items()}, partial=partial
    )
    if len(readings) > 1:
        _log.warning("several readings of the checkpoint's names fit the model, none is used: %s", _brief(readings))
    if len(readings) != 1:
        return
    reading = readings[0]
    _log.info("the names of the checkpoint are read %s", reading)
    bare = replace(reading, names={old: _bare(new) for old, new in reading.names.items()})
    spelt = {_bare(name): name for name, _ in model.named_modules(remove_duplicate=False)}
    for one, paths in [(reading, spelt)] + [(bare, {})] * (bare != reading):
        infos, lacking = _renamed(known, one), _renamed(refused, one)
        yield RenamedLoader(
            source,
            KnownWeights(infos, lacking) if lacking else infos,
            _renamed(values, one),
            _metadata_read_so(source.metadata(), one, paths),
        )


def _renamed(found: Mapping[str, _Value], reading: Reading) -> dict[str, _Value]:
    return {reading.names[name]: value for name, value in found.items() if name in reading.names}


def names_of(
    model: nn.Module, is_special: Callable[[nn.Module], bool]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """All names of each parameter, by its first; and only those outside of modules that may do something with names
    (``is_special``).
    """
    found: dict[int, list[str]] = {}
    special: set[int] = set()
    apart: tuple[str, ...] = ()
    if type(model).load_state_dict is not nn.Module.load_state_dict or "load_state_dict" in vars(model):
        apart = ("",)
    for prefix, module in model.named_modules(remove_duplicate=False):
        if is_special(module):
            apart = (*apart, f"{prefix}." if prefix else "")
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{prefix}.{name}" if prefix else name
                found.setdefault(id(parameter), []).append(full)
                if full.startswith(apart):
                    special.add(id(parameter))
    names = {one[0]: one for one in found.values()}
    return names, {one[0]: one for key, one in found.items() if key not in special}


def _metadata_read_so(
    metadata: Mapping[str, Mapping[str, object]], reading: Reading, spelt: Mapping[str, str]
) -> dict[str, Mapping[str, object]]:
    found = {}
    for path, values in metadata.items():
        bare = _bare(f"{path}.")
        if bare.startswith(reading.removed):
            new = (reading.added + bare[len(reading.removed) :]).removesuffix(".")
            found[spelt.get(new, new)] = values
    return found


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _brief(readings: Sequence[Reading]) -> str:
    return "; ".join(map(str, readings[:4])) + ("; ..." if len(readings) > 4 else "")
