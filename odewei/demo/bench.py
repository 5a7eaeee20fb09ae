"""A short benchmark for whoever has odewei installed: the disk, then one model streamed, its plain twin, and resident.

Knows only the public face of odewei, and needs no other package. The benchmark with peers, memory limits and many
rounds is in the repository (``make bench``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from odewei.demo.plain_llama import plain_model_fn
from odewei.demo.real_size import ModeFigures, RealSizeResult, RealSizeSettings, run_real_size
from odewei.demo.synthetic import LlamaShape
from odewei.loaders.base import CheckpointFile
from odewei.measure import DiskSample, sample_disk

__all__ = ["BenchResult", "BenchSettings", "run_bench"]


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """The checkpoint in ``folder`` has ``shape``; ``passes`` are measured at each number of ``tokens``."""

    folder: Path
    shape: LlamaShape
    budget_bytes: int
    tokens: Sequence[int]
    passes: int
    io: Literal["auto", "direct", "buffered"] = "direct"


@dataclass(frozen=True, slots=True)
class BenchResult:
    """``runs``: one for each number of tokens. ``disk``: the faster of a plain read before and after all of them."""

    settings: BenchSettings
    disk: DiskSample
    runs: tuple[RealSizeResult, ...]

    @property
    def equal(self) -> bool:
        """False when any pass gave other bits than the model in memory."""
        return all(run.equal for run in self.runs)

    def floor_seconds(self, run: RealSizeResult, figures: ModeFigures) -> float | None:
        """What no scheduler can beat: computing with all weights in memory, and a plain read of the same bytes.

        None where the model in memory was left out.
        """
        resident = next((mode.median_seconds for mode in run.modes if mode.mode == "resident"), None)
        return None if resident is None else max(resident, figures.read_bytes / self.disk.bandwidth)


def run_bench(settings: BenchSettings, announce: Callable[[str], None] = lambda _: None) -> BenchResult:
    """Run everything; ``announce`` is told what comes next. Raises OdeweiError."""
    files = [CheckpointFile.stat(file) for file in sorted(settings.folder.glob("*.safetensors"))]
    samples = [_sample(files, settings, announce)]
    runs = []
    for tokens in settings.tokens:
        run = RealSizeSettings(
            folder=settings.folder,
            shape=settings.shape,
            budget_bytes=settings.budget_bytes,
            io=settings.io,
            tokens=tokens,
            passes=settings.passes,
        )
        build = plain_model_fn(settings.shape)
        announced = _with_tokens(announce, tokens)
        runs.append(run_real_size(run, announced, build=build, without_init=nullcontext))
    samples.append(_sample(files, settings, announce))
    return BenchResult(settings, max(samples, key=lambda sample: sample.bandwidth), tuple(runs))


def _sample(files: Sequence[CheckpointFile], settings: BenchSettings, announce: Callable[[str], None]) -> DiskSample:
    announce("plain reads")
    sample = sample_disk(files, direct=settings.io != "buffered")
    assert sample is not None, "the checkpoint has files"
    return sample


def _with_tokens(announce: Callable[[str], None], tokens: int) -> Callable[[str], None]:
    return lambda mode: announce(f"{mode}, {tokens} tokens a pass")
