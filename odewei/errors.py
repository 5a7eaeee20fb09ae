"""Every error that odewei raises on purpose.

    OdeweiError
    ├── OptionsError (also ValueError)       a keyword of a public function has a value that cannot work
    │   └── BudgetTooSmallError              no order of reading fits; the message says the smallest that works
    ├── CheckpointError                      the checkpoint cannot be used as it is
    │   ├── CheckpointNotFoundError (also FileNotFoundError)
    │   ├── CorruptCheckpointError           a header, index or archive contradicts itself or its file
    │   ├── UnsafeCheckpointError            a file asks to run code or to read outside its folder
    │   ├── MissingWeightError               the model needs a weight that the checkpoint does not have
    │   └── WeightMismatchError              shape or dtype of a weight does not fit the model
    ├── ModelError                           the model cannot be built or used without its weights
    │   └── TraceError                       the order of the layers cannot be found out, saved or used
    ├── MissingPackageError (also ImportError)  an optional package is needed; the message names the extra
    ├── WeightReadError                      reading a weight failed while the model ran; its cause is chained
    └── ClosedError                          the model was closed, or its scheduler thread has died

Each message names the module, the weight and the file as far as they are known, and ends with the cure.
"""

from __future__ import annotations

__all__ = [
    "BudgetTooSmallError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ClosedError",
    "CorruptCheckpointError",
    "MissingPackageError",
    "MissingWeightError",
    "ModelError",
    "OdeweiError",
    "OptionsError",
    "TraceError",
    "UnsafeCheckpointError",
    "WeightMismatchError",
    "WeightReadError",
]


class OdeweiError(Exception):
    """Base of all errors of this library.

    Attributes hold what is known of the place, for programs; the message holds the same for people.
    """

    def __init__(
        self,
        problem: str,
        *,
        module: str | None = None,
        weight: str | None = None,
        file: str | None = None,
        cure: str | None = None,
    ) -> None:
        self.problem, self.module, self.weight, self.file, self.cure = problem, module, weight, file, cure
        super().__init__(problem)

    def __str__(self) -> str:
        place = [
            f"{what} {name!r}"
            for what, name in (("module", self.module), ("weight", self.weight), ("file", self.file))
            if name is not None
        ]
        where = f" ({', '.join(place)})" if place else ""
        return f"{self.problem}{where}" + (f". {self.cure}" if self.cure else "")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.problem, self.module, self.weight, self.file, self.cure))


def _rebuild(
    kind: type[OdeweiError], problem: str, module: str | None, weight: str | None, file: str | None, cure: str | None
) -> OdeweiError:
    return kind(problem, module=module, weight=weight, file=file, cure=cure)


class OptionsError(OdeweiError, ValueError):
    """A keyword of a public function has a value that cannot work."""


class BudgetTooSmallError(OptionsError):
    """The memory budget is smaller than what must be in memory at one moment."""


class CheckpointError(OdeweiError):
    """The checkpoint cannot be used as it is."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A file or folder of the checkpoint does not exist."""


class CorruptCheckpointError(CheckpointError):
    """A header, index or archive contradicts itself or the file it is in."""


class UnsafeCheckpointError(CheckpointError):
    """A file of the checkpoint asks to run code, or to read outside its folder."""


class MissingWeightError(CheckpointError):
    """The model needs a weight that the checkpoint does not have."""


class WeightMismatchError(CheckpointError):
    """Shape or dtype of a weight in the checkpoint does not fit the model."""


class ModelError(OdeweiError):
    """The model cannot be built or used without its weights."""


class TraceError(ModelError):
    """The order of the layers cannot be found out by a dry run, or not be saved, or a saved one not be used."""


class MissingPackageError(OdeweiError, ImportError):
    """A package that is not among odewei's own dependencies is needed for this, and cannot be imported."""


class WeightReadError(OdeweiError):
    """Reading a weight failed while the model ran. The cause is chained as ``__cause__``."""


class ClosedError(OdeweiError):
    """The model was closed, or the thread that reads its weights has died."""
