"""A real size: a large checkpoint under a small budget, without prefetch, with it, and resident, side by side.

The three run one after another in one process, on the same input, and never hold two models at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from safetensors import safe_open

import odewei
from odewei.demo.needs import need_package
from odewei.demo.synthetic import LlamaShape, model_fn
from odewei.loaders import open_checkpoint
from odewei.scheduler.budget import format_nbytes
from odewei.scheduler.machine import available_bytes
from odewei.torch import init_on_demand_weights_model

__all__ = ["ModeFigures", "RealSizeResult", "RealSizeSettings", "run_real_size"]

_Build = Callable[[], torch.nn.Module]

_RESIDENT_ROOM = 1.25  # weights, and what a pass needs beside them


@dataclass(frozen=True, slots=True)
class RealSizeSettings:
    """What to run: ``tokens`` tokens a pass, one first pass and ``passes`` measured ones in each mode."""

    folder: Path
    shape: LlamaShape
    budget_bytes: int
    io: Literal["auto", "direct", "buffered"] = "direct"
    tokens: int = 64
    passes: int = 3


@dataclass(frozen=True, slots=True)
class ModeFigures:
    """One mode's figures.

    ``first_seconds`` is from nothing to the first output, building and (resident) loading included;
    ``seconds`` has one entry a measured pass; ``read_bytes`` is the mean a measured pass. ``equal`` says whether every
    pass gave the bits of the resident model, None when there was none to compare with.
    """

    mode: str
    first_seconds: float
    seconds: tuple[float, ...]
    read_bytes: int
    peak_bytes: int
    equal: bool | None

    @property
    def median_seconds(self) -> float:
        """Of the measured passes."""
        return median(self.seconds)


@dataclass(frozen=True, slots=True)
class RealSizeResult:
    """All modes that ran, in order; odewei's report of the last streamed one; why the resident one was left out."""

    settings: RealSizeSettings
    weights_bytes: int
    modes: tuple[ModeFigures, ...]
    report: str
    resident_skipped: str | None

    @property
    def equal(self) -> bool:
        """False when any pass gave other bits than the model in memory."""
        return all(figures.equal is not False for figures in self.modes)


@dataclass(frozen=True, eq=False, slots=True)
class _Passes:
    """What a model did: outputs of all passes, the first one's included, and the figures that are known so far."""

    mode: str
    first_seconds: float
    seconds: tuple[float, ...]
    logits: tuple[torch.Tensor, ...]
    read_bytes: int
    peak_bytes: int
    report: str = ""

    def compared_with(self, reference: torch.Tensor | None) -> ModeFigures:
        equal = None if reference is None else all(torch.equal(logits, reference) for logits in self.logits)
        return ModeFigures(self.mode, self.first_seconds, self.seconds, self.read_bytes, self.peak_bytes, equal)


def run_real_size(
    settings: RealSizeSettings,
    announce: Callable[[str], None] = lambda _: None,
    *,
    build: _Build | None = None,
    without_init: Callable[[], AbstractContextManager[object]] | None = None,
) -> RealSizeResult:
    """Run all modes; ``announce`` is told what comes next. The checkpoint has to be there, and is only read.

    ``build`` makes the model, ``without_init`` has it draw no random weights; by default it is that of transformers.
    Raises OdeweiError when transformers is needed and not installed, or checkpoint or budget cannot be used.
    """
    weights_bytes = settings.shape.nbytes()
    if build is None or without_init is None:  # imports are no part of any mode's time
        need_package("transformers", 'Install it with: pip install "odewei[hf]"')
        from transformers.initialization import no_init_weights

        build, without_init = model_fn(settings.shape), no_init_weights
    announce("streamed, without prefetch")
    runs = [_streamed(build, settings, "streamed, no prefetch", prefetch_depth=0)]
    announce("streamed, with prefetch")
    runs.append(_streamed(build, settings, "streamed, prefetch", prefetch_depth="auto"))
    report = runs[-1].report
    skipped = _why_not_resident(weights_bytes)
    reference = None
    if skipped is None:
        announce("resident")
        runs.append(_resident(build, without_init, settings, weights_bytes))
        reference = runs[-1].logits[0]
    modes = tuple(run.compared_with(reference) for run in runs)
    return RealSizeResult(settings, weights_bytes, modes, report, skipped)


def _why_not_resident(weights_bytes: int) -> str | None:
    available = available_bytes()
    needed = int(weights_bytes * _RESIDENT_ROOM)
    if available >= needed:
        return None
    return f"it needs {format_nbytes(needed)} of memory, {format_nbytes(available)} are available"


def _streamed(
    build: _Build, settings: RealSizeSettings, mode: str, *, prefetch_depth: int | Literal["auto"]
) -> _Passes:
    start = time.perf_counter()
    model = init_on_demand_weights_model(
        build,
        open_checkpoint(settings.folder),
        memory_budget=settings.budget_bytes,
        prefetch_depth=prefetch_depth,
        io=settings.io,
    )
    try:
        logits = [_forward(model, settings)]
        first_seconds = time.perf_counter() - start
        before = odewei.report(model).bytes_read
        seconds, more = _measure(model, settings)
        report = odewei.report(model)
    finally:
        odewei.close(model)
    return _Passes(
        mode=mode,
        first_seconds=first_seconds,
        seconds=seconds,
        logits=(*logits, *more),
        read_bytes=(report.bytes_read - before) // settings.passes,
        peak_bytes=report.peak_bytes,
        report=str(report),
    )


def _resident(
    build: _Build,
    without_init: Callable[[], AbstractContextManager[object]],
    settings: RealSizeSettings,
    weights_bytes: int,
) -> _Passes:
    start = time.perf_counter()
    with without_init():
        model = build()
    _load_resident(model, settings)
    first = _forward(model, settings)
    first_seconds = time.perf_counter() - start
    seconds, more = _measure(model, settings)
    return _Passes("resident", first_seconds, seconds, (first, *more), read_bytes=0, peak_bytes=weights_bytes)


def _load_resident(model: torch.nn.Module, settings: RealSizeSettings) -> None:
    """The model as without odewei: given the checkpoint's weights, file by file.

    Weights are cloned: torch aligns its own memory, and the last bits that kernels give depend on that.
    """
    missing = set(settings.shape.weights)
    for path in sorted(settings.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
        model.load_state_dict(weights, strict=False, assign=True)
        missing -= weights.keys()
    assert not missing, missing


def _measure(model: torch.nn.Module, settings: RealSizeSettings) -> tuple[tuple[float, ...], list[torch.Tensor]]:
    seconds, outputs = [], []
    for _ in range(settings.passes):
        start = time.perf_counter()
        outputs.append(_forward(model, settings))
        seconds.append(time.perf_counter() - start)
    return tuple(seconds), outputs


def _forward(model: torch.nn.Module, settings: RealSizeSettings) -> torch.Tensor:
    """Logits of the same random tokens each time."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(settings.shape.vocab, (1, settings.tokens), generator=generator)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    assert isinstance(logits, torch.Tensor)
    return logits
