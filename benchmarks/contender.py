"""One contender's process: ``python -m benchmarks.contender [--enter FILE]...``.

Enters its control groups before it imports anything large. Then it answers requests, one line of JSON each way, on
standard input and output; what libraries print goes to standard error. Ends when its input ends.

- ``{"do": "read", "files": [...]}``: seconds and bytes of a plain read. Knows no model.
- ``{"do": "prepare", "contender": ..., "folder": ..., "scratch": ..., "keywords": {...}}``: imports, which no time
  counts.
- ``{"do": "start", "tokens": n}``: build the model, make one pass; seconds of both.
- ``{"do": "pass", "tokens": n, "uncounted": n, "counted": n}``: passes in a row, nothing between them.
- ``{"do": "pair", "folder": ..., "budget_bytes": n}`` and ``{"do": "pair_pass", "tokens": n, "counted": n}``, to the
  resident model: odewei with room for everything beside it in one process, by turns.
- ``{"do": "report"}``: what odewei says of itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["main"]


class _Contender:
    """The state between requests: the plain reader, or the model."""

    def __init__(self) -> None:
        self._reader: Any = None
        self._make: Callable[[], Any] | None = None
        self._model: Any = None
        self._pair: dict[str, Any] = {}
        self._is_odewei = False

    def read(self, files: list[str], tries: int) -> dict[str, Any]:
        from benchmarks.disk import PlainReader

        if self._reader is None:
            self._reader = PlainReader([Path(file) for file in files], tries)
        return {"seconds": self._reader.read(), "nbytes": self._reader.nbytes, "direct": self._reader.direct}

    def prepare(self, contender: str, folder: str, scratch: str, keywords: dict[str, Any]) -> dict[str, Any]:
        from benchmarks.peers import CONTENDERS, Job

        self._make = CONTENDERS[contender](Job(folder=Path(folder), scratch=Path(scratch), keywords=keywords))
        self._is_odewei = contender == "odewei"
        return {}

    def start(self, tokens: int) -> dict[str, Any]:
        import torch

        assert self._make is not None, "prepare comes first"
        started = time.perf_counter()
        self._model = self._make()
        built = time.perf_counter()
        logits = self._forward(tokens)
        ended = time.perf_counter()
        return {
            "build_seconds": built - started,
            "first_seconds": ended - started,
            "bits": [_bits(logits)],
            "threads": torch.get_num_threads(),
        }

    def pair(self, folder: str, budget_bytes: int) -> dict[str, Any]:
        from benchmarks.peers import CONTENDERS, Job

        assert self._model is not None, "start comes first"
        job = Job(folder=Path(folder), scratch=Path(folder), keywords={"memory_budget": budget_bytes})
        self._pair = {"odewei": CONTENDERS["odewei"](job)(), "resident": self._model}
        return {}

    def pair_pass(self, tokens: int, counted: int) -> dict[str, Any]:
        """Two passes that are not counted, then ``counted`` pairs; who goes first alternates."""
        seconds: dict[str, list[float]] = {name: [] for name in self._pair}
        bits: dict[str, set[str]] = {name: set() for name in self._pair}
        for index in range(counted + 2):
            for name in sorted(self._pair, reverse=index % 2 == 1):
                self._model = self._pair[name]
                started = time.perf_counter()
                logits = self._forward(tokens)
                if index >= 2:
                    seconds[name].append(time.perf_counter() - started)
                bits[name].add(_bits(logits))
        return {"seconds": seconds, "bits": {name: sorted(found) for name, found in bits.items()}}

    def run(self, tokens: int, uncounted: int, counted: int) -> dict[str, Any]:
        outputs = [self._forward(tokens) for _ in range(uncounted)][-1:]
        seconds, disk, read = [], [self._disk_bytes()], [self._read_bytes()]
        for _ in range(counted):
            started = time.perf_counter()
            logits = self._forward(tokens)
            seconds.append(time.perf_counter() - started)
            disk.append(self._disk_bytes())
            read.append(self._read_bytes())
        outputs.append(logits)
        return {
            "seconds": seconds,
            "disk_bytes": _differences(disk),
            "read_bytes": _differences(read),
            "bits": sorted({_bits(output) for output in outputs}),
        }

    def report(self) -> dict[str, Any]:
        if not self._is_odewei:
            return {"report": None, "text": ""}
        import odewei

        report = odewei.report(self._model)
        return {"report": dataclasses.asdict(report), "text": str(report)}

    def _forward(self, tokens: int) -> Any:
        """Logits of all tokens. The same ids for everyone."""
        import torch

        ids = torch.arange(tokens).reshape(1, tokens) % 1000
        with torch.no_grad():
            return self._model(ids, use_cache=False).logits

    def _disk_bytes(self) -> int:
        """What this process has had read from disks so far, page cache misses included; 0 where that is unknown."""
        try:
            lines = Path("/proc/self/io").read_text().splitlines()
        except OSError:
            return 0
        return int(dict(line.split(": ") for line in lines)["read_bytes"])

    def _read_bytes(self) -> int:
        """What odewei says it has read so far."""
        if not self._is_odewei:
            return 0
        import odewei

        return odewei.report(self._model).bytes_read


def _differences(values: list[int]) -> list[int]:
    return [after - before for before, after in itertools.pairwise(values)]


def _bits(logits: Any) -> str:
    """A short hash of a tensor's bytes."""
    import torch

    return hashlib.sha256(logits.contiguous().view(torch.uint8).numpy()).hexdigest()[:16]


def _enter(arguments: list[str]) -> None:
    """Put this process into the control groups named by ``--enter FILE``."""
    for file in arguments:
        if file != "--enter":
            Path(file).write_text(str(os.getpid()))


def main() -> None:
    """Answer requests until there are no more, or until one fails."""
    _enter(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this one ends it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender = _Contender()
    requests = {
        "read": contender.read,
        "prepare": contender.prepare,
        "start": contender.start,
        "pass": contender.run,
        "pair": contender.pair,
        "pair_pass": contender.pair_pass,
        "report": contender.report,
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = requests[request.pop("do")](**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
