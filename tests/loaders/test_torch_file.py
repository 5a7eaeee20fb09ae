"""Files of torch.save: the suite, hostile pickles and archives (trap 33), and the way without offsets."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from odewei.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError, WeightReadError
from odewei.loaders import TorchLoader, WeightInfo
from odewei.loaders.tensors import DTYPES
from tests.files import save_without_checksums

from .conformance import COMPLEX, LoaderConformance, assert_same, bits, random_tensor, read_bytes


class TestTorchLoader(LoaderConformance):
    """The suite over one file."""

    keeps_strides = keeps_gaps = True
    dtypes = DTYPES | COMPLEX

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> TorchLoader:
        torch.save(tensors, folder / "model.pt")
        return TorchLoader(folder / "model.pt", **options)


class TestTorchLoaderWithoutOffsets(TestTorchLoader):
    """The suite where torch leaves no offsets: through the mapped file, without spans."""

    has_spans = False

    @pytest.fixture(autouse=True)
    def without_offsets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        load = torch.load

        def forgetful(source: Any, **options: Any) -> Any:
            return load(source, **{**options, "map_location": "cpu"})

        monkeypatch.setattr(torch, "load", forgetful)

    def test_a_truncated_file_is_noticed(self, tmp_path: Path) -> None:
        """A mapped file that was cut is an error and not a killed process."""
        loader = self.make({"w": torch.ones(100_000)}, tmp_path)
        info = loader.weights()["w"]
        os.truncate(loader.path, 100)
        with pytest.raises(WeightReadError, match=r"100 now.*'w'"):
            read_bytes(loader, info)
        loader.close()
        with pytest.raises(WeightReadError, match="100 now"):
            read_bytes(loader, info)
        loader.path.unlink()
        with pytest.raises(WeightReadError, match=r"does not exist|no longer be opened|No such file"):
            read_bytes(loader, info)


def saved(value: object, folder: Path, name: str = "model.pt") -> Path:
    torch.save(value, folder / name)
    return folder / name


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive written anew by another tool, each entry changed, or left out for None."""
    out = path.with_name("rewritten.pt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w", compression) as target:
        for member in source.infolist():
            content = change(member.filename.partition("/")[2], source.read(member))
            if content is not None:
                target.writestr(member.filename, content)
    return out


