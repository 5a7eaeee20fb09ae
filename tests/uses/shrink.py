"""As few steps, and as plain options, as fail in the same way; and how that is printed and run again."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .action import Step
from .run import Finding, Streaming, given_steps, play, streamed
from .subjects import Plan

__all__ = ["Plays", "play_here", "play_in_a_child", "replay", "script", "shrink"]

Plays = Callable[[Plan, Sequence[Step]], Finding | None]
"""What comes of a plan and steps."""

PLAIN = ({"prefetch_depth": 0}, {"granularity": "auto"}, {"share": 1.0}, {"format": "safetensors"}, {"frozen": False})


def shrink(
    plan: Plan, steps: Sequence[Step], finding: Finding, plays: Plays, *, seconds: float = 20.0
) -> tuple[Plan, list[Step], Finding]:
    """Steps are left out, many at once first; then options are made plain. What is found in the end comes last."""
    until = time.monotonic() + seconds

    def fails(plan: Plan, steps: Sequence[Step]) -> bool:
        nonlocal finding
        found = plays(plan, steps)
        if found is None or (found.kind, found.action) != (finding.kind, finding.action):
            return False
        finding = found
        return True

    kept, size = list(steps), max(1, len(steps) // 2)
    while size:
        at, shorter = 0, False
        while at < len(kept) and time.monotonic() < until:
            fewer = kept[:at] + kept[at + size :]
            if fails(plan, fewer):
                kept, shorter = fewer, True
            else:
                at += size
        if not shorter or size > 1:
            size //= 2
    for change in PLAIN:
        plainer = dataclasses.replace(plan, **change)
        if plainer != plan and time.monotonic() < until and fails(plainer, kept):
            plan = plainer
    return plan, kept, finding


def play_here(root: Path, made_by: Streaming = streamed) -> Plays:
    """In this process."""
    return lambda plan, steps: play(plan, given_steps(steps), root, made_by=made_by).finding


def play_in_a_child(model: str, patience: float) -> Plays:
    """In processes of their own, which they may end."""

    def plays(plan: Plan, steps: Sequence[Step]) -> Finding | None:
        given = json.dumps([dataclasses.asdict(plan), list(steps)])
        command = [sys.executable, "-m", "tests.uses", "--model", model, "--patience", str(patience), "--replay", given]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return None if ended.returncode in (0, 1) else crash(ended, steps)

    return plays


def crash(ended: subprocess.CompletedProcess[str], steps: Sequence[Step]) -> Finding:
    """What is known of a process that did not come back: which step it was at, and its stacks."""
    kind, said = how_it_ended(ended.returncode, ended.stderr), ended.stderr
    begins = max(said.find("Timeout ("), said.find("Fatal Python error"))
    told = said[begins : begins + 3000] if begins >= 0 else said[-800:]
    return Finding(kind, steps[-1][0] if steps else "building", told)


def how_it_ended(status: int, stderr: str) -> str:
    """Of a process that did not come back."""
    return "hangs" if "Timeout (" in stderr else f"the process ends with {status}"


def script(plan: Plan, steps: Sequence[Step]) -> str:
    """A program that does it again."""
    given = ", ".join(f"{name}={value!r}" for name, value in dataclasses.asdict(plan).items())
    lines = [f"    ({name!r}, {arguments!r})," for name, arguments in steps]
    body = "\n".join(["[", *lines, "]"]) if lines else "[]"
    return f"from tests.uses.shrink import replay\n\nreplay({body}, {given})"


def replay(steps: Sequence[Step], **plan: object) -> None:
    """Run a sequence that was printed; what is not right is raised."""
    with tempfile.TemporaryDirectory(prefix="odewei-uses-") as root:
        played = play(Plan(**plan), given_steps(steps), Path(root))  # type: ignore[arg-type]
    assert played.finding is None, str(played.finding)
