"""Files written in ways that are hard to see."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["save_without_checksums", "write_unseen"]


def write_unseen(path: Path, content: bytes) -> None:
    """Into the file itself, which has its times again afterwards; but some clocks stand still for milliseconds."""
    before = path.stat()
    path.write_bytes(content)
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        os.utime(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def save_without_checksums(state: dict[str, torch.Tensor], path: Path) -> None:
    """A file of torch, whose archive has none of its entries."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