def test_parameters_and_state_dicts_are_read(tmp_path: Path) -> None:
    """A module's state_dict, with its metadata, and a dict of Parameters are flat mappings of tensors."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    for mapping in (module.state_dict(), dict(module.named_parameters()), OrderedDict(module.named_parameters())):
        found = TorchLoader(saved(mapping, tmp_path))("module", list(mapping))
        assert found.keys() == mapping.keys()
        for name, expected in mapping.items():
            assert_same(found[name], expected)


def test_a_nested_mapping_is_chosen_by_key(tmp_path: Path) -> None:
    """A training checkpoint is refused with the keys there are, and read when one of them is given."""
    path = saved({"epoch": 3, "model": {"w": torch.ones(2)}, "optimizer": {"lr": 1.0}}, tmp_path)
    with pytest.raises(CheckpointError, match=r"int.*'epoch'.*key='model' or key='optimizer'"):
        TorchLoader(path).weights()
    with pytest.raises(CheckpointError, match=r"'state_dict'.*Keys with mappings: 'model', 'optimizer'"):
        TorchLoader(path, key="state_dict").weights()
    with pytest.raises(CheckpointError, match=r"float.*'lr'"):
        TorchLoader(path, key="optimizer").weights()
    assert_same(TorchLoader(path, key="model")("module", ["w"])["w"], torch.ones(2))


@pytest.mark.parametrize("value", [torch.ones(2), [torch.ones(2)], "text", 3], ids=["tensor", "list", "text", "number"])
def test_what_is_no_mapping_is_refused(value: object, tmp_path: Path) -> None:
    """A file of anything but a mapping names what it holds."""
    with pytest.raises(CheckpointError, match="not a mapping of names to tensors"):
        TorchLoader(saved(value, tmp_path)).weights()


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"w": torch.eye(2).to_sparse()}, "sparse.*'w'"),
        ({"w": torch.randn(2, dtype=torch.complex64).conj()}, "lazy conjugate.*'w'"),
        ({"w": torch._neg_view(torch.randn(2))}, "negative.*'w'"),
        ({3: torch.ones(2)}, "key 3"),
        ({"w": [1, 2]}, "list.*'w'"),
    ],
    ids=["sparse", "conjugate", "negative", "number as a name", "list"],
)
def test_what_bytes_do_not_describe_is_refused(value: object, problem: str, tmp_path: Path) -> None:
    """Values whose bytes are not what they are worth are refused by name."""
    with pytest.raises(CheckpointError, match=problem) as caught:
        TorchLoader(saved(value, tmp_path)).weights()
    assert caught.value.file == str(tmp_path / "model.pt")


class _Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("flag", ["0", "1"])
def test_code_in_a_pickle_is_not_run(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle that would run code is refused by what it asks for, and has not run it, whatever the environment."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", flag)
    path = saved({"w": torch.ones(2), "evil": _Evil(tmp_path / "ran")}, tmp_path)
    with pytest.raises(UnsafeCheckpointError, match=r"asks for posix\.mkdir.*safetensors") as caught:
        TorchLoader(path).weights()
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)
    assert caught.value.file == str(path)
    assert "weights_only=False" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # the control: a careless reader does run it
    assert (tmp_path / "ran").exists()


def test_legacy_files_are_refused_with_the_cure(tmp_path: Path) -> None:
    """A file of torch before 1.6, or any other file, is refused before anything is unpickled."""
    torch.save({"w": _Evil(tmp_path / "ran")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("PKzip? no")
    for name in ("old.pt", "empty.pt", "text.pt"):
        with pytest.raises(CheckpointError, match=r"no zip archive: written by torch before 1\.6.*torch\.save"):
            TorchLoader(tmp_path / name).weights()
    assert not (tmp_path / "ran").exists()


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    """A file cut anywhere is corrupt and says so with its size."""
    path = saved({"w": torch.ones(100)}, tmp_path)
    whole = path.read_bytes()
    for nbytes in (5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:nbytes])
        with pytest.raises(CorruptCheckpointError, match=rf"truncated \(it has {nbytes} bytes\)"):
            TorchLoader(path).weights()


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    """An archive that another tool compressed has no bytes to point at, also where they would fit into the file."""
    tensors = {"w": torch.zeros(1000), "large": random_tensor(torch.uint8, (10_000,))}
    path = rewritten(saved(tensors, tmp_path), lambda _, content: content, zipfile.ZIP_DEFLATED)
    with pytest.raises(CorruptCheckpointError, match="is compressed or encrypted"):
        TorchLoader(path).weights()


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    """torch reads what it has written with ``set_crc32_options(False)``; a wrong sum is still one."""
    path = tmp_path / "w.pt"
    save_without_checksums({"w": torch.arange(100)}, path)
    loader = TorchLoader(str(path))
    assert torch.equal(loader("", ["w"])["w"], torch.arange(100))
    torch.save({"w": torch.arange(100)}, path)
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b"collections\nOrderedDict", b"collections\nOrderedDicu").replace(b"little", b"littlE")
    )
    with pytest.raises(CorruptCheckpointError, match="does not have its checksum"):
        TorchLoader(str(path)).weights()


def test_archives_written_anew_are_right_or_refused(tmp_path: Path) -> None:
    """Offsets that torch derives from the usual layout are not believed for another one; offsets it looks up are."""
    tensors = {f"w{i}": random_tensor(torch.float32, (i + 1,), i) for i in range(5)}
    path = saved(tensors, tmp_path)
    with pytest.raises(CorruptCheckpointError, match="not within an entry"):
        TorchLoader(rewritten(path, lambda _, content: content)).weights()
    plain = rewritten(path, lambda name, content: None if name == ".format_version" else content)
    for name, found in TorchLoader(plain)("module", list(tensors)).items():
        assert_same(found, tensors[name])


def test_a_storage_shorter_than_its_tensor_is_refused(tmp_path: Path) -> None:
    """A pickle that claims more elements than the archive holds is refused by name of the weight."""
    path = saved({"w": torch.ones(100)}, tmp_path)
    short = rewritten(path, lambda name, content: content[:-4] if name == "data/0" else content)
    with pytest.raises(CorruptCheckpointError, match=r"not within an entry.*'w'"):
        TorchLoader(short).weights()


def test_a_claim_of_exabytes_allocates_nothing(tmp_path: Path) -> None:
    """Sizes in a pickle are compared with the archive, not allocated."""
    path = saved({"w": torch.ones(100)}, tmp_path)

    def huge(name: str, content: bytes) -> bytes:
        # BININT1 100 is the count of the storage, then of the tensor; BININT is the same with four bytes
        return content.replace(b"Kd", b"J" + struct.pack("<i", 2**31 - 1)) if name == "data.pkl" else content

    with pytest.raises(CorruptCheckpointError, match=r"8589934588 from.*'w'"):
        TorchLoader(rewritten(path, huge)).weights()


@pytest.mark.parametrize("name", ["byteorder", "BYTEORDER", "ByteOrder"])
def test_another_byte_order_is_refused(name: str, tmp_path: Path) -> None:
    """Tensors of a big-endian machine are not read as little-endian, nor given to torch, which finds any spelling."""
    path = tmp_path / "big.pt"
    with zipfile.ZipFile(saved({"w": torch.ones(2)}, tmp_path)) as source, zipfile.ZipFile(path, "w") as target:
        for member in source.infolist():
            if member.filename != "model/byteorder":
                target.writestr(member.filename, source.read(member))
        target.writestr(f"model/{name}", b"big")
    with pytest.raises(CheckpointError, match="'big' byte order"):
        TorchLoader(path).weights()


def test_programs_are_refused(tmp_path: Path) -> None:
    """A TorchScript archive is told apart from weights."""
    path = saved({"w": torch.ones(2)}, tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="TorchScript"):
        TorchLoader(path).weights()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["model/data/0", "model/DATA/0", "other/data/0"])
def test_two_entries_of_one_name_are_refused(name: str, tmp_path: Path) -> None:
    """An archive that two readers could understand differently is refused."""
    path = saved({"w": torch.ones(2)}, tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"12345678")
    with pytest.raises(CorruptCheckpointError, match="same name"):
        TorchLoader(path).weights()


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    """A zip file without a pickle of torch is corrupt for this purpose."""
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(CorruptCheckpointError, match=r"there is no data\.pkl"):
        TorchLoader(tmp_path / "other.pt").weights()


def usable_weights(loader: TorchLoader) -> list[WeightInfo]:
    """The weights of the file; none if it is refused, which must be with its name and a cure."""
    try:
        return list(loader.weights().values())
    except CheckpointError as error:
        refused = error
    assert refused.file == str(loader.path)
    assert refused.cure
    return []


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutilated_files_are_refused_or_read_within_the_file(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    """Whatever bytes are changed: a CheckpointError, or weights whose bytes lie within the file."""
    stream = io.BytesIO()
    torch.save({"a": torch.arange(5), "b": torch.ones(3, 2).t(), "c": torch.nn.Parameter(torch.ones(2))}, stream)
    content = bytearray(stream.getvalue())
    for at, byte in edits:
        content[at % len(content)] = byte
    path = tmp_path / "mutilated.pt"
    path.write_bytes(content)
    loader = TorchLoader(path)
    for info in usable_weights(loader):
        assert info.span is not None
        assert 0 <= info.span.offset <= info.span.offset + info.span.nbytes <= len(content)
        assert len(read_bytes(loader, info)) == info.nbytes


def test_reading_leaves_the_mode_of_the_caller_alone(tmp_path: Path) -> None:
    """Loading inside inference mode works and gives the same."""
    path = saved({"w": torch.ones(3)}, tmp_path)
    with torch.inference_mode():
        loader = TorchLoader(path)
        assert read_bytes(loader, loader.weights()["w"]) == bits(torch.ones(3))
        assert torch.is_inference_mode_enabled()
