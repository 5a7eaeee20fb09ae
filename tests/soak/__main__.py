"""Run the faults and the long runs: ``python -m tests.soak [--quick] [--only TEXT] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from tests.soak.all import FAULTS
from tests.soak.table import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="each fault a few times, and short runs")
    parser.add_argument("--only", metavar="TEXT", default="", help="faults whose kind and name contain this")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all rows there as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # faults are many and models small
    started = time.perf_counter()
    rows = []
    for one in FAULTS:
        if arguments.only in f"{one.kind}: {one.name}":
            row = run(one, not arguments.quick)
            print(row, flush=True)
            rows.append(row)
    bad = [row for row in rows if not row.is_good]
    skipped = sum(bool(row.skipped) for row in rows)
    print(
        f"{len(rows)} faults, {sum(row.fired for row in rows)} injections reached, {len(bad)} faults not as promised, "
        f"{skipped} skipped, {time.perf_counter() - started:.0f} s"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([{**vars(row), "ends": dict(row.ends)} for row in rows], indent=1))
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
