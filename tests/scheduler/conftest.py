"""What holds for every test of the scheduler: no thread goes on, no file stays open."""

import gc
import os
import threading
from collections.abc import Iterator

import pytest

_PATIENCE = 20.0  # seconds; only a failing test waits this long


def _open_test_files() -> set[str]:
    links = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue  # the descriptor of listdir itself
    return {link for link in links if "/pytest-" in link}


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """After the test there are no more threads and no more files of tests open than before it."""
    threads, files = set(threading.enumerate()), _open_test_files()
    yield
    if not set(threading.enumerate()) <= threads or not _open_test_files() <= files:
        gc.collect()
    for thread in set(threading.enumerate()) - threads:
        if not thread.daemon or thread.name.startswith("odewei"):
            thread.join(_PATIENCE)
            assert not thread.is_alive(), f"{thread.name} goes on after its test"
    assert _open_test_files() <= files
