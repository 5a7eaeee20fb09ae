"""The device is compiled once, kept outside of the sources, and its tests stay out of other tests' process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim import build as building
from tests.sim.build import build, find_compiler

ROOT = Path(__file__).parents[2]
# Writes what it is given into what it is asked for, and its name into a log.
FAKE_COMPILER = """#!{python}
import pathlib, sys
if "--version" in sys.argv:
    print("fake {version}")
elif "{version}" == "broken":
    sys.exit(1)
else:
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text(sys.stdin.read())
    with open(__file__ + ".log", "a") as log:
        log.write("compiled\\n")
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user; what is kept of the builds in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "odewei" / "simulator"


def _compiler(folder: Path, version: str = "1") -> Path:
    path = folder / f"compiler-{version}"
    path.write_text(FAKE_COMPILER.format(python=sys.executable, version=version))
    path.chmod(0o755)
    return path


def _times_run(compiler: Path) -> int:
    log = Path(f"{compiler}.log")
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_compiled_once(cache: Path, tmp_path: Path) -> None:
    """The second session finds what the first compiled, in the user's cache folder; the sources gain no file."""
    sources = sorted(building.SOURCES.iterdir())
    compiler = _compiler(tmp_path)
    first, second = build(str(compiler)), build(str(compiler))
    assert first == second
    assert list(cache.iterdir()) == [first]
    assert '#include "simulator.cpp"' in first.read_text()
    assert _times_run(compiler) == 1
    assert sorted(building.SOURCES.iterdir()) == sources


def test_compiled_again_when_something_changed(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other sources, another torch or another compiler are another build."""
    compiler = _compiler(tmp_path)
    builds = {build(str(compiler)), build(str(_compiler(tmp_path, "2")))}
    monkeypatch.setattr(building.torch, "__version__", "9.9.9")
    builds.add(build(str(compiler)))
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "simulator.cpp").write_text("int x;")
    monkeypatch.setattr(building, "SOURCES", tmp_path / "sources")
    builds.add(build(str(compiler)))
    (tmp_path / "sources" / "simulator.cpp").write_text("int y;")
    builds.add(build(str(compiler)))
    assert len(builds) == 5
    assert len(list(cache.iterdir())) == 4  # the oldest is forgotten


def test_failure_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    """Sources that do not compile are an error, not a skipped test, and nothing is kept of them."""
    with pytest.raises(subprocess.CalledProcessError):
        build(str(_compiler(tmp_path, "broken")))
    assert list(cache.iterdir()) == []


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that is not there is not found."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert find_compiler() is None


def _pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_skipped_without_a_compiler() -> None:
    """Without a compiler the tests are skipped, and the reason says what is missing."""
    done = _pytest("tests/sim/test_streams.py", "-k", "pool", CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout
    assert "12 skipped" in done.stdout
    assert "the simulated accelerator needs a C++ compiler: g++, or what $CXX names" in done.stdout.replace("\n", " ")


def test_not_collected_with_other_tests() -> None:
    """From the root these tests are left out, and asking for them together with others is an error."""
    some_files = ["-o", "python_files=test_errors.py test_streams.py"]  # to be quick
    whole = _pytest("--collect-only", "-q", *some_files)
    assert whole.returncode == 0, whole.stdout
    assert "tests/test_errors.py" in whole.stdout
    assert "tests/sim" not in whole.stdout
    both = _pytest("--collect-only", "-q", "tests/sim", "tests/test_errors.py")
    assert both.returncode == pytest.ExitCode.USAGE_ERROR
    assert "needs a process of its own: pytest tests/sim" in both.stderr
