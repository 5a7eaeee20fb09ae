"""Every module with faults, so that its table is whole."""

from __future__ import annotations

from tests.soak import cgroups, disks, files, long_runs, processes, readers, signals, system_calls
from tests.soak.table import FAULTS

__all__ = ["FAULTS"]

assert all((cgroups, disks, files, long_runs, processes, readers, signals, system_calls))
