"""``make uses``: random sequences of what people do to models, on an ordinary and a streamed one, side by side.

The same seed makes the same sequences. One that fails is made shorter and printed as a program; ``--number`` plays one
sequence in this process, step by step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from .child import MODELS, finding_as_plain, make_sequence, prepare, root_folder
from .run import Finding, given_steps, play
from .shrink import crash, play_in_a_child, script, shrink
from .subjects import SUBJECTS, Plan

_STRETCH = 100
_FEW = 3


def main() -> int:
    """The exit status: 1 if a sequence failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.uses", description=__doc__)
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subject", choices=SUBJECTS)
    parser.add_argument("--frozen", action="store_true", help="both models are frozen at once")
    parser.add_argument(
        "--model", choices=MODELS, default="streamed", help="what is compared; not odewei's: to try the fuzz"
    )
    parser.add_argument("--no-shrink", dest="shrink", action="store_false")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds after which a step hangs")
    parser.add_argument("--number", type=int, help="play this one sequence here")
    parser.add_argument("--replay", help="play these steps here: [plan, steps] as JSON")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all findings there as well")
    options = parser.parse_args()
    if options.number is not None or options.replay is not None:
        return _play_one(options)
    begun = time.monotonic()
    with root_folder():
        findings, counts = _play_all(options)
    _print_counts(counts)
    _print_findings(findings, options)
    if options.json is not None:
        options.json.write_text(json.dumps(findings, indent=1))
    print(
        f"seed {options.seed}, {time.monotonic() - begun:.0f} s; {options.sequences} sequences, {len(findings)} failed"
    )
    return 1 if findings else 0


def _play_one(options: argparse.Namespace) -> int:
    prepare(options.subject)
    if options.replay is None:
        plan, steps = make_sequence(options.seed, options.number, options.subject, frozen=options.frozen)
    else:
        raw, given = json.loads(options.replay)
        plan, steps = Plan(**raw), given_steps([(name, arguments) for name, arguments in given])
    with root_folder() as root:
        played = play(plan, steps, root, made_by=MODELS[options.model], patience=options.patience)
    print(script(plan, played.steps))
    print(*(f"# {end}" for end in played.ends), sep="\n")
    print(played.finding or "equal")
    sys.stdout.flush()
    os._exit(1 if played.finding else 0)


Findings = list[dict[str, Any]]


def _play_all(options: argparse.Namespace) -> tuple[Findings, Counter[str]]:
    """Stretch by stretch; a process that a sequence has ended is followed by one that begins behind it."""
    findings: Findings = []
    counts: Counter[str] = Counter()
    first, end = options.first, options.first + options.sequences
    while first < end:
        last = min(first + _STRETCH, end)
        first = _stretch(options, first, last, findings, counts)
        if sys.stderr.isatty():
            print(f"\r{first - options.first:,} sequences, {len(findings)} failed", end="", file=sys.stderr)
    return findings, counts


def _stretch(options: argparse.Namespace, first: int, last: int, findings: Findings, counts: Counter[str]) -> int:
    """Where to go on."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONFAULTHANDLER": "1"}
    given = json.dumps(
        {name: getattr(options, name) for name in ("seed", "subject", "frozen", "model", "shrink", "patience")}
    )
    with tempfile.NamedTemporaryFile("r", prefix="odewei-uses-") as note:
        command = [sys.executable, "-m", "tests.uses.child", given, str(first), str(last), note.name]
        with tempfile.TemporaryFile("w+") as errors:
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
                assert child.stdout is not None
                for kind, value in map(json.loads, child.stdout):
                    if kind == "finding":
                        findings.append(value)
                        print("{number}: {finding[kind]} ({finding[action]})".format_map(value), file=sys.stderr)
                    else:
                        counts.update(value["ends"])
            errors.seek(0)
            ended = subprocess.CompletedProcess(command, child.returncode, "", errors.read())
        lines = [json.loads(line) for line in note]
    if ended.returncode == 0:
        return last
    (number, plan), *steps = lines if lines else ((first, None),)
    findings.append(_crashed(number, plan, steps, ended, options))
    return int(number) + 1


def _crashed(
    number: int, plan: Any, steps: Any, ended: subprocess.CompletedProcess[str], options: argparse.Namespace
) -> dict[str, Any]:
    small: tuple[Plan, Any, Finding] = Plan(**plan), steps, crash(ended, steps)
    if options.shrink:
        small = shrink(*small, play_in_a_child(options.model, options.patience), seconds=40.0)
    return finding_as_plain(number, *small)


def _print_counts(counts: Counter[str]) -> None:
    ends: dict[str, Counter[str]] = defaultdict(Counter)
    total: Counter[str] = Counter()
    for key, count in counts.items():
        name, _, how = key.partition(": ")
        ends[name][how] += count
        if name != "sequence":
            total[how] += count
    for name, found in sorted(ends.items()):
        print(
            f"{name:26} {sum(found.values()):7,}  "
            + ", ".join(f"{how} {count:,}" for how, count in found.most_common())
        )
    print(f"{'all steps':26} {sum(total.values()):7,}  " + ", ".join(f"{how} {n:,}" for how, n in total.most_common()))


def _print_findings(findings: Findings, options: argparse.Namespace) -> None:
    """One of each kind, the shortest; most frequent kinds first. Those with the same steps are of one kind."""
    groups: dict[object, Findings] = defaultdict(list)
    for one in findings:
        steps = [f"{name} {arguments.get('way', '')}" for name, arguments in one["steps"]]
        groups[one["finding"]["kind"], *(steps if len(steps) <= _FEW else [one["finding"]["action"]])].append(one)
    for same in sorted(groups.values(), key=len, reverse=True):
        one = min(same, key=lambda one: len(one["steps"]))
        print(f"\nFAILED {len(same)} times, as in sequence {one['number']} of seed {options.seed}:", end=" ")
        print("{kind} ({action})\n{detail}".format_map(one["finding"]))
        print(script(Plan(**one["plan"]), one["steps"]))
    print()


if __name__ == "__main__":
    sys.exit(main())
