"""Fixtures for all tests: nothing that a test opens may outlive it."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch

# Beside another process that computes, two threads are far slower than one.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and commands print as wide as it says
# A suite that was started in the background may have been told to ignore Ctrl-C; processes that tests start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``make zoo`` asks for counts by family."""
    parser.addoption("--zoo-summary", action="store_true", help="at the end, what passed of the zoo, by family")


def _ours() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("odewei")}


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Every thread and file of odewei that a test starts is gone when the test has dropped its models."""
    before = _ours()
    yield
    if _ours() - before:
        gc.collect()
    left = _ours() - before
    assert not left, f"threads outlive their model: {left}"


@pytest.fixture
def no_new_files() -> Iterator[None]:
    """As many files are open after the test as before it."""
    gc.collect()
    before = _open_files()
    yield
    gc.collect()
    assert _open_files() == before
