"""Which of the checkpoint's names is which of the model's, where they differ by what was wrapped around the model.

Pure: names in, names out. Training leaves its wrappers in names: ``module.`` (data parallel), ``_orig_mod.``
(compiled), the attribute that held the model (``model.``, ``net.``), the key of a nested mapping (``state_dict.``,
``params_ema.``). A checkpoint of the bare model lacks what the model at hand is wrapped in. A *reading* is one way to
undo this. It is used only if it finds every weight of the model and no other reading does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["CONTAINERS", "WRAPPERS", "Reading", "find_prefix", "find_readings"]

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that torch's wrappers put in any place of a name; no author calls a module so."""

CONTAINERS = frozenset(
    {"module", "model", "net", "network", "state_dict", "model_state_dict", "model_state", "weights"}
)
"""Parts that say nothing of what they hold: only these may be replaced by another prefix, others are only removed."""

_MOST_PREFIXES = 200  # a hostile checkpoint has as many prefixes of one name as it has names
_ANCHORS = 16


@dataclass(frozen=True, slots=True)
class Reading:
    """``removed`` is taken off the checkpoint's names, then ``added`` is put before them; ``WRAPPERS`` do not count.

    ``names`` has the new name of each name of the checkpoint that begins with ``removed``; the others are left out.
    """

    removed: str
    added: str
    names: Mapping[str, str]

    def __str__(self) -> str:
        """The reading in words, for a log or a message."""
        parts = [f"without the prefix {self.removed!r}"] if self.removed else []
        parts += [f"with the prefix {self.added!r}"] if self.added else []
        wrapped = sorted({part for name in self.names for part in name.split(".") if part in WRAPPERS})
        parts += [f"without {', '.join(map(repr, wrapped))}"] if wrapped else []
        return " and ".join(parts) or "as they are"


def find_prefix(
    checkpoint_names: Iterable[str],
    model_names: Iterable[str],
    *,
    aliases: Mapping[str, Collection[str]] | None = None,
    partial: bool = False,
) -> dict[str, str] | None:
    """The model's name for each name of the checkpoint, by the only reading that fits; see ``find_readings``.

    Names of the checkpoint that the reading leaves out are not in the result. Returns None where the names fit as they
    are, where no reading fits, and where several do.
    """
    readings = find_readings(checkpoint_names, model_names, aliases=aliases, partial=partial)
    return dict(readings[0].names) if len(readings) == 1 else None


def find_readings(
    checkpoint_names: Iterable[str],
    model_names: Iterable[str],
    *,
    aliases: Mapping[str, Collection[str]] | None = None,
    partial: bool = False,
) -> list[Reading]:
    """All readings that fit; none where the names fit as they are.

    Args:
        checkpoint_names: All names of the checkpoint.
        model_names: The names of what the model needs, each weight once.
        aliases: The other names of a tied weight, by its name in ``model_names``: one of them is enough.
        partial: Where no reading finds all weights, and the names as they are find none: those that find the most.
    """
    checkpoint = list(dict.fromkeys(checkpoint_names))
    needed = [(name, *(aliases or {}).get(name, ())) for name in dict.fromkeys(model_names)]
    known = set(checkpoint)
    as_it_is = sum(any(name in known for name in names) for names in needed)
    if as_it_is == len(needed):
        return []
    bare = _by_bare_name(checkpoint)
    bare_needed = [tuple(map(_bare, names)) for names in needed]
    counted = {}
    for candidate in _candidates(bare, bare_needed, _ANCHORS if partial else 1):
        finds = (any(_source(name, *candidate) in bare for name in names) for names in bare_needed)
        counted[candidate] = sum(finds) if partial else len(needed) * all(finds)
    best = max(counted.values(), default=0)
    if best < len(needed) and not (partial and best and not as_it_is):
        return []
    fitting = [candidate for candidate, count in counted.items() if count == best]
    if ("", "") in fitting:  # only wrappers are in the way: nothing has to be guessed
        fitting = [("", "")]
    spelt = {_bare(name): name for names in needed for name in names}
    return [_reading(bare, spelt, *candidate) for candidate in fitting]


def _bare(name: str) -> str:
    """The name without the parts that wrappers have put in."""
    if not any(wrapper in name for wrapper in WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _by_bare_name(names: Sequence[str]) -> dict[str, str]:
    """The names by what they are without wrappers; where two are then the same, the one that has none."""
    found: dict[str, str] = {}
    for name in names:
        bare = _bare(name)
        if bare not in found or name == bare:
            found[bare] = name
    return found


def _source(name: str, removed: str, added: str) -> str | None:
    """What the checkpoint calls ``name`` if it is read so."""
    return removed + name[len(added) :] if name.startswith(added) else None


def _candidates(
    bare: Mapping[str, str], needed: Sequence[tuple[str, ...]], anchors: int
) -> dict[tuple[str, str], None]:
    """Readings that find one weight at least of a few: those with the longest names, which fit the fewest others."""
    found: dict[tuple[str, str], None] = {("", ""): None}
    first = min((names[0] for names in needed), default="")
    last = max((names[0] for names in needed), default="")  # what these two begin with, all between them do
    common = first[
        : next((at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    ]
    added = ["", *(common[: at + 1] for at, letter in enumerate(common) if letter == ".")]
    chosen = sorted(needed, key=lambda names: -len(names[0]))[:anchors]
    for front in added:
        for anchor in (name for names in chosen for name in names if name.startswith(front)):
            end = anchor[len(front) :]
            if end in bare:
                found["", front] = None
            for name in bare:
                if name.endswith(end) and name[: -len(end)].endswith("."):
                    removed = name[: -len(end)]
                    if not front or CONTAINERS.issuperset(removed[:-1].split(".")):
                        found[removed, front] = None
                if len(found) > _MOST_PREFIXES:
                    return found
    return found


def _reading(bare: Mapping[str, str], spelt: Mapping[str, str], removed: str, added: str) -> Reading:
    names = {}
    for name, original in bare.items():
        if name.startswith(removed) and len(name) > len(removed):
            new = added + name[len(removed) :]
            names[original] = spelt.get(new, new)  # the model may be wrapped itself
    return Reading(removed, added, names)
