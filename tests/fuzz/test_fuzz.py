"""The fuzzer itself, a few thousand cases of it, and that it would notice."""

import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from odewei.loaders import checkpoint_index, numpy_file, safetensors_file, torch_archive

from . import child
from .cases import _MAKERS, KINDS, make_case
from .judge import Misbehaved, judge, watch_the_process


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    """Opened files and started programs are noticed, and no case takes all memory that the machine has."""
    watch_the_process()
    before = resource.getrlimit(resource.RLIMIT_AS)
    child.limit_memory(child.WARM_UP_NBYTES)
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_are_refused_or_read_right(kind: str, tmp_path: Path) -> None:
    """Four hundred of each kind end in an error of this library or in the right tensors; both happen."""
    outcomes = {judge(make_case(1, number, kind), tmp_path / "case") for number in range(400)}
    assert len(outcomes) > 1
    assert kind == "sums" or "right" in outcomes


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=[*HealthCheck])
@given(kind=st.sampled_from(KINDS), rng=st.randoms(use_true_random=False))
def test_hypothesis_finds_no_way_either(tmp_path: Path, kind: str, rng: Any) -> None:
    """The same, with choices that hypothesis makes, and makes simpler where it finds something."""
    judge(_MAKERS[kind](rng), tmp_path / "case")


def test_a_process_of_its_own_has_64_mib_to_spare(tmp_path: Path) -> None:
    """The command judges cases under a limit of memory, and prints how many ended how."""
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "700", "--seed", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert {line.split()[0] for line in lines[:-2]} == set(KINDS)
    assert "700" in lines[-2]
    assert "MiB of 64; 0 failed" in lines[-1]


def test_a_case_is_its_number() -> None:
    """The same seed and number make the same case, others another."""
    assert make_case(3, 5) == make_case(3, 5)
    assert len({str(make_case(3, number)) for number in range(50)}) > 45


TAKEN_OUT: dict[str, tuple[str, object, str, Callable[..., object]]] = {
    "shard names": ("index", checkpoint_index, "check_shard_name", lambda name, *, index: None),
    "gaps and overlaps": ("safetensors", safetensors_file, "_check_cover", lambda *arguments: None),
    "sizes and offsets": ("safetensors", safetensors_file, "_nbytes", lambda dtype, item, shape: 0),
    "metadata": ("safetensors", safetensors_file, "_skip_metadata", lambda text, file: text.value(1 << 20)),
    "entries of archives": ("npz", numpy_file, "check_disjoint", lambda members: 1 / 0),
    "places in archives": ("torch", torch_archive, "data_offset", lambda *arguments: 1 / 0),
}


@pytest.mark.parametrize("what", sorted(TAKEN_OUT))
def test_the_judge_notices_what_is_taken_out(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one of the checks, cases fail."""
    kind, module, name, instead = TAKEN_OUT[what]
    monkeypatch.setattr(module, name, instead)

    def judge_all() -> None:
        for number in range(3000):
            judge(make_case(4, number, kind), tmp_path / "case")

    with pytest.raises((Misbehaved, ZeroDivisionError, ValueError, AssertionError)):
        judge_all()


def test_memory_is_noticed() -> None:
    """Without the count of what a pickle makes, a small one takes all the memory there is, and that is a failure."""
    program = (
        "import tempfile; from pathlib import Path; from odewei.loaders import torch_archive;"
        "from tests.fuzz import child, judge; from tests.fuzz.case import Case;"
        "from tests.fuzz.pickles import archive_of;"
        "case = Case('pickle', 'w.pt', {'w.pt': archive_of(b'}' * 1_000_000 + b'.')});"
        "folder = Path(tempfile.mkdtemp()); judge.watch_the_process(); child.limit_memory(child.SPARE_NBYTES);"
        "print(judge.judge(case, folder / 'case')); torch_archive._FREE_NBYTES = 1 << 40\n"
        "try: judge.judge(case, folder / 'case')\n"
        "except (judge.Misbehaved, MemoryError) as error: print('memory ran out', error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("CorruptCheckpointError\nmemory ran out")


def test_a_failing_case_is_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed of a case fails in the same way, and is no longer than it has to be."""
    monkeypatch.setattr(checkpoint_index, "check_shard_name", lambda name, *, index: None)
    for number in itertools.count():
        case = make_case(4, number, "index")
        try:
            judge(case, tmp_path / "case")
        except Misbehaved:
            break
    small = child.shrink(case, tmp_path / "case", Misbehaved)
    assert len(small.content) < len(case.content)
    with pytest.raises(Misbehaved):
        judge(small, tmp_path / "case")


def test_links_in_the_folder_are_followed_and_names_out_of_it_are_not(tmp_path: Path) -> None:
    """The judge's own layout: a link that lies in the folder leads out of it, a name does not."""
    case = make_case(1, 0, "index")
    assert case.links == (("link.safetensors", "../outside.safetensors"),)
    plain = b'{"weight_map": {"c": "link.safetensors"}}'
    assert judge(case.with_content(plain), tmp_path / "case") == "right"
    for name in ("../outside.safetensors", "sub/../../outside.safetensors"):
        wrong = case.with_content(b'{"weight_map": {"c": "%s"}}' % name.encode())
        assert judge(wrong, tmp_path / "case") == "UnsafeCheckpointError"
