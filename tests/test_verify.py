"""``odewei.verify`` and the command: what is found wrong, how it is said, and how it ends."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import odewei
from odewei import cli
from odewei.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, OptionsError
from odewei.tools.verify import VerifyReport, write_sums
from tests.files import save_without_checksums

SHARDS = ("model-1.safetensors", "model-2.safetensors")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with an index and two shards."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"a": torch.arange(1000)}, folder / SHARDS[0])
    save_file({"b": torch.arange(500), "c": torch.ones(3)}, folder / SHARDS[1])
    weight_map = {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def flip(path: Path, at: int = -1) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def by_name(report: VerifyReport) -> dict[str, tuple[str, ...]]:
    return {file.path.name: file.problems for file in report.files}


def test_a_whole_checkpoint_is_found_whole(checkpoint: Path) -> None:
    """Index and shards are listed with their weights; without sums nothing was compared, and that is said."""
    report = odewei.verify(checkpoint)
    assert report.ok
    assert [(file.path.name, file.weights) for file in report.files] == [
        ("model.safetensors.index.json", None),
        (SHARDS[0], 1),
        (SHARDS[1], 2),
    ]
    assert len(report.unsummed) == 3
    assert str(report).count("whole  ") == 3
    assert str(report).count("sum not known") == 3


def test_sums_find_a_changed_bit(checkpoint: Path) -> None:
    """A bit that no header knows of is found by the sum, in its file and in no other."""
    assert write_sums(checkpoint) == checkpoint / "SHA256SUMS"
    assert odewei.verify(checkpoint).ok
    assert odewei.verify(checkpoint).unsummed == ()
    flip(checkpoint / SHARDS[1])
    problems = by_name(odewei.verify(checkpoint))
    assert not problems[SHARDS[0]]
    assert "expected" in problems[SHARDS[1]][0]
    assert odewei.verify(checkpoint, sums=None).ok


def test_written_sums_are_those_of_sha256sum(checkpoint: Path) -> None:
    """sha256sum --check agrees, and the loaders take them."""
    write_sums(checkpoint)
    checked = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=checkpoint, capture_output=True)
    assert checked.returncode == 0
    assert checked.stdout.count(b": OK") == 3
    assert len(odewei.open_checkpoint(checkpoint, verify="sha256").weights()) == 3


def test_sums_are_never_written_over_others(checkpoint: Path) -> None:
    """What is there is not replaced, and nothing is written for a checkpoint that is damaged."""
    os.truncate(checkpoint / SHARDS[0], 100)
    with pytest.raises(CheckpointError, match="not whole"):
        write_sums(checkpoint)
    assert not (checkpoint / "SHA256SUMS").exists()
    (checkpoint / "SHA256SUMS").write_text("")
    with pytest.raises(OptionsError, match="is there already"):
        write_sums(checkpoint)
    assert [path.name for path in checkpoint.iterdir() if "unfinished" in path.name] == []


def test_all_faults_are_reported_at_once(checkpoint: Path) -> None:
    """A cut shard, a missing one and a promise that is not kept are three problems of three files."""
    os.truncate(checkpoint / SHARDS[0], 500)
    save_file({"b": torch.ones(1)}, checkpoint / SHARDS[1])
    index = checkpoint / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "d": "model-3.safetensors"}}))
    problems = by_name(odewei.verify(checkpoint))
    assert not problems[index.name]
    assert "truncated" in problems[SHARDS[0]][0]
    assert "1 of the 2 weights" in problems[SHARDS[1]][0]
    assert "'c'" in problems[SHARDS[1]][0]
    assert "does not exist" in problems["model-3.safetensors"][0]


def test_an_index_that_cannot_be_read_is_a_problem(checkpoint: Path) -> None:
    """Names that lead out of the folder are reported, and nothing they name is looked at."""
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    report = odewei.verify(checkpoint)
    assert [file.path for file in report.files] == [index]
    assert "leads out of its folder" in report.problems[0]


def test_names_of_files_cannot_speak_to_the_terminal(checkpoint: Path) -> None:
    """What an index calls its shards is printed without control characters."""
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "\x1b[2Jx\r.safetensors"}}))
    result = invoke(checkpoint)
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    assert "\r" not in result.output
    assert "\\x1b[2Jx\\r.safetensors" in result.stdout


def test_other_sums_may_be_given(checkpoint: Path, tmp_path: Path) -> None:
    """A list elsewhere, or a mapping, is used instead of what is beside; it has to have every file."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.iterdir()}
    elsewhere = tmp_path / "sums"
    elsewhere.write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    assert odewei.verify(checkpoint, sums=elsewhere).ok
    assert odewei.verify(checkpoint, sums={name: digest.upper() for name, digest in digests.items()}).ok
    del digests[SHARDS[0]]
    assert "has none for 'model-1.safetensors'" in by_name(odewei.verify(checkpoint, sums=digests))[SHARDS[0]][0]
    with pytest.raises(CheckpointNotFoundError):
        odewei.verify(checkpoint, sums=tmp_path / "none")
    with pytest.raises(OptionsError, match="neither a list nor a mapping"):
        odewei.verify(checkpoint, sums=7)  # type: ignore[arg-type]


