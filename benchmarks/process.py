"""A contender's process as seen from outside: ask it something, get an answer or the reason why there is none."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.cgroup import Group

__all__ = ["ContenderError", "Process", "started"]

_ROOT = Path(__file__).parent.parent


class ContenderError(Exception):
    """The contender did not do what it was asked; the message is the reason, for the report."""


class Process:
    """One running contender. Not for several threads."""

    def __init__(self, process: subprocess.Popen[bytes], group: Group) -> None:
        self._process, self.group = process, group
        self._unread = b""

    def ask(self, do: str, *, timeout_seconds: float = 600.0, **request: Any) -> dict[str, Any]:
        """The answer to one request. Raises ContenderError with the reason where there is none."""
        self.tell(do, **request)
        return self.answer(timeout_seconds=timeout_seconds)

    def tell(self, do: str, **request: Any) -> None:
        """Send a request and do not wait; :meth:`answer` has to follow before the next one."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ContenderError(self._why_it_ended()) from None

    def answer(self, *, timeout_seconds: float = 600.0) -> dict[str, Any]:
        """The answer to what was told."""
        answer: dict[str, Any] = json.loads(self._line(timeout_seconds))
        if "error" in answer:
            raise ContenderError(answer["error"])
        return answer

    def _line(self, timeout_seconds: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + timeout_seconds
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise ContenderError(f"no answer within {timeout_seconds:.0f} s")
                more = os.read(descriptor, 1 << 16)
                if not more:
                    raise ContenderError(self._why_it_ended())
                self._unread += more
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "it was killed, most likely because it needed more memory than the limit allows"
        return f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


@contextmanager
def started(group: Group) -> Iterator[Process]:
    """A contender's process inside ``group``; whatever happens, it has ended afterwards."""
    enter = [argument for file in group.enter for argument in ("--enter", str(file))]
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contender", *enter],
            cwd=_ROOT,
            env=os.environ | quiet,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the runner only, which ends its contenders in order
        )
        try:
            yield Process(process, group)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let it leave by itself, which odewei's threads deserve; kill it where that takes long."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(timeout=1.0 if sys.exc_info()[0] is not None else 20.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        process.stdout.close()
