"""Indexes: what they may say, and names of shards that lead elsewhere (trap 33)."""

import json
from pathlib import Path

import pytest

from odewei.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsafeCheckpointError
from odewei.loaders.checkpoint_index import check_shard_name, read_index


def write(folder: Path, content: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_an_index_maps_weights_to_files_of_the_folder(tmp_path: Path) -> None:
    """Weights are found in the order of the index, grouped by shard; subfolders are allowed."""
    shards = {"b": "two.safetensors", "a": "one.safetensors", "c": "sub/two.safetensors", "d": "two.safetensors"}
    index = read_index(write(tmp_path, {"metadata": {"total_size": 1}, "weight_map": shards}), tmp_path / "w")
    assert index.shards == {name: tmp_path / "w" / shard for name, shard in shards.items()}
    assert list(index.by_shard().values()) == [["b", "d"], ["a"], ["c"]]


def test_the_key_of_the_mapping_can_be_chosen(tmp_path: Path) -> None:
    """weights_mapping_key says where in the index the mapping is."""
    index = read_index(write(tmp_path, {"weights": {"a": "x.bin"}}), tmp_path, "weights")
    assert index.shards == {"a": tmp_path / "x.bin"}


UNSAFE = [
    "../other.safetensors",
    "sub/../../other.safetensors",
    "sub/../inside.safetensors",
    "..",
    "..\\other.safetensors",
    "sub\\..\\..\\other.safetensors",
    "/etc/passwd",
    "//server/share/x.safetensors",
    "\\\\server\\share\\x.safetensors",
    "\\x.safetensors",
    "C:x.safetensors",
    "c:\\x.safetensors",
    "C:/x.safetensors",
]


@pytest.mark.parametrize("name", UNSAFE)
def test_shards_outside_the_folder_are_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is absolute or has .. in it is refused, on any system's rules, before anything is looked at."""
    path = write(tmp_path, {"weight_map": {"fine": "a.safetensors", "w": name}})
    looked: list[object] = []
    monkeypatch.setattr("odewei.loaders.checkpoint_index.CheckpointIndex.check_shards", looked.append)
    with pytest.raises(UnsafeCheckpointError, match=r"absolute|leads out") as caught:
        read_index(path, tmp_path)
    assert repr(name) in str(caught.value)
    assert caught.value.file == str(path)
    assert caught.value.cure
    assert not looked


@pytest.mark.parametrize("name", ["", ".", "./", "a\0b"])
def test_names_that_are_no_files_are_refused(name: str, tmp_path: Path) -> None:
    """An empty name, the folder itself and a name with a zero byte are corruption."""
    with pytest.raises(CorruptCheckpointError, match="no name of a file"):
        check_shard_name(name, index=tmp_path)


@pytest.mark.parametrize("name", ["..a.safetensors", "a..b", "...", "a b.bin", "sub/x.bin", "./x.bin", "model:1", "é"])
def test_odd_names_inside_the_folder_are_fine(name: str, tmp_path: Path) -> None:
    """Only what leads out is refused."""
    check_shard_name(name, index=tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "JSON"),
        (b"\xff", "JSON"),
        (b"{", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"weight_map":{"a":"x.bin","a":"y.bin"}}', "'a' occurs twice"),
        ([], "a JSON list"),
        ({}, r"no 'weight_map'.*has: none"),
        ({"weights": {}, "metadata": {}}, r"no 'weight_map'.*weights_mapping_key.*'weights', 'metadata'"),
        ({"weight_map": ["a"]}, "is a list"),
        ({"weight_map": None}, "is a NoneType"),
        ({"weight_map": {"a": 1}}, r"maps a weight to a int.*'a'"),
        ({"weight_map": {"a": ["x.bin"]}}, r"maps a weight to a list.*'a'"),
    ],
)
def test_an_index_of_another_form_is_refused(content: object, problem: str, tmp_path: Path) -> None:
    """What is no index is refused with what is wrong, the file and a cure."""
    path = write(tmp_path, content)
    with pytest.raises(CorruptCheckpointError, match=rf"(?s){problem}") as caught:
        read_index(path, tmp_path)
    assert caught.value.file == str(path)
    assert caught.value.cure


def test_a_huge_file_is_no_index(tmp_path: Path) -> None:
    """A file of gigabytes under the name of an index is refused before it is read; the file here is sparse."""
    path = write(tmp_path, {})
    with open(path, "ab") as stream:
        stream.truncate(2 * 10**9)
    with pytest.raises(CorruptCheckpointError, match="2000000000 bytes is no index"):
        read_index(path, tmp_path)


def test_a_missing_index_is_not_found(tmp_path: Path) -> None:
    """A path without a file is CheckpointNotFoundError, which is a FileNotFoundError."""
    with pytest.raises(FileNotFoundError, match=r"no\.json") as caught:
        read_index(tmp_path / "no.json", tmp_path)
    assert isinstance(caught.value, CheckpointNotFoundError)


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    """A name of more than a thousand letters is refused in a message that is shorter than it."""
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {"a": "x" * 1001}}))
    with pytest.raises(CorruptCheckpointError, match="no name of a file") as caught:
        read_index(tmp_path / "i.json", tmp_path)
    assert len(str(caught.value)) < 800
