"""One process of the fuzzer: it judges a stretch of cases with 64 MiB to spare, and says at each which one it is at.

A process of its own, because a case may end it (a crash in C, a kill): the parent then knows the case by its number.
"""

import json
import mmap
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .case import Case
from .cases import KINDS, make_case
from .judge import judge, watch_the_process

__all__ = ["SPARE_NBYTES", "WARM_UP_NBYTES", "Failure", "Findings", "describe", "limit_memory", "run_stretch", "shrink"]

SPARE_NBYTES = 64 << 20
"""What a case may make the process larger by, its file not counted."""

WARM_UP_NBYTES = 512 << 20
"""More, for what is made once, and not so much that a case could take all that the machine has."""

_WARM_UP_CASES = 150
_SHRINK_SECONDS = 5.0


@dataclass
class Failure:
    """A case that was not handled well. ``content`` is the file, made smaller as far as that was quick, in hex."""

    number: int
    kind: str
    problem: str
    content: str = ""


@dataclass
class Findings:
    """Of one stretch of cases: how many of each kind ended how, and how much larger the process was at most."""

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    grown_nbytes: int = 0


def run_stretch(seed: int, first: int, last: int, kind: str | None, at: "mmap.mmap | bytearray") -> Findings:
    """Judge the cases ``first`` to ``last`` (not included); the number of the current one stands in ``at``."""
    watch_the_process()
    folder = Path(tempfile.mkdtemp(prefix="odewei-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    findings = Findings()
    counts: dict[str, Counter[str]] = {}
    try:
        limit_memory(WARM_UP_NBYTES)
        for number in range(-1, -_WARM_UP_CASES - 1, -1):  # what is made once is not what a case takes
            for one in KINDS if kind is None else (kind,):
                _quietly(make_case(seed, number, one), folder)
        before = _status("VmRSS")
        limit_memory(SPARE_NBYTES)
        for number in range(first, last):
            at[:8] = struct.pack("<q", number)
            case = make_case(seed, number, kind)
            try:
                outcome = judge(case, folder)
            except Exception as error:
                outcome = "FAILED"
                if len(findings.failures) < 20:
                    small = shrink(case, folder, type(error))
                    findings.failures.append(Failure(number, case.kind, describe(error), small.content.hex()))
            counts.setdefault(case.kind, Counter())[outcome] += 1
        findings.grown_nbytes = max(0, _status("VmHWM") - before)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    findings.counts = {name: dict(found) for name, found in counts.items()}
    return findings


def limit_memory(spare_nbytes: int) -> None:
    """Let this process become larger by so many bytes only."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + spare_nbytes, hard))


def shrink(case: Case, folder: Path, error: type[Exception]) -> Case:
    """A smaller case that fails with the same kind of exception: pieces are cut out, large ones first."""
    until = time.monotonic() + _SHRINK_SECONDS
    size = len(case.content) // 2
    while size:
        start = 0
        while start < len(case.content) and time.monotonic() < until:
            smaller = case.with_content(case.content[:start] + case.content[start + size :])
            if isinstance(_quietly(smaller, folder), error):
                case = smaller
            else:
                start += size
        size //= 2
    return case


def describe(error: BaseException) -> str:
    """What was raised, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:300]} ({Path(frame.filename).name}:{frame.lineno})"


def _quietly(case: Case, folder: Path) -> Exception | None:
    try:
        judge(case, folder)
    except Exception as error:
        return error
    return None


def _status(name: str) -> int:
    """A size of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise LookupError(name)


def main() -> None:
    """``python -m tests.fuzz.child SEED FIRST LAST KIND FILE``: the findings on stdout, as JSON."""
    seed, first, last, kind, name = sys.argv[1:]
    with open(name, "r+b") as file, mmap.mmap(file.fileno(), 8) as at:
        findings = run_stretch(int(seed), int(first), int(last), kind or None, at)
    json.dump(asdict(findings), sys.stdout)


if __name__ == "__main__":
    main()
