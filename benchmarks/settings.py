"""The options of a run, checked once. Knows numbers and text only."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from odewei.demo.needs import default_cache_dir
from odewei.demo.synthetic import LlamaShape
from odewei.scheduler.budget import parse_nbytes

__all__ = ["ALLOWANCE_BYTES", "DEFAULT_PEERS", "PEERS", "Settings", "parse_settings"]

ALLOWANCE_BYTES = 600_000_000
"""What a process may use beside weights: torch itself takes about 0.35 GB, activations and buffers some more."""

DEFAULT_PEERS = ("accelerate", "mmap", "airllm", "transformers")
PEERS = (*DEFAULT_PEERS, "accelerate-dat")

_FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run. ``budget_bytes`` None is odewei's own "auto"; ``budgets`` are per cent of the weights.

    ``tokens`` are the token counts of the figures; sweeps over budgets run at the first of them.
    """

    shape: LlamaShape
    limit_bytes: int
    budget_bytes: int | None
    tokens: tuple[int, ...]
    passes: int
    budgets: tuple[int, ...]
    peers: tuple[str, ...]
    sweep_peers: tuple[str, ...]
    throttle_bytes: int | None
    disk_bytes: int
    folder: Path
    results: Path

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.shape.nbytes()

    @property
    def layer_bytes(self) -> int:
        """Bytes of one decoder layer."""
        return self.shape.with_layers(1).nbytes() - self.shape.with_layers(0).nbytes()

    @property
    def unit_bytes(self) -> int:
        """Bytes of the largest thing that is read as one: a decoder layer, or a table of the vocabulary."""
        return max(self.layer_bytes, self.table_bytes)

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint is or will be."""
        return self.folder / f"{self.shape.name}-by-layer"

    @property
    def table_bytes(self) -> int:
        """Bytes of a table of the vocabulary: the embedding's or the head's."""
        return self.shape.vocab * self.shape.hidden * 2

    @property
    def shard_bytes(self) -> int:
        """The size of the checkpoint's files: that of a layer, so that each layer has a file of its own."""
        return self.layer_bytes

    @property
    def has_file_a_layer(self) -> bool:
        """Whether files of ``shard_bytes`` hold exactly one module each. A smaller table would share its file.

        AirLLM 4.0.0 makes hard links to such files; of others it writes its own copy.
        """
        return self.table_bytes >= self.layer_bytes

    @property
    def needs_disk_again(self) -> frozenset[str]:
        """Peers that write every weight once more, and for which ``disk_bytes`` is too little."""
        if 2 * self.weight_bytes <= self.disk_bytes:
            return frozenset()
        return frozenset({"accelerate-dat"} if self.has_file_a_layer else {"accelerate-dat", "airllm"})

    @property
    def timeout_seconds(self) -> float:
        """How long a contender may take for one request: on a throttled disk every one of its passes takes longer."""
        reads = 4 * (self.passes + 2) * self.weight_bytes
        return 600.0 + (reads / self.throttle_bytes if self.throttle_bytes else 0.0)

    @property
    def throttled_seconds(self) -> float:
        """About how long a throttled disk will take to deliver what the run reads; 0 without a throttle.

        In checkpoints read: a pass of a contender that keeps nothing is one, odewei makes two for each that counts.
        """
        if self.throttle_bytes is None:
            return 0.0
        peers = sum(len(self.tokens_of(peer)) * self.passes + 1 for peer in self.peers)
        main = len(self.tokens) * (3 * self.passes + 1) * 0.8 + self.passes + 2
        sweeps = sum((3 * self.passes + 3) * (1 - percent / 100) for percent in self.budgets)
        sweeps += len(self.sweep_peers) * (self.passes + 1) if self.budgets else 0
        plain = self.passes + 2 * len(self.tokens) + len(self.peers) + 2 * len(self.budgets) + 5
        return (peers + main + sweeps + plain) * self.weight_bytes / self.throttle_bytes

    def sweep_budget_bytes(self, percent: int) -> int:
        """The budget that is ``percent`` per cent of the weights."""
        return self.weight_bytes * percent // 100

    def tokens_of(self, peer: str) -> tuple[int, ...]:
        """The token counts a peer is measured at.

        transformers puts weights on the disk through accelerate, by the same hooks and the same reads; it is measured
        at the first count only.
        """
        return self.tokens[:1] if peer == "transformers" else self.tokens


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from the command line. Exits with a message for what cannot work."""
    parser = _parser()
    options = parser.parse_args(arguments)
    return Settings(
        shape=options.size,
        limit_bytes=options.limit,
        budget_bytes=None if options.budget == "auto" else options.budget,
        tokens=options.tokens,
        passes=options.passes,
        budgets=options.budgets,
        peers=options.peers,
        sweep_peers=tuple(peer for peer in options.sweep_peers if peer in options.peers),
        throttle_bytes=options.throttle,
        disk_bytes=options.disk,
        folder=options.folder.absolute(),
        results=options.results,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure odewei and its peers in one run; writes benchmarks/results/DATE-HOST.md, .json, .png.",
        epilog="Sizes are bytes, or text such as 4.15GB or 6GiB. Lists are separated by commas; '' is an empty one.",
    )
    add = parser.add_argument
    add("--size", type=_shape, default="4.15GB", help="bytes of the model's weights (default: %(default)s)")
    add("--limit", type=_nbytes, default="1.5GB", help="memory limit of each process (default: %(default)s)")
    add("--budget", type=_budget, default="auto", help="odewei's budget under that limit (default: %(default)s)")
    add("--tokens", type=_counts, default="1,128,512", help="token counts of the passes (default: %(default)s)")
    add("--passes", type=_positive, default=5, help="measured passes, at least (default: %(default)s)")
    add("--budgets", type=_percents, default="25,50,75", help="budgets to sweep over, in %% of the weights")
    add("--peers", type=_peers, default=",".join(DEFAULT_PEERS), help=f"of {', '.join(PEERS)} (default: %(default)s)")
    add("--sweep-peers", type=_peers, default="accelerate", help="peers to run under the largest of the budgets too")
    add(
        "--throttle",
        type=_nbytes,
        help="bytes a second that the disk may deliver to each process (default: no limit); the default run reads some "
        "150 checkpoints, which takes a quarter of an hour at 1GB, an hour at 200MB",
    )
    add(
        "--disk",
        type=_nbytes,
        default="6GB",
        help="the most disk to use; accelerate-dat needs two checkpoints' (default: %(default)s)",
    )
    add("--folder", type=Path, default=default_cache_dir(), help="where the checkpoint is kept (default: %(default)s)")
    add("--results", type=Path, default=_FOLDER, help="where the report goes")
    return parser


def _nbytes(text: str) -> int:
    nbytes = parse_nbytes(text)
    if nbytes <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size")
    return nbytes


def _shape(text: str) -> LlamaShape:
    return LlamaShape.near(_nbytes(text))


def _budget(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else _nbytes(text)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1")
    return number


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(_positive(part) for part in _list(text))
    if not counts or len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different token counts")
    return counts


def _percents(text: str) -> tuple[int, ...]:
    percents = tuple(sorted(_positive(part) for part in _list(text)))
    if any(percent >= 100 for percent in percents):
        raise argparse.ArgumentTypeError("all weights in memory are measured anyway; name less than 100")
    return percents


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(_list(text)))
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not known; known are {', '.join(PEERS)}")
    return names
