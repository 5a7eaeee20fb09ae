"""One process of the fuzz: it plays a stretch of sequences, and notes at each step which it is at.

A process of its own, because a step may end it (a crash in C, a hang): the parent then knows the steps from the note.
Each finding is a line of JSON on stdout; the counts are the last line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from .action import ACTIONS, Step
from .broken import BROKEN, ENDING, streaming
from .run import Finding, Steps, Streaming, draw_steps, play, resident, streamed
from .shrink import play_here, shrink
from .side import Side
from .subjects import SUBJECTS, Plan, draw_plan

__all__ = ["MODELS", "finding_as_plain", "make_sequence", "prepare", "root_folder", "run_stretch"]

MODELS: dict[str, Streaming] = {
    "streamed": streamed,
    "resident": resident,
    **{name: streaming(breaks) for name, breaks in {**BROKEN, **ENDING}.items()},
}
"""What is compared with the ordinary model: odewei's; an ordinary one, to try the fuzz itself; or a broken one."""

_SHRUNK = 3  # of each kind, in one process
_SHRINK_SECONDS = 8.0
_FOLDER = "ODEWEI_USES_FOLDER"


def make_sequence(
    seed: int, number: int, subject: str | None = None, *, frozen: bool = False, among: Collection[str] = ACTIONS
) -> tuple[Plan, Steps]:
    """Sequence ``number`` of the run with this seed."""
    rng = random.Random(f"{seed}/{number}")
    plan = draw_plan(rng, subject)
    return dataclasses.replace(plan, frozen=plan.frozen or frozen), draw_steps(rng, rng.randint(6, 12), among)


def prepare(subject: str | None = None) -> None:
    """One thread, and nothing printed."""
    torch.set_num_threads(1)
    logging.getLogger("odewei").setLevel(logging.ERROR)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if subject is not None and not SUBJECTS[subject].of_transformers:
        return
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextlib.contextmanager
def root_folder() -> Iterator[Path]:
    """Where all files are, in memory if possible; those of a child, which may not live to remove them, in its
    parent's.
    """
    where = os.environ.get(_FOLDER) or ("/dev/shm" if Path("/dev/shm").is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="odewei-uses-", dir=where) as root:
        os.environ[_FOLDER] = root
        try:
            yield Path(root)
        finally:
            if where in (None, "/dev/shm"):
                del os.environ[_FOLDER]


def run_stretch(options: dict[str, Any], first: int, last: int, at: TextIO, out: TextIO) -> None:
    """Play the sequences ``first`` to ``last`` (not included)."""
    prepare(options["subject"])
    made_by = MODELS[options["model"]]
    counts: Counter[str] = Counter()
    known: Counter[tuple[str, str]] = Counter()
    seconds = 0.0
    with root_folder() as root:
        for number in range(first, last):
            plan, steps = make_sequence(options["seed"], number, options["subject"], frozen=options["frozen"])
            played = play(plan, _noted(at, number, plan, steps), root, made_by=made_by, patience=options["patience"])
            counts.update(played.ends)
            counts["sequence: " + ("failed" if played.finding else "equal")] += 1
            seconds = max(seconds, played.seconds)
            if played.finding is not None:
                key = (played.finding.kind, played.finding.action)
                known[key] += 1
                small: tuple[Plan, list[Step], Finding] = plan, played.steps, played.finding
                if known[key] <= _SHRUNK and options["shrink"]:
                    small = shrink(*small, play_here(root, made_by), seconds=_SHRINK_SECONDS)
                _print(out, "finding", finding_as_plain(number, *small))
    _print(out, "counts", {"ends": counts, "slowest": seconds})


def finding_as_plain(number: int, plan: Plan, steps: list[Step], finding: Finding) -> dict[str, Any]:
    return {
        "number": number,
        "plan": dataclasses.asdict(plan),
        "steps": steps,
        "finding": dataclasses.asdict(finding),
    }


def _print(out: TextIO, kind: str, value: object) -> None:
    print(json.dumps([kind, value]), file=out, flush=True)


def _noted(at: TextIO, number: int, plan: Plan, steps: Steps) -> Steps:
    """The same steps, each written down before it is done."""

    def note(value: object) -> None:
        at.write(json.dumps(value) + "\n")
        at.flush()

    at.seek(0)
    at.truncate()
    note([number, dataclasses.asdict(plan)])

    def noted(side: Side) -> Iterator[Step]:
        for step in steps(side):
            note(step)
            yield step

    return noted


def main() -> None:
    """``python -m tests.uses.child OPTIONS FIRST LAST FILE``."""
    options, first, last, name = sys.argv[1:]
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is none of the findings
    with open(name, "w") as at:
        run_stretch(json.loads(options), int(first), int(last), at, out)
    out.flush()
    os._exit(0)  # interpreters that end with compiled code and threads take their time


if __name__ == "__main__":
    main()
