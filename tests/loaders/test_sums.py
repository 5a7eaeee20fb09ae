"""``verify=``: sizes and sums of files, and where sums come from."""

import hashlib
import os
import pickle
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import odewei
from odewei.errors import (
    CheckpointError,
    CorruptCheckpointError,
    OptionsError,
    WeightReadError,
)
from odewei.loaders import NumpyLoader, SafetensorsLoader, ShardedWeightsLoader, TorchLoader, open_checkpoint, sums
from odewei.loaders.sums import find_sum, format_sum, read_sums
from odewei.torch import init_on_demand_weights_model

from .conformance import safetensors_bytes
from .test_sharded import write_index


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    save_file({"w": torch.arange(100)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture(autouse=True)
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were hashed in a process that has hashed none before."""
    found: list[Path] = []
    hash_file = sums.hash_file

    def watched(file: Any, *options: Any) -> str:
        found.append(file.path)
        return hash_file(file, *options)

    monkeypatch.setattr(sums, "hash_file", watched)
    monkeypatch.setattr(sums, "_hashed", sums._Hashed())
    return found


def keep_beside(file: Path, digest: str) -> None:
    (file.parent / "SHA256SUMS").write_text(f"{digest}  {file.name}\n")


def keep_in_cache(file: Path, digest: str) -> None:
    """As in the hub's cache: the file is a link to a blob."""
    blob = file.parent / "blobs" / digest
    blob.parent.mkdir()
    os.rename(file, blob)
    file.symlink_to(blob)


def keep_as_metadata(file: Path, digest: str) -> None:
    """As the hub's client does it in a folder it downloads into."""
    folder = file.parent / ".cache" / "huggingface" / "download"
    folder.mkdir(parents=True)
    (folder / f"{file.name}.metadata").write_text(f"{'a' * 40}\n{digest}\n1712656091.123\n")


KEPT = pytest.mark.parametrize("keep", [keep_beside, keep_in_cache, keep_as_metadata])


@KEPT
def test_a_right_sum_lets_the_file_be_read(keep: Callable[[Path, str], None], file: Path, hashed: list[Path]) -> None:
    """With the sum that is kept for it a file is read as ever, and has been hashed once."""
    keep(file, sha256(file))
    for loader in (SafetensorsLoader(file, verify="sha256"), open_checkpoint(file.parent, verify="sha256")):
        assert torch.equal(loader("m", ["w"])["w"], torch.arange(100))
    assert hashed == [file]


@KEPT
def test_a_wrong_sum_is_an_error_before_the_header_is_used(keep: Callable[[Path, str], None], file: Path) -> None:
    """One changed bit is a CheckpointError with file, expected and found; the size alone does not show it."""
    right = sha256(file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    keep(file, right)
    SafetensorsLoader(file).weights()
    with pytest.raises(CorruptCheckpointError, match=rf"expected {right}, found {sha256(file)}.*Download") as caught:
        SafetensorsLoader(file, verify="sha256").weights()
    assert caught.value.file == str(file)
    file.write_bytes(b"not even a header")
    with pytest.raises(CorruptCheckpointError, match="SHA-256"):
        SafetensorsLoader(file, verify="sha256").weights()


def test_no_sum_is_an_error_with_the_cure(file: Path) -> None:
    """Nothing is taken for checked that was not; names of git blobs are no sums."""
    with pytest.raises(CheckpointError, match=r"no sum is kept.*write-sums"):
        SafetensorsLoader(file, verify="sha256").weights()
    keep_in_cache(file, "a" * 40)
    keep_as_metadata(file, "b" * 40)
    assert find_sum(file) is None


def test_a_file_is_hashed_once_in_a_process_until_it_changes(file: Path, hashed: list[Path]) -> None:
    """Many loaders and threads, one hash; a new time, another."""
    keep_beside(file, sha256(file))
    start = threading.Barrier(4)

    def work(_: int) -> int:
        loader = SafetensorsLoader(file, verify="sha256")
        start.wait()
        return len(loader.weights())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [1] * 4
    assert len(hashed) == 1
    os.utime(file, (1, 1))
    SafetensorsLoader(file, verify="sha256").weights()
    assert len(hashed) == 2


def test_what_changes_after_its_sum_was_compared_is_noticed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the sum and the header nothing can be put in the file's place."""
    keep_beside(file, sha256(file))
    other = file.with_name("other")
    save_file({"w": torch.zeros(100, dtype=torch.int64)}, other)
    check = SafetensorsLoader._file

    def replaced(self: SafetensorsLoader, path: Path) -> Any:
        found = check(self, path)
        os.replace(other, path)
        return found

    monkeypatch.setattr(SafetensorsLoader, "_file", replaced)
    with pytest.raises(CheckpointError, match="changed"):
        SafetensorsLoader(file, verify="sha256").weights()


def test_sums_of_shards_are_kept_above_them(tmp_path: Path, hashed: list[Path]) -> None:
    """A list of sums may be in a folder above the file, which it names by its path from there."""
    files = ["part/one.safetensors", "two.safetensors"]
    (tmp_path / "part").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / files[0])
    save_file({"b": torch.ones(2)}, tmp_path / files[1])
    index = write_index(tmp_path, {"a": files[0], "b": files[1]})
    (tmp_path / "SHA256SUMS").write_text("".join(f"{sha256(tmp_path / name)} *./{name}\n" for name in files))
    assert ShardedWeightsLoader(index, tmp_path, verify="sha256").weights().keys() == {"a", "b"}
    assert hashed == [tmp_path / name for name in files]
    with open(tmp_path / "SHA256SUMS", "a") as stream:
        stream.write(f"{'0' * 64}  {index.name}\n")
    with pytest.raises(CorruptCheckpointError, match=rf"expected 0{{64}}.*{index.name}"):
        ShardedWeightsLoader(index, tmp_path, verify="sha256")


def test_the_path_form_has_it_too(file: Path) -> None:
    """A model is not built over a checkpoint with a wrong sum; a loader is told itself."""
    save_file({"weight": torch.ones(2, 2)}, file)
    keep_beside(file, "0" * 64)
    build = lambda: nn.Linear(2, 2, bias=False)  # noqa: E731
    with pytest.raises(CorruptCheckpointError, match=r"expected 0{64}"):
        init_on_demand_weights_model(build, file, verify="sha256")
    with pytest.raises(OptionsError, match="Give verify to the loader"):
        init_on_demand_weights_model(build, {"weight": torch.ones(2, 2)}, verify="sha256")
    with pytest.raises(OptionsError, match="'none', 'size', 'sha256'"):
        init_on_demand_weights_model(build, file, verify="md5")  # type: ignore[arg-type]


def test_every_kind_of_file_is_checked(tmp_path: Path) -> None:
    """torch's and NumPy's files, and each of a folder of arrays, are compared too."""
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", w=np.ones(2))
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c" / "w.npy", np.ones(2))
    loaders: list[tuple[Any, Path]] = [
        (TorchLoader, tmp_path / "a.pt"),
        (NumpyLoader, tmp_path / "b.npz"),
        (NumpyLoader, tmp_path / "c"),
    ]
    for kind, path in loaders:
        with pytest.raises(CheckpointError, match="no sum is kept"):
            kind(path, verify="sha256").weights()


def test_what_is_checked_is_kept_by_copies(file: Path, hashed: list[Path]) -> None:
    """A loader that has read its headers takes them along, and needs no second hash."""
    keep_beside(file, sha256(file))
    loader = SafetensorsLoader(file, verify="sha256")
    loader.weights()
    copy = pickle.loads(pickle.dumps(loader))
    assert copy.verify == "sha256"
    assert torch.equal(copy("m", ["w"])["w"], torch.arange(100))
    assert len(hashed) == 1


@pytest.mark.parametrize("verify", ["md5", None, True, "SHA256"])
def test_other_values_are_refused(verify: Any, file: Path) -> None:
    """A value that means nothing is an OptionsError that names those that do."""
    with pytest.raises(OptionsError, match="'none', 'size', 'sha256'"):
        SafetensorsLoader(file, verify=verify)


def test_none_opens_what_was_cut(tmp_path: Path) -> None:
    """With verify="none" what is there of a file is read, and what is not is named when it is asked for."""
    header = {
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]},
    }
    for data in (b"1234", b"123456789"):
        path = tmp_path / f"{len(data)}.safetensors"
        path.write_bytes(safetensors_bytes(header, data))
        with pytest.raises(CorruptCheckpointError):
            SafetensorsLoader(path).weights()
        loader = SafetensorsLoader(path, verify="none")
        assert bytes(loader("m", ["a"])["a"].numpy()) == b"1234"
        if len(data) > 4:
            assert bytes(loader("m", ["b"])["b"].numpy()) == b"5678"
        else:
            with pytest.raises(WeightReadError, match=r"4 bytes before the end of the weight.*'b'"):
                loader("m", ["b"])
    np.save(tmp_path / "w.npy", np.arange(10))
    os.truncate(tmp_path / "w.npy", os.path.getsize(tmp_path / "w.npy") - 8)
    with pytest.raises(WeightReadError, match="8 bytes before"):
        NumpyLoader(tmp_path / "w.npy", verify="none")("m", ["w"])


