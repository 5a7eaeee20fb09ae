"""``make fuzz``: hostile files by the hundred thousand, and how many of them ended how.

The same seed makes the same cases. A case that fails is printed with its number and its bytes; ``--number`` runs it
alone, in this process, with its traceback.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .cases import KINDS, make_case
from .child import SPARE_NBYTES, Failure, Findings
from .judge import judge, watch_the_process

_STRETCH = 5000
_LONGEST_SECONDS = 1800


def main() -> int:
    """The exit status: 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--number", type=int, help="run this one case here, and print its content")
    options = parser.parse_args()
    if options.number is not None:
        return _run_one(options.seed, options.number, options.kind)
    begun = time.monotonic()
    findings = _run_all(options.seed, options.cases, options.kind)
    _print_counts(findings, options.seed, time.monotonic() - begun)
    for failure in findings.failures:
        print(f"\nFAILED: case {failure.number} of seed {options.seed}, {failure.kind}: {failure.problem}")
        if failure.content:
            print(f"bytes.fromhex({failure.content[:4000]!r}{'...' if len(failure.content) > 4000 else ''})")
    return 1 if findings.failures else 0


def _run_one(seed: int, number: int, kind: str | None) -> int:
    case = make_case(seed, number, kind)
    print(case)
    watch_the_process()
    with tempfile.TemporaryDirectory() as folder:
        print(judge(case, Path(folder) / "case"))
    return 0


def _run_all(seed: int, cases: int, kind: str | None) -> Findings:
    """Stretch by stretch; a process that a case has ended is followed by one that begins behind it."""
    found = Findings()
    first = 0
    while first < cases:
        last = min(first + _STRETCH, cases)
        part, first = _stretch(seed, first, last, kind)
        for name, counts in part.counts.items():
            found.counts[name] = dict(Counter(found.counts.get(name, {})) + Counter(counts))
        found.failures += part.failures
        found.grown_nbytes = max(found.grown_nbytes, part.grown_nbytes)
        if sys.stderr.isatty():
            print(f"\r{first:,} of {cases:,} cases, {len(found.failures)} failed", end="", file=sys.stderr)
    return found


def _stretch(seed: int, first: int, last: int, kind: str | None) -> tuple[Findings, int]:
    """The findings of a child, and where to go on."""
    # One thread and one arena, so that the limit of the address space is one of memory.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.NamedTemporaryFile() as file:
        file.write(struct.pack("<q", first))
        file.flush()
        command = [sys.executable, "-m", "tests.fuzz.child", *map(str, (seed, first, last)), kind or "", file.name]
        try:
            ended = subprocess.run(command, env=environment, capture_output=True, timeout=_LONGEST_SECONDS)
            status, problem = ended.returncode, ended.stderr.decode("utf-8", "replace")[-300:]
        except subprocess.TimeoutExpired:
            status, problem = -1, "it did not end"
        if status == 0:
            raw = json.loads(ended.stdout)
            failures = [Failure(**failure) for failure in raw["failures"]]
            return Findings(raw["counts"], failures, raw["grown_nbytes"]), last
        number = struct.unpack("<q", Path(file.name).read_bytes())[0]
    case = make_case(seed, number, kind)
    failure = Failure(number, case.kind, f"the process ended with {status}: {problem}", case.content.hex())
    return Findings(failures=[failure]), number + 1


def _print_counts(findings: Findings, seed: int, seconds: float) -> None:
    total: Counter[str] = Counter()
    for kind, counts in sorted(findings.counts.items()):
        total.update(counts)
        shown = ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(counts.items(), key=lambda one: -one[1]))
        print(f"{kind:12} {sum(counts.values()):8,}  {shown}")
    print(
        f"{'all':12} {sum(total.values()):8,}  " + ", ".join(f"{name} {count:,}" for name, count in total.most_common())
    )
    grown = f"{findings.grown_nbytes / 2**20:.1f} MiB of {SPARE_NBYTES >> 20}"
    print(f"seed {seed}, {seconds:.0f} s; a process grew by at most {grown}; {len(findings.failures)} failed")


if __name__ == "__main__":
    sys.exit(main())
