"""Forks, and limits of the process that are really set. Each in a process of its own."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from odewei.errors import OdeweiError
from tests.soak.subject import WAYS, Subject, resident, save_shards, shrunk, subject
from tests.soak.table import Row, Wrong, fault

_MINUTES = 600


def _elsewhere(row: Row, what: str, full: bool) -> None:
    """Run a function of this module in a fresh process and take over its row."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.soak.processes", what, "full" if full else ""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_MINUTES, env=environment, check=False)
    if done.returncode:
        raise Wrong(f"a process ended with {done.returncode}: {done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    row.injected, row.fired = found["injected"], found["fired"]
    row.ends.update(found["ends"])
    row.notes += found["notes"]


@fault("a child forked while others compute and read", "processes")
def fork(row: Row, full: bool) -> None:
    _elsewhere(row, "_fork", full)


@fault("RLIMIT_NOFILE while it runs", "processes")
def no_files(row: Row, full: bool) -> None:
    _elsewhere(row, "_no_files", full)


@fault("RLIMIT_NOFILE while it is built", "processes")
def no_files_to_build(row: Row, full: bool) -> None:
    _elsewhere(row, "_no_files_to_build", full)


@fault("RLIMIT_AS while it runs", "processes")
def no_addresses(row: Row, full: bool) -> None:
    _elsewhere(row, "_no_addresses", full)


def _fork(row: Row, full: bool) -> None:
    for way in WAYS:
        with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model", **way) as one:
            stop, failed = threading.Event(), list[BaseException]()

            def work(one: Subject = one, stop: threading.Event = stop, failed: list[BaseException] = failed) -> None:
                try:
                    while not stop.is_set():
                        if not one.right(3):
                            raise Wrong("wrong numbers in the parent")
                except BaseException as error:
                    failed.append(error)

            threads = [threading.Thread(target=work) for _ in range(2)]
            for thread in threads:
                thread.start()
            for _ in range(100 if full else 6):
                row.note(fired=True, end=_in_child(one))
            stop.set()
            for thread in threads:
                thread.join()
            if failed:
                raise Wrong("the parent did not go on") from failed[0]
            one.recovered()


def _in_child(one: Subject) -> str:
    """What a pass comes to in a forked child. One that hangs is ended by an alarm."""
    child = os.fork()
    if not child:
        signal.alarm(30)
        try:
            end = 0 if one.right(4) else 1
        except OdeweiError as error:
            end = 2 if "forked" in str(error) and error.cure else 3
        except BaseException:
            end = 3
        os._exit(end)
    end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if end not in (0, 2):
        raise Wrong(f"a child ended with {end} (1: wrong numbers, 3: no clean error, -14: it hung)")
    return "right in the child" if end == 0 else "clean ClosedError in the child"


def _limited(kind: int, soft: int) -> Callable[[], object]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    return lambda: resource.setrlimit(kind, before)


def _no_files(row: Row, full: bool) -> None:
    from odewei.runtime import runtime_of

    for way in WAYS:
        with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model", **way) as one:
            for _ in range(20 if full else 1):
                runtime_of(one.streamed).account.files.close()
                end = one.inject(lambda: _limited(resource.RLIMIT_NOFILE, 3))
                if end == "right":
                    raise Wrong("files were opened beyond the limit")


def _no_files_to_build(row: Row, full: bool) -> None:
    """With more and more descriptors to be had, until the model is built."""
    import odewei

    model = resident()
    with tempfile.TemporaryDirectory() as scratch:
        index = save_shards(model, Path(scratch))
        before = len(os.listdir("/proc/self/fd"))
        for room in range(12):
            undo = _limited(resource.RLIMIT_NOFILE, before + room)
            streamed = None
            try:
                from tests.soak.subject import Net

                streamed = odewei.torch.init_on_demand_weights_model(Net, str(index.parent))
                one = Subject(model, streamed.eval(), Path(scratch), row)
                row.note(fired=True, end=one.passes(2))
            except OdeweiError as error:
                if not re.search(r"ulimit -n|too many", str(error), re.IGNORECASE) or not error.cure:
                    raise Wrong(f"no clean error: {error!r}") from error
                row.note(fired=True, end=f"clean {type(error).__name__}")
            finally:
                undo()
                if streamed is not None:
                    odewei.close(streamed)
    if not row.ends["right"] or len(row.ends) < 2:
        raise Wrong(f"the limit was never in the way, or always: {row.ends}")


def _no_addresses(row: Row, full: bool) -> None:
    """Room for less and less, with everything that was resident gone first; threads need room as well."""
    with tempfile.TemporaryDirectory() as scratch:
        for way in WAYS:
            for number, room in enumerate([0, 1 << 16, 1 << 19, 1 << 21] * (5 if full else 1)):
                folder = Path(scratch) / f"{number}-{way['prefetch_depth']}-{way['io']}"
                with subject(row, folder, **way) as one:
                    shrunk(one, lambda: None)
                    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
                    undo = _limited(resource.RLIMIT_AS, size * 1024 + room)
                    try:
                        end = _pass_in_little_memory(one)
                    finally:
                        undo()
                    row.note(fired=True, end=end)
                    one.recovered()


def _pass_in_little_memory(one: Subject) -> str:
    try:
        return one.passes(2)
    except Wrong as error:
        cause = error.__cause__
        if isinstance(cause, MemoryError) or "not enough memory" in str(cause) or "allocate memory" in str(cause):
            return "clean MemoryError of torch or Python"  # the model's own: activations
        raise


if __name__ == "__main__":
    found = Row(sys.argv[1])
    globals()[sys.argv[1]](found, bool(sys.argv[2:] and sys.argv[2]))
    print(json.dumps({"injected": found.injected, "fired": found.fired, "ends": found.ends, "notes": found.notes}))
