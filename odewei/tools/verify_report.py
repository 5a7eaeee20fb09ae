"""What was found of a checkpoint's files, as objects, as plain values and for people to read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["FileReport", "VerifyReport"]


@dataclass(frozen=True, slots=True)
class FileReport:
    """What was found of one file. ``weights`` is None for one that has none of its own, an index, or could not be read.

    ``sha256`` is what its bytes have, None if that was not asked for. ``sum_from`` is where the sum that it should have
    was found, None if nowhere; an archive (.npz, .pt) for which none is kept has those of its entries in itself.
    ``problems`` are sentences; there are none if all is well.
    """

    path: Path
    nbytes: int
    weights: int | None
    sha256: str | None
    sum_from: str | None
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` has found; ``print`` it for a list of the files."""

    path: Path
    files: tuple[FileReport, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that is wrong, in the order of the files."""
        return tuple(problem for file in self.files for problem in file.problems)

    @property
    def ok(self) -> bool:
        """Whether nothing is."""
        return not self.problems

    @property
    def unsummed(self) -> tuple[Path, ...]:
        """Files whose bytes were compared with nothing."""
        return tuple(file.path for file in self.files if file.sum_from is None)

    def as_dict(self) -> dict[str, object]:
        """The same as plain values, for JSON."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "files": [
                {
                    "path": str(file.path),
                    "nbytes": file.nbytes,
                    "weights": file.weights,
                    "sha256": file.sha256,
                    "sum_from": file.sum_from,
                    "problems": list(file.problems),
                }
                for file in self.files
            ],
        }

    def __str__(self) -> str:
        lines = []
        for file in self.files:
            held = "" if file.weights is None else f", {file.weights} weights"
            how = "sum not known" if file.sum_from is None else f"sum of {_shown(Path(file.sum_from).name)}"
            if file.sum_from == str(file.path):
                how = "sums of its entries"
            state = "WRONG" if file.problems else "whole"
            lines.append(f"{state}  {_shown(file.path)}  ({file.nbytes} bytes{held}, {how})")
            lines += [f"       {problem}" for problem in file.problems]
        return "\n".join(lines)


def _shown(path: Path | str) -> str:
    """A name without what a terminal would obey or cannot print: it may come from the index."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(path))
