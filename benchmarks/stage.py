"""What every measurement needs: contenders' processes under their limits, an empty page cache, the plain read.

Knows processes, groups and the disk. Knows nothing of what is compared with what.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.cgroup import Limits
from benchmarks.disk import drop_files, drop_page_cache
from benchmarks.memory import touch
from benchmarks.process import Process, started
from benchmarks.record import PLAIN_TWIN
from benchmarks.settings import ALLOWANCE_BYTES, Settings

__all__ = ["SPARE_BYTES", "Stage"]

SPARE_BYTES = 1_000_000_000
"""Of memory that is touched, or has to be free, beyond what a contender needs."""


class Stage:
    """``notes`` are for the report, ``spent`` the seconds of the run by what they went into; ``say`` gets a line a
    step.
    """

    def __init__(self, settings: Settings, limits: Limits, say: Callable[[str], None]) -> None:
        self.settings, self.say = settings, say
        self.notes: list[str] = []
        self.spent: dict[str, float] = {}
        self.whole_cache = True  # could always be emptied as a whole
        self._limits = limits
        self._files = sorted(settings.checkpoint.glob("*.safetensors"))
        self._reader: Process | None = None
        self._bandwidth: float | None = None  # of the last plain read, if nothing was asked of anybody since
        self._count = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """While open, :meth:`bandwidth` has its reader."""
        with self.process("plain-read", None) as self._reader:
            yield
        self._reader = None

    @contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Note the seconds inside."""
        since = time.monotonic()
        try:
            yield
        finally:
            self.spent[what] = self.spent.get(what, 0.0) + time.monotonic() - since

    @contextmanager
    def process(self, label: str, limit_bytes: int | None) -> Iterator[Process]:
        """A contender's process in a group of its own; it has ended when the context is left."""
        self._count += 1
        with self._limits.group(f"{self._count}-{label}", limit_bytes) as group, started(group) as process:
            yield process

    def keywords(self, budget_bytes: int | None, limit_bytes: int) -> dict[str, Any]:
        """odewei's keywords. Its "auto" sees real limits only; without one it gets what the limit would have left."""
        if budget_bytes is None and self._limits.memory is None:
            budget_bytes = limit_bytes - ALLOWANCE_BYTES
        return {} if budget_bytes is None else {"memory_budget": budget_bytes}

    def launch(self, process: Process, contender: str, keywords: dict[str, Any], scratch: Path | None = None) -> None:
        """Let it import, without waiting; :meth:`imported` has to follow."""
        settings = self.settings
        name = "odewei" if contender == PLAIN_TWIN else contender
        where = {"folder": str(settings.checkpoint), "scratch": str(scratch or settings.folder)}
        process.tell("prepare", contender=name, keywords=keywords, **where)

    def imported(self, process: Process) -> None:
        """Wait until it has imported what it needs. Raises ContenderError."""
        with self.spending("imports"):
            process.answer()

    def empty_cache(self) -> None:
        """The whole page cache, which holds the libraries' own code as well, or what of it may be emptied."""
        self.whole_cache &= drop_page_cache(self._files)

    def start(
        self, process: Process, contender: str, tokens: int, needed_bytes: int, *, checkpoint_only: bool = False
    ) -> dict[str, Any]:
        """Empty the page cache, touch memory, build, first pass. Raises ContenderError.

        ``checkpoint_only``: keep what the page cache has of code; where the first pass is timed, it is what the imports
        have left there.
        """
        self.say(f"{contender}: build")
        with self.spending("building and first passes"):
            if checkpoint_only:
                drop_files(self._files)
            else:
                self.empty_cache()
            touch(needed_bytes + SPARE_BYTES)
            return self.ask(process, "start", tokens=tokens)

    def passes(self, process: Process, contender: str, tokens: int, *, uncounted: int, counted: int) -> dict[str, Any]:
        """Passes in a row. Raises ContenderError."""
        with self.spending(f"passes of {contender}"):
            return self.ask(process, "pass", tokens=tokens, uncounted=uncounted, counted=counted)

    def ask(self, process: Process, do: str, **request: Any) -> dict[str, Any]:
        """The answer of a contender that may use the disk and the processor for it. Raises ContenderError."""
        self._bandwidth = None
        return process.ask(do, timeout_seconds=self.settings.timeout_seconds, **request)

    def bandwidth(self) -> float:
        """Bytes a second of a plain read, now; the last one's where nothing has happened since."""
        assert self._reader is not None, "the stage is not open"
        if self._bandwidth is None:
            tries = 1 if self.settings.throttle_bytes else 4  # the disk's limit is not the buffers' luck
            with self.spending("plain reads"):
                files = [str(file) for file in self._files]
                answer = self.ask(self._reader, "read", files=files, tries=tries)
            if not answer["direct"] and not any("direct" in note for note in self.notes):
                self.notes.append("The file system takes no direct reads: the plain read went through the page cache.")
            self._bandwidth = float(answer["nbytes"] / answer["seconds"])
        return self._bandwidth
