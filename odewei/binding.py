"""The real tensors of a model's resident units, and who is told what of them (see ``module_binding`` for modules).

The scheduler's side: the driver's thread publishes and retracts. It refers to modules weakly and to parameters not at
all, so that nothing here keeps a model alive: ``WeightStream`` is what parameters and hooks hold, and when the last of
them is gone the model's part in the scheduler ends.
"""

from __future__ import annotations

import collections
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

from odewei.copies import Skeleton
from odewei.looked_up import LookUps
from odewei.module_binding import Changes, IdleParameters, UnitBinding, idle_of
from odewei.placeholder import Home, Placeholder, take_over, with_dtype
from odewei.real import Real
from odewei.saved_weights import SavedWeights, WeightReference
from odewei.scheduler.forks import watch
from odewei.sliced import SlicedWeight
from odewei.survey import Modules, Weight
from odewei.uncompiled import uncompiled

__all__ = ["Binder", "WeightStream", "original_of"]

_binders: weakref.WeakSet[Binder] = weakref.WeakSet()


class WeightStream:
    """What the parameters and hooks of one streamed model hold. When nobody has it any more the model's stream ends."""

    __slots__ = ("__weakref__", "binder", "runtime", "saved")

    def __init__(self, binder: Binder) -> None:
        self.binder = binder
        self.saved = SavedWeights(_Weights())
        self.runtime: Any = None  # set when it is made

    def lease(self, home: Home, frame: FrameType) -> tuple[torch.Tensor, Callable[[], None]]:
        return self.binder.lease(home.unit, home.name, frame)

    def resident(self, home: Home) -> torch.Tensor | None:
        return self.binder.resident(home)

    def is_inside(self) -> bool:
        return self.binder.is_inside()

    def flag_changed(self, home: Home, requires_grad: bool) -> None:
        self.binder.flag_changed(home, requires_grad)

    def becomes_own(self, home: Home, nbytes: int) -> None:
        self.binder.becomes_own(home, nbytes)

    def moved(self, home: Home) -> None:
        self.binder.moved(home)

    def wrote(self, home: Home) -> None:
        if self.binder.on_write is not None:
            self.binder.on_write(home.unit)

    def is_edited(self) -> bool:
        return self.binder.on_write is not None

    def put_back(self, home: Home, tensor: torch.Tensor) -> None:
        self.binder.put_back(home, tensor)

    def expose(self, home: Home) -> torch.Tensor:
        return self.binder.expose(home)

    def saved_state(self, home: Home) -> torch.Tensor | None:
        return self.binder.saved_state(home)

    def kept_state(self, home: Home) -> torch.Tensor | None:
        return self.binder.kept_state(home)