def test_a_streamed_model_of_a_cut_file_says_what_is_missing(tmp_path: Path) -> None:
    """state_dict() does not touch what is not there, and a forward names the weight's file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    os.truncate(tmp_path / "m.safetensors", os.path.getsize(tmp_path / "m.safetensors") - 8192)
    streamed = init_on_demand_weights_model(
        lambda: nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)),
        tmp_path / "m.safetensors",
        verify="none",
        granularity="leaf",
        prefetch_depth=0,
    )
    state = streamed.state_dict()
    assert torch.equal(state["0.weight"], model[0].weight)
    assert torch.equal(streamed[0](torch.eye(64)), model[0](torch.eye(64)))  # type: ignore[index,operator]
    with pytest.raises(WeightReadError, match=r"8192 bytes too early.*m\.safetensors"):
        streamed(torch.eye(64))
    odewei.close(streamed)
    del state


def test_lists_are_those_of_sha256sum(tmp_path: Path) -> None:
    """What sha256sum writes is read, odd names included, and what is written here it accepts."""
    names = ["plain", "with blank", "back\\slash", "new\nline", "é", "*star", " lead"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    written = subprocess.run(["sha256sum", "--", *names], cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / "SHA256SUMS").write_bytes(written)
    assert read_sums(tmp_path / "SHA256SUMS") == {name: sha256(tmp_path / name) for name in names}
    ours = "".join(format_sum(name, sha256(tmp_path / name)) for name in names)
    assert ours.encode() == written


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"hello", "line 1 of the list"),
        (b"\n# fine\n" + b"a" * 63 + b"  w\n", "line 3"),
        (b"a" * 64 + b"  w\n" + b"b" * 64 + b"  ./w\n", "line 2.*'w' another sum"),
        (b"\xff\xfe", "line 1"),
    ],
)
def test_lists_that_are_none_are_refused(content: bytes, problem: str, file: Path) -> None:
    """A damaged list is an error with the line's number, and never taken for an empty one."""
    (file.parent / "SHA256SUMS").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=problem):
        SafetensorsLoader(file, verify="sha256").weights()
