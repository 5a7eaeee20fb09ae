"""What holds for every test of loaders: no file stays open."""

import gc
import os
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite(f"{__package__}.conformance")


@pytest.fixture(autouse=True)
def no_file_stays_open() -> Iterator[None]:
    """The process has no more files open after the test than before it, once nobody has them."""

    def opened() -> set[str]:
        links = set()
        for fd in os.listdir("/proc/self/fd"):
            try:
                links.add(os.readlink(f"/proc/self/fd/{fd}"))
            except FileNotFoundError:
                continue  # the descriptor of listdir itself
        return {link for link in links if link.startswith("/") and "/pytest-" in link}

    before = opened()
    yield
    if not opened() <= before:
        gc.collect()  # the frames of an error that was caught keep the descriptor that they read from
    assert opened() <= before
