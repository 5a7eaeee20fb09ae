"""Compiles the simulated device, once for each version of its sources, of torch and of the compiler.

Knows files and the compiler. The result is kept in the user's cache folder, never beside the sources.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from odewei.demo.needs import default_cache_dir

SOURCES = Path(__file__).parent / "device"
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-DAT_PER_OPERATOR_HEADERS")
_LIBRARIES = ("-ltorch_cpu", "-lc10")  # loaded already when ours is, so no path to them is kept in it
_KEPT_BUILDS = 4


def find_compiler() -> str | None:
    """The path of ``$CXX``, else of g++; None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(compiler: str) -> Path:
    """The compiled device. Takes ten seconds or so when it is not in the cache.

    Raises ``subprocess.CalledProcessError`` with the compiler's complaints.
    """
    folder = default_cache_dir() / "simulator"
    library = folder / f"{_key(compiler)}.so"
    if library.exists():
        library.touch()
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # another process may build the same at the same time
        made = Path(scratch) / library.name
        _compile(compiler, made)
        made.replace(library)
    _forget_old_builds(folder)
    return library


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256()
    for part in (torch.__version__, version, *_FLAGS, *_LIBRARIES):
        digest.update(part.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compile(compiler: str, to: Path) -> None:
    """All sources as one: torch's headers are read once, which is nearly all of the work."""
    installed = Path(torch.__file__).parent
    whole = "".join(f'#include "{source.name}"\n' for source in sorted(SOURCES.glob("*.cpp")))
    includes = [f"-I{SOURCES}"]
    for headers in ("include", "include/torch/csrc/api/include"):
        includes += ["-isystem", str(installed / headers)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [compiler, *_FLAGS, abi, *includes, "-x", "c++", "-", "-o", str(to), f"-L{installed / 'lib'}"]
    subprocess.run([*command, *_LIBRARIES], input=whole, text=True, check=True)


def _forget_old_builds(folder: Path) -> None:
    builds = sorted(folder.glob("*.so"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in builds[_KEPT_BUILDS:]:
        old.unlink(missing_ok=True)