def test_arrays_of_a_folder_and_single_files(tmp_path: Path) -> None:
    """Each .npy file of a folder is looked at by itself; a file needs no folder."""
    np.save(tmp_path / "a.npy", np.arange(10))
    np.save(tmp_path / "b.npy", np.arange(10))
    os.truncate(tmp_path / "b.npy", 150)
    problems = by_name(odewei.verify(tmp_path))
    assert not problems["a.npy"]
    assert "truncated" in problems["b.npy"][0]
    assert odewei.verify(tmp_path / "a.npy").ok


def test_what_is_no_checkpoint_raises(tmp_path: Path) -> None:
    """An empty folder, or nothing at all, is an error and no report."""
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint"):
        odewei.verify(tmp_path)
    assert "does not exist" in odewei.verify(tmp_path / "none.safetensors").problems[0]


ARCHIVES = {
    "stored.npz": lambda path: np.savez(path, a=np.arange(4000.0), b=np.ones(3)),
    "packed.npz": lambda path: np.savez_compressed(path, a=np.random.default_rng(0).normal(size=4000), b=np.ones(3)),
    "model.pt": lambda path: torch.save({"a": torch.arange(4000.0), "b": torch.ones(3)}, path),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_has_sums_of_its_own(name: str, tmp_path: Path) -> None:
    """A bit that has changed in an entry is found where no other sum is kept, and no sums are written of it."""
    path = tmp_path / name
    ARCHIVES[name](path)
    seen: list[int] = []
    report = odewei.verify(path, on_progress=lambda file, done, nbytes: seen.append(done))
    assert report.ok
    assert not report.unsummed
    assert "sums of its entries" in str(report)
    assert seen == sorted(seen)
    assert path.stat().st_size / 2 < seen[-1] <= path.stat().st_size
    flip(path, path.stat().st_size // 2)
    assert odewei.verify(path, sums=None).ok
    (problem,) = odewei.verify(path).problems
    assert "does not have its checksum" in problem
    assert name in problem
    with pytest.raises(CorruptCheckpointError, match="no sums are written"):
        write_sums(path)


def test_an_archive_without_sums_of_its_own(tmp_path: Path) -> None:
    """torch can leave them out: then nothing was compared."""
    path = tmp_path / "model.pt"
    save_without_checksums({"a": torch.arange(4000.0)}, path)
    report = odewei.verify(path)
    assert report.ok
    assert report.unsummed == (path,)


def test_progress_goes_from_nothing_to_all(checkpoint: Path) -> None:
    """Bytes done never fall, and end at the bytes of all files."""
    write_sums(checkpoint)
    seen: list[tuple[str, int, int]] = []
    odewei.verify(checkpoint, on_progress=lambda file, done, nbytes: seen.append((file.name, done, nbytes)))
    total = sum(path.stat().st_size for path in checkpoint.iterdir() if path.name != "SHA256SUMS")
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert (seen[-1][1], {nbytes for _, _, nbytes in seen}) == (total, {total})
    assert {name for name, _, _ in seen} == {"model.safetensors.index.json", *SHARDS}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.group(), ["verify", *map(str, arguments)], prog_name="odewei")


def test_the_command_ends_with_0_or_1(checkpoint: Path) -> None:
    """0 for a whole checkpoint and 1 for a damaged one, each with its files on stdout."""
    result = invoke("--write-sums", checkpoint)
    assert (result.exit_code, result.output) == (0, f"wrote {checkpoint / 'SHA256SUMS'}\n")
    result = invoke(checkpoint)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("whole  ") == 3
    assert result.stderr == ""
    flip(checkpoint / SHARDS[0])
    result = invoke(checkpoint)
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    assert "expected" in result.stdout
    assert invoke("--no-sums", checkpoint).exit_code == 0
    result = invoke("--json", checkpoint)
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["ok"] is False
    assert [bool(file["problems"]) for file in document["files"]] == [False, True, False]


def test_json_of_a_whole_checkpoint(checkpoint: Path) -> None:
    """Writing the sums says where they are; then every file is whole, with its size, its sum and where that is from."""
    sums = checkpoint / "SHA256SUMS"
    assert json.loads(invoke("--write-sums", "--json", checkpoint).stdout) == {
        "path": str(checkpoint),
        "sums": str(sums),
    }
    result = invoke("--json", checkpoint)
    assert (result.exit_code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert (document["path"], document["ok"]) == (str(checkpoint), True)
    for file, weights in zip(document["files"], (None, 1, 2), strict=True):
        content = Path(file["path"]).read_bytes()
        assert (file["nbytes"], file["weights"], file["problems"]) == (len(content), weights, [])
        assert (file["sha256"], file["sum_from"]) == (hashlib.sha256(content).hexdigest(), str(sums))


def test_the_command_says_what_was_not_compared(checkpoint: Path) -> None:
    """Without any sums the exit status is that of headers and spans, and stderr says so."""
    result = invoke(checkpoint)
    assert result.exit_code == 0
    assert "3 of 3 files have no sum" in result.stderr


def test_mistakes_of_the_command_are_one_line(checkpoint: Path, tmp_path: Path) -> None:
    """No checkpoint, no list, sums that are there already: one line, status 1, and no traceback."""
    (checkpoint / "SHA256SUMS").write_text("nonsense\n")
    for arguments in ([tmp_path], ["--sums", checkpoint / SHARDS[0], checkpoint], ["--write-sums", checkpoint]):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert len(result.stderr.splitlines()) == 1
        assert "Traceback" not in result.output
    assert invoke("--no-sums", "--write-sums", checkpoint).exit_code == 2
    assert invoke(tmp_path / "nothing").exit_code == 2


def test_a_damaged_list_beside_the_files_is_a_problem_of_each(checkpoint: Path) -> None:
    """A SHA256SUMS that cannot be read is not the same as none."""
    (checkpoint / "SHA256SUMS").write_text("nonsense\n")
    report = odewei.verify(checkpoint)
    assert len(report.problems) == 3
    with pytest.raises(CorruptCheckpointError, match="line 1"):
        odewei.open_checkpoint(checkpoint, verify="sha256")


def test_a_remote_checkpoint_is_refused() -> None:
    """Nothing is asked of the other side."""
    for look in (odewei.verify, write_sums):
        with pytest.raises(OptionsError, match=r"only a local checkpoint.*Download it first"):
            look("https://host.invalid/model.safetensors")
