"""``python -m benchmarks``: one run, one report. Exits with 1 where odewei's bits are wrong or it did not run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import odewei
from benchmarks.cgroup import GroupError, Limits, find_controllers, remove_stale
from benchmarks.disk import device_name, device_of
from benchmarks.record import Record
from benchmarks.report import render, summary
from benchmarks.runner import Runner
from benchmarks.settings import Settings, parse_settings
from benchmarks.verdicts import verdicts, wrong_bits
from odewei.demo.needs import need_folder
from odewei.demo.synthetic import write_llama_checkpoint

_PACKAGES = ("torch", "safetensors", "transformers", "accelerate", "airllm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the report, and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    settings = parse_settings(arguments)
    if "transformers" not in _versions():
        print("make bench needs transformers: pip install 'odewei[bench]'", file=sys.stderr)
        return 1
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)

    need_folder(settings.folder, "Choose another with --folder")
    limits, notes = _limits(settings)
    for note in notes:
        say(note)
    say(f"checkpoint of {settings.weight_bytes / 1e9:.2f} GB")
    write_llama_checkpoint(settings.checkpoint, settings.shape, shard_bytes=settings.shard_bytes)
    os.sync()  # what is still being written would slow the first reads
    if settings.throttled_seconds:
        say(f"the disk alone will take about {settings.throttled_seconds / 60:.0f} minutes")
    runner = Runner(settings, limits, say)
    runner.run()
    record = Record(
        machine=_machine(settings, limits),
        command=_command(arguments),
        weight_bytes=settings.weight_bytes,
        file_bytes=sum(file.stat().st_size for file in settings.checkpoint.glob("*.safetensors")),
        unit_bytes=settings.unit_bytes,
        tokens=settings.tokens,
        passes=settings.passes,
        notes=[*notes, *runner.notes, f"The run took {(time.monotonic() - started) / 60:.1f} minutes."],
        reports=runner.reports,
        rows=runner.rows,
    )
    file = _write(record, settings.results)
    print(summary(record, verdicts(record)))
    print(f"report: {file}")
    ran = all(record.find("main", "odewei", tokens) for tokens in record.tokens)
    failed = any(row.is_odewei and row.why_not and row.part != "fits" for row in record.rows)
    return 1 if wrong_bits(record) or failed or not ran else 0


def _limits(settings: Settings) -> tuple[Limits, list[str]]:
    """What can be limited here, and what has to be said of it. Exits where a throttle cannot be had."""
    notes: list[str] = []
    memory = io = None
    device = device_of(settings.folder) or ""
    try:
        if settings.throttle_bytes is not None:
            if not device:
                raise GroupError(f"{settings.folder} is on no disk that the kernel shows; choose another with --folder")
            memory, io = find_controllers("memory", "io")
            with Limits(memory, io, device, settings.throttle_bytes).group("throttle", None):
                pass  # now, and not after minutes, it shows whether the kernel throttles this disk
            notes.append(f"The disk was throttled to {settings.throttle_bytes / 1e9:.2f} GB/s for each process.")
        else:
            (memory,) = find_controllers("memory")
        notes.append(
            f"Each process ran in a control group (v{memory.version}) of its own; its limit covers its page cache too."
        )
    except GroupError as error:
        if settings.throttle_bytes is not None:
            raise SystemExit(f"--throttle: {error}") from error
        notes.append(
            f"**The memory limit could not be set ({error}): the page cache was NOT limited.** Whoever reads through "
            "it (every peer) may have been faster than under a limit; odewei's budget was set by number."
        )
    left = remove_stale(*(controller for controller in (memory, io) if controller is not None))
    if left:
        print(f"removed {len(left)} empty control groups of runs that were killed", file=sys.stderr)
    return Limits(memory, io, device, settings.throttle_bytes), notes


def _machine(settings: Settings, limits: Limits) -> dict[str, str]:
    """What the figures were measured on."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{pages / 1e9:.1f} GB",
        "disk": f"{device_name(limits.device or None)}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": f"odewei {odewei.__version__}, {versions}",
        "checkpoint": f"{settings.checkpoint.name}, bf16, random weights",
        "limit": f"{settings.limit_bytes / 1e9:.2f} GB for each process",
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _command(arguments: Sequence[str]) -> str:
    """The command to repeat the run, without folders, which are this machine's own."""
    kept, skip = [], False
    for argument in arguments:
        is_folder = argument.split("=")[0] in ("--folder", "--results")
        if not skip and not is_folder:
            kept.append(argument)
        skip = is_folder and "=" not in argument
    return f'make bench BENCH_ARGS="{shlex.join(kept)}"' if kept else "make bench"


def _write(record: Record, folder: Path) -> Path:
    """Write the JSON, the plot and the report; the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"[^A-Za-z0-9-]+", "-", platform.node()) or "unknown"
    stem = f"{datetime.now(UTC):%Y-%m-%d}-{host}"
    found = verdicts(record)
    content = dataclasses.asdict(record) | {
        "verdicts": [dataclasses.asdict(verdict) | {"reached": verdict.reached} for verdict in found]
    }
    (folder / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    picture = f"{stem}.png"
    try:
        from benchmarks.plot import draw

        draw(record, folder / picture)
    except ImportError as error:
        print(f"no plot: {error}")
        picture = ""
    file = folder / f"{stem}.md"
    file.write_text(render(record, found, picture or None))
    return file


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that groups and processes are cleared away
    sys.exit(main())