class Binder:
    """The tensors of a model's resident units. The scheduler's client.

    ``publish`` and ``retract`` are called by whoever decides, one at a time; everything else by any thread.
    """

    def __init__(
        self,
        modules: Modules,
        units: Sequence[Sequence[Weight]],
        infos: Callable[[Weight], tuple[torch.dtype, tuple[int, ...] | None]],
        parts: Mapping[str, Any],
        device: torch.device,
        *,
        dtypes_known: bool,
    ) -> None:
        """``units[i]`` are the weights of unit i; ``infos`` gives each one's dtype when bound, and its stride;
        ``parts`` are what reads parts of tables and of experts; ``device`` is where all are when bound.
        ``dtypes_known``: none turns out to have another dtype when it is loaded.
        """
        self._dtypes_known = dtypes_known
        self._parts = parts
        self._units = units
        self._tensors: list[dict[str, Real] | None] = [None] * len(units)
        self._anchors: list[torch.Tensor | None] = [None] * len(units)
        self._kept: dict[int, dict[str, Real]] = {}  # of absent units: what somebody holds, or has written to
        self._flags: dict[str, bool] = {}  # of those that were frozen or unfrozen since
        self._changed: set[tuple[int, str]] = set()  # what was written without torch's notice
        self._exposed: dict[tuple[int, str], int] = {}  # what may be written without torch: the sum of its bytes
        self._storages: dict[int, tuple[int, str]] | None = None  # resident weights by address; None: never asked for
        self._access: Callable[[int, FrameType], None] = _not_yet
        self._release: Callable[[int], None] = _not_yet
        self.is_inside: Callable[[], bool] = lambda: False
        self.on_own: Callable[[str, int], None] = lambda name, nbytes: None
        self.saved_state: Callable[[Home], torch.Tensor | None] = lambda home: None
        self.kept_state: Callable[[Home], torch.Tensor | None] = lambda home: None
        self.on_write: Callable[[int], None] | None = None
        """Called after a write into a weight of a unit, where somebody edits the model (see ``edit``)."""
        self._written_before: dict[tuple[int, str], int] = {}  # versions of those that have left and come since
        self._clean: dict[tuple[int, str], int] = {}  # the versions of resident weights that are as in their files
        self.made: WeightStream | None = WeightStream(self)
        """To be taken once, and kept by what hangs on the model."""
        self.stream = weakref.ref(self.made)
        self._sides: list[weakref.ref[UnitBinding] | None] = [None] * len(units)
        self._modules: list[tuple[weakref.ref[nn.Module], ...]] = []
        for part in parts.values():
            if isinstance(part, SlicedWeight):
                part.experts.connect(weakref.ref(self))
        self._take_over(modules, infos, device, self.made)
        _binders.add(self)
        watch(self)

    def _take_over(
        self,
        modules: Modules,
        infos: Callable[[Weight], tuple[torch.dtype, tuple[int, ...] | None]],
        device: torch.device,
        stream: WeightStream,
    ) -> None:
        named = modules.named
        with torch.inference_mode(False), torch.no_grad():
            for index, unit in enumerate(self._units):
                found: dict[int, nn.Module] = {}
                changes = Changes()
                for weight in unit:
                    if weight.module is None:
                        continue  # one expert's part of a weight
                    parameter: Any = None
                    for use in weight.uses:
                        module = named[use.module]
                        found[id(module)] = module
                        own = module.__dict__
                        if type(own["_parameters"]) is not IdleParameters:
                            own["_parameters"] = IdleParameters(own["_parameters"], changes)
                        parameter = dict.__getitem__(own["_parameters"], use.local_name)
                    home = Home(stream, index, weight.name, self._parts.get(weight.name))
                    take_over(Placeholder, parameter, home, *infos(weight), device)
                self._modules.append(tuple(map(weakref.ref, found.values())))

    # -- modules -----------------------------------------------------------------------------------------------------

    def side(self, unit: int) -> UnitBinding:
        """What a module that the unit hangs on keeps: one for all of them."""
        side = self._living_side(unit)
        if side is None:
            side = UnitBinding(unit, self._modules[unit], self)
            self._sides[unit] = weakref.ref(side)
        return side

    def _living_side(self, unit: int) -> UnitBinding | None:
        """As ``side``, if a module has it."""
        reference = self._sides[unit]
        return None if reference is None else reference()

    def is_entered(self, unit: int) -> bool:
        """Whether a thread is inside a unit."""
        side = self._living_side(unit)
        return side is not None and side.is_entered

    def modules(self) -> Iterator[nn.Module]:
        """Those that have streamed weights, as the model was built."""
        found = {id(module): module for unit in self._modules for one in unit if (module := one()) is not None}
        return iter(found.values())

    def parameters(self, unit: int) -> Iterator[Placeholder]:
        """The parameters of a unit that are still where the model was built with them."""
        for reference in self._modules[unit]:
            module = reference()
            if module is not None:
                for value in idle_of(module.__dict__["_parameters"]).values():
                    if type(value) is Placeholder and value.home.unit == unit and value.home.stream is self.stream():
                        yield value

    def after_fork(self) -> None:
        """In the child: whatever is bound is right."""

    def connect(self, access: Callable[[int, FrameType], None], release: Callable[[int], None]) -> None:
        """``access`` returns when a unit is resident and leased by this thread for the call that runs in a frame;
        ``release`` returns the lease.
        """
        self._access, self._release = access, release

    # -- the driver's thread -----------------------------------------------------------------------------------------

    def publish(self, unit: int, tensors: Mapping[str, torch.Tensor]) -> None:
        flags = self._flags
        with torch.inference_mode(False), torch.no_grad():
            made = {
                weight.name: Real.of(tensors[weight.name], flags.get(weight.name, weight.requires_grad))
                for weight in self._units[unit]
            }
            # What a user does to a weight may take the unit's memory from it, but not from the unit. (`.data` is not
            # a view of a tensor that counts as one more over the memory.)
            largest = max(tensors.values(), key=torch.Tensor.numel, default=None)
            self._anchors[unit] = None if largest is None else largest.data
        made.update(self._kept.pop(unit, {}))
        self._tensors[unit] = made
        if self._clean:
            for weight in self._units[unit]:
                self._clean.pop((unit, weight.name), None)
        if self._storages is not None:
            self._note_storages(unit, made)

    def bind(self, unit: int) -> None:
        """Modules are bound when they are entered. Here only what was not known before the weights were."""
        tensors = self._tensors[unit]
        if self._dtypes_known or tensors is None:
            return
        for parameter in list(self.parameters(unit)):
            real = tensors.get(parameter.home.name)
            if real is not None and parameter.is_owner and parameter.dtype != real.dtype:
                with_dtype(parameter, real.dtype)

    def retract(self, unit: int) -> None:
        side = self._living_side(unit)
        if side is not None:
            side.clear()
        tensors, self._tensors[unit] = self._tensors[unit], None
        anchor, self._anchors[unit] = self._anchors[unit], None
        if tensors is None:
            return
        self._forget_storages(tensors)
        held = _held(tensors, anchor)
        kept = {name: real for name, real in tensors.items() if name in held or self._is_written(unit, name, real)}
        for name in [name for name in tensors if name not in kept and tensors[name]._version]:
            self._written_before[unit, name] = self.version(unit, name, tensors[name])  # what comes counts from 0
        if kept:
            self._kept[unit] = kept

    def clear(self) -> None:
        """Let go of all units, after the driver has stopped."""
        for unit in range(len(self._units)):
            self.retract(unit)
        self._kept.clear()

    def was_written(self, unit: int, *, is_held: bool = False) -> bool:
        """Whether somebody has changed a weight of a resident unit in place. ``is_held``: somebody may have a tensor
        of it, and write later.
        """
        tensors = self._tensors[unit]
        if tensors is None:
            return False
        for at, name in list(self._exposed):  # a copy, in one step: other threads expose weights meanwhile
            if at == unit:
                self._compare_exposed(unit, name, tensors[name])
                if not is_held:
                    self._exposed.pop((unit, name), None)
        return any(self._is_written(unit, name, real) for name, real in tensors.items())

    def _compare_exposed(self, unit: int, name: str, real: Real) -> None:
        """Notice what was written without torch into memory that was handed out, if it was. Any thread."""
        before = self._exposed.get((unit, name))
        if before is not None and _sum(real) != before:
            self._changed.add((unit, name))

    def _is_written(self, unit: int, name: str, real: Real) -> bool:
        """Whether a weight is not as in its file."""
        return real._version != self._clean.get((unit, name), 0) or (unit, name) in self._changed

    def is_saved(self, unit: int, versions: Mapping[str, int]) -> None:
        """The weights of a unit are in a file now as they were at these versions."""
        for name, version in versions.items():
            self._clean[unit, name] = version
            self._changed.discard((unit, name))

    def is_held(self, unit: int) -> bool:
        """Whether somebody has a tensor over the memory of a resident unit: one that was handed out, or a view."""
        side = self._living_side(unit)
        if side is not None:
            side.clear()  # what it holds is not somebody's
        tensors, anchor = self._tensors[unit], self._anchors[unit]
        return tensors is not None and bool(_held(tensors, anchor))

    # -- any thread --------------------------------------------------------------------------------------------------

    def resident(self, home: Home) -> Real | None:
        """The real parameter if it is loaded now; the reference keeps it."""
        return self.find(home.unit, home.name)

    def find(self, unit: int, name: str) -> Real | None:
        """As ``resident``."""
        tensors = self._tensors[unit]
        return None if tensors is None else tensors.get(name)

    def load(self, unit: int, name: str) -> Real:
        """An access outside of the hooks: wait for the unit, hand out the real parameter; the reference keeps it."""
        parameter, release = self.lease(unit, name, sys._getframe())
        release()
        return parameter

    @uncompiled
    def lease(self, unit: int, name: str, frame: FrameType) -> tuple[Real, Callable[[], None]]:
        """The real parameter, loaded if need be, and what returns its lease; that ends with ``frame`` at the latest."""
        part = self._parts.get(name)
        if isinstance(part, LookUps):
            part.table.keep_none()
        self._access(unit, frame)
        tensors = self._tensors[unit]
        assert tensors is not None, "a leased unit has no tensors"
        if isinstance(part, SlicedWeight):
            part.catch_up(tensors[name])
        return tensors[name], _Release(self._release, unit)

    def flag_changed(self, home: Home, requires_grad: bool) -> None:
        """The parameter was frozen or unfrozen."""
        self._flags[home.name] = requires_grad
        if isinstance(home.part, SlicedWeight):
            self._flags.update(dict.fromkeys(home.part.piece_names(), requires_grad))
        for unit in (home.unit, *(home.part.experts.units if isinstance(home.part, SlicedWeight) else ())):
            for name, real in (self._tensors[unit] or {}).items():
                if real.is_leaf and self._flags.get(name, real.requires_grad) != real.requires_grad:
                    real.requires_grad_(requires_grad)
            self._unbind(unit)

    def becomes_own(self, home: Home, nbytes: int) -> None:
        """The parameter is the user's own from now on."""
        self._unbind(home.unit)
        self.moved(home)
        self.on_own(home.name, nbytes)

    def moved(self, home: Home) -> None:
        """The parameter was put into a module, or taken out of one."""
        side = self._living_side(home.unit)
        if side is not None:
            side.look_again()

    def _unbind(self, unit: int) -> None:
        side = self._living_side(unit)
        if side is not None:
            side.clear()

    def put_back(self, home: Home, tensor: torch.Tensor) -> None:
        """``tensor`` is over the weight's memory, from which a function has taken the real tensor away."""
        tensors = self._tensors[home.unit]
        if tensors is not None and home.name in tensors:
            with torch.inference_mode(False), torch.no_grad():
                tensors[home.name] = Real.of(tensor.data, tensors[home.name].requires_grad)

    def expose(self, home: Home) -> Real:
        """The real parameter for whoever may write into it without torch."""
        real = self.load(home.unit, home.name)
        if not real._version and real.device.type == "cpu":
            self._exposed.setdefault((home.unit, home.name), _sum(real))
        return real

    def changed(self, home: Home) -> Real | None:
        """The parameter of a weight that was written to, loaded if need be; None if it is as in the checkpoint."""
        real = self.resident(home)
        if real is None:
            real = self._kept.get(home.unit, {}).get(home.name)
        if isinstance(home.part, SlicedWeight) and home.part.is_written():
            return self.load(home.unit, home.name)
        if real is not None:
            self._compare_exposed(home.unit, home.name, real)
        written = real is not None and self._is_written(home.unit, home.name, real)
        return self.load(home.unit, home.name) if written else None

    def refer(self, tensor: torch.Tensor) -> WeightReference | None:
        """A reference to what autograd saves, if it is a tensor over a weight."""
        if type(tensor) is Placeholder or tensor.layout is not torch.strided:
            return None
        if self._storages is None:
            self._storages = {}
            for unit, tensors in enumerate(self._tensors):
                self._note_storages(unit, tensors or {})
        try:
            place = self._storages.get(_address(tensor))
        except RuntimeError:  # no storage of its own: fake, wrapped
            return None
        if place is None or (real := self.find(*place)) is None or _address(real) != _address(tensor):
            return None
        return WeightReference(tensor, self.version(*place, real), _Load(self.stream(), *place))

    def version(self, unit: int, name: str, real: Real) -> int:
        """How often a weight was written to, whatever came and went."""
        return self._written_before.get((unit, name), 0) + real._version

    def _forget_storages(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if self._storages is not None:
            for real in tensors.values():
                self._storages.pop(_address(real), None)

    def _note_storages(self, unit: int, tensors: Mapping[str, torch.Tensor]) -> None:
        assert self._storages is not None
        for name, real in tensors.items():
            if real.numel():
                self._storages[_address(real)] = unit, name

    def owns(self, real: object) -> Placeholder | None:
        """The parameter that a real tensor stands for."""
        for unit, tensors in enumerate(self._tensors):
            for name, found in (tensors or {}).items():
                if found is real:
                    return next((one for one in self.parameters(unit) if one.home.name == name and one.is_owner), None)
            side = self._living_side(unit)
            owner = None if side is None else side.owns(real)
            if owner is not None:
                return owner
        return None

    def skeleton(self) -> Skeleton:
        """What stands for the weights in a copy of the model."""
        return Skeleton(self.stream(), self._weight, self.changed)

    def _weight(self, home: Home) -> Weight:
        return next(weight for weight in self._units[home.unit] if weight.name == home.name)


class _Weights:
    """Those of all models: of one that is a part of another, autograd saves weights under the other's hooks."""

    def refer(self, tensor: torch.Tensor) -> WeightReference | None:
        return next((found for binder in list(_binders) if (found := binder.refer(tensor)) is not None), None)


class _Release:
    """Returns a lease."""

    __slots__ = ("_release", "_unit")

    def __init__(self, release: Callable[[int], None], unit: int) -> None:
        self._release, self._unit = release, unit

    def __call__(self) -> None:
        self._release(self._unit)


class _Load:
    """Loads the storage that a reference leads to. Keeps the stream alive, as a graph keeps its weights."""

    __slots__ = ("_name", "_stream", "_unit")

    def __init__(self, stream: WeightStream | None, unit: int, name: str) -> None:
        self._stream, self._unit, self._name = stream, unit, name

    def __call__(self) -> tuple[torch.Tensor, int]:
        assert self._stream is not None, "somebody computes with its weights"
        binder = self._stream.binder
        real = binder.load(self._unit, self._name)
        return real, binder.version(self._unit, self._name, real)


def original_of(real: object) -> Placeholder | None:
    """The parameter of a streamed model that a real tensor stands for."""
    return next((found for binder in list(_binders) if (found := binder.owns(real)) is not None), None)


def _not_yet(*_: Any) -> None:
    raise AssertionError("an access before the model was ready")


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _held(tensors: Mapping[str, Real], anchor: torch.Tensor | None) -> set[str]:
    """Those that somebody else has, or a tensor over their memory."""
    storages = {name: real.untyped_storage() for name, real in tensors.items()}
    own = collections.Counter(storage._cdata for storage in storages.values())  # on a device all have the same
    if anchor is not None:
        own[anchor.untyped_storage()._cdata] += 1
    found = set()
    for name, real in tensors.items():
        storage = storages[name]._cdata
        if (
            sys.getrefcount(real) > _REFERENCES
            or real._use_count() > 1  # type: ignore[attr-defined]
            or _storage_references(storage) > own[storage] + 1  # Python has one for all of its own
        ):
            found.add(name)
    return found


def _references_in_a_loop() -> int:
    """What getrefcount says of a value of a dictionary while a loop goes over it: it depends on the interpreter."""
    found = {"": object()}
    for _, thing in found.items():
        return sys.getrefcount(thing)
    raise AssertionError


_REFERENCES = _references_in_a_loop()


def _storage_references(storage: int) -> int:
    """How many there are to a storage, in Python (one for all) and in torch."""
    found: int = torch._C._storage_Use_Count(storage)
    return found


def _sum(tensor: torch.Tensor) -> int:
    """A checksum of a tensor's bytes, wherever they lie in its storage."""
    with torch.no_grad():
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else None
    return 0 if flat is None else zlib.crc32(flat.numpy().data)
