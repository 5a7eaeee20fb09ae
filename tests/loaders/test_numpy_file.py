"""NumPy's files: the suite over each kind, hostile archives and headers (trap 33), agreement with NumPy."""

import io
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from odewei.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError, WeightReadError
from odewei.loaders import NumpyLoader, WeightInfo
from odewei.loaders.numpy_file import NUMPY_DTYPES
from odewei.loaders.tensors import contiguous_stride

from .conformance import LoaderConformance, assert_same, bits, random_tensor, read_bytes


def array_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor as an array, strides and all; complex32 and bfloat16 do not exist there."""
    return np.asarray(tensor.detach().resolve_conj().resolve_neg().numpy())


class NumpySuite(LoaderConformance):
    """What holds for every kind of file: NumPy keeps C and Fortran order, and no other strides."""

    dtypes = NUMPY_DTYPES

    def kept_stride(self, tensor: torch.Tensor) -> tuple[int, ...]:
        flags = array_of(tensor).flags
        if flags.f_contiguous and not flags.c_contiguous:
            return tuple(reversed(contiguous_stride(tuple(reversed(tensor.shape)))))
        return contiguous_stride(tensor.shape)


class TestArchive(NumpySuite):
    """The suite over numpy.savez."""

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> NumpyLoader:
        np.savez(folder / "model.npz", **{name: array_of(tensor) for name, tensor in tensors.items()})
        return NumpyLoader(folder / "model.npz", **options)


class TestDeflatedArchive(NumpySuite):
    """The suite over numpy.savez_compressed: no spans."""

    has_spans = False

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> NumpyLoader:
        np.savez_compressed(folder / "model.npz", **{name: array_of(tensor) for name, tensor in tensors.items()})
        return NumpyLoader(folder / "model.npz", **options)


class TestFolder(NumpySuite):
    """The suite over a folder of .npy files."""

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> NumpyLoader:
        (folder / "arrays").mkdir(exist_ok=True)
        for name, tensor in tensors.items():
            np.save(folder / "arrays" / f"{name}.npy", array_of(tensor))
        return NumpyLoader(folder / "arrays", **options)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", sorted(NUMPY_DTYPES))
def test_another_byte_order_is_turned(name: str, save: Any, tmp_path: Path) -> None:
    """Arrays of big-endian machines have the same values here, their dtype and their order of elements."""
    expected = random_tensor(NUMPY_DTYPES[name], (5, 3)).t()
    array = array_of(expected)
    big = array.astype(array.dtype.newbyteorder(">")) if name[0] != "c" else array.byteswap().view(f">{name}")
    save(tmp_path / "big.npz", w=big)
    loader = NumpyLoader(tmp_path / "big.npz")
    found = loader("module", ["w"])["w"]
    assert (loader.weights()["w"].span is None) == (save is np.savez_compressed or expected.dtype.itemsize > 1)
    assert bits(found) == np.ascontiguousarray(big.astype(array.dtype) if name[0] != "c" else array).tobytes()
    assert found.stride() == expected.stride()


def test_a_file_is_a_weight_by_its_name(tmp_path: Path) -> None:
    """One .npy file is a checkpoint of one weight."""
    np.save(tmp_path / "layer.0.weight.npy", np.arange(3))
    found = NumpyLoader(tmp_path / "layer.0.weight.npy")("module", ["layer.0.weight"])
    assert_same(found["layer.0.weight"], torch.arange(3))


def npy(descr: object = "<f4", shape: object = (2,), order: object = False, data: bytes = b"12345678") -> bytes:
    """A file with this header."""
    return npy_of(repr({"descr": descr, "fortran_order": order, "shape": shape}).encode(), data)


def npy_of(header: bytes, data: bytes = b"12345678", *, length: int | None = None, version: bytes = b"\1\0") -> bytes:
    count = struct.pack("<H" if version == b"\1\0" else "<I", len(header) if length is None else length)
    return b"\x93NUMPY" + version + count + header + data


CORRUPT = {
    "empty": (b"", "no header"),
    "a pickle": (b"\x80\x04" * 10, "a pickle has none"),
    "version 9": (npy_of(b"{}", version=b"\x09\0"), "version"),
    "long header": (npy_of(b"", length=10_001), "claims 10001 bytes"),
    "huge header": (npy_of(b"", length=2**32 - 1, version=b"\2\0"), "claims 4294967295 bytes"),
    "cut header": (npy()[:30], "truncated within its header"),
    "no text": (npy_of(b"\xff\xfe", version=b"\3\0"), "not the text"),
    "no dictionary": (npy_of(b"[1]"), "no dictionary"),
    "code": (npy_of(b"__import__('os').getpid()"), "not the text"),
    "nested": (npy_of(b"(" * 5000), "not the text"),
    "a key missing": (npy_of(b"{'descr':'<f4','shape':(1,)}"), "no dictionary"),
    "order a number": (npy(order=1), "no dictionary"),
    "shape a list": (npy(shape=[2]), "the shape is"),
    "shape negative": (npy(shape=(-2,)), "the shape is"),
    "shape true": (npy(shape=(True,)), "the shape is"),
    "overflow": (npy(shape=(2**40, 2**40)), "more elements"),
    "overflow behind a zero": (npy(shape=(0, 2**40, 2**40)), "more elements"),
    "exabytes": (npy(shape=(2**60,)), "truncated: expected 46116860184273879"),
    "too short": (npy(data=b"1234567"), "truncated"),
    "too long": (npy(data=b"123456789"), "but there are"),
}


@pytest.mark.parametrize("where", ["file", "stored", "deflated"])
@pytest.mark.parametrize("case", sorted(CORRUPT))
def test_a_file_that_contradicts_itself_is_refused(case: str, where: str, tmp_path: Path) -> None:
    """The refusal says what is wrong, names weight and file, and has a cure, in an archive too."""
    content, problem = CORRUPT[case]
    path = tmp_path / ("w.npy" if where == "file" else "w.npz")
    if where == "file":
        if content[:6] != b"\x93NUMPY":
            problem = "no archive of NumPy"
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            kind = zipfile.ZIP_STORED if where == "stored" else zipfile.ZIP_DEFLATED
            archive.writestr("w.npy", content, kind)
    with pytest.raises(CorruptCheckpointError, match=problem) as caught:
        NumpyLoader(path).weights()
    assert caught.value.file == str(path)
    assert caught.value.cure


@pytest.mark.parametrize(
    ("array", "kind", "problem"),
    [
        (np.array([None, {}], dtype=object), UnsafeCheckpointError, "Python objects.*not read"),
        (np.zeros(2, dtype="V2"), CheckpointError, "no bfloat16.*safetensors"),
        (np.zeros(2, dtype="V1"), CheckpointError, "no fp8"),
        (np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]), CheckpointError, "no dtype for NumPy's .*'a'"),
        (np.zeros(2, dtype="U3"), CheckpointError, "no dtype for NumPy's '<U3'"),
        (np.zeros(2, dtype="M8[s]"), CheckpointError, r"no dtype for NumPy's '<M8\[s\]'"),
        (np.zeros(2, dtype=np.longdouble), CheckpointError, "no dtype for NumPy's '<f16'"),
    ],
    ids=["objects", "bfloat16", "fp8", "records", "text", "dates", "long double"],
)
def test_dtypes_that_torch_lacks_are_refused_by_name(
    array: np.ndarray[Any, Any], kind: type[CheckpointError], problem: str, tmp_path: Path
) -> None:
    """Objects are unsafe, others unsupported; each names weight, file and cure, and none is called corrupt."""
    np.savez(tmp_path / "model.npz", fine=np.zeros(2), w=array)
    with pytest.raises(kind, match=problem) as caught:
        NumpyLoader(tmp_path / "model.npz").weights()
    assert (caught.value.weight, caught.value.file) == ("w", str(tmp_path / "model.npz"))
    assert caught.value.cure
    assert not isinstance(caught.value, CorruptCheckpointError)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    """An archive cut anywhere is corrupt and says so."""
    path = tmp_path / "model.npz"
    np.savez(path, w=np.arange(1000))
    whole = path.read_bytes()
    for nbytes in (0, 5, 300, len(whole) - 1):
        path.write_bytes(whole[:nbytes])
        with pytest.raises(CorruptCheckpointError, match=f"it has {nbytes} bytes"):
            NumpyLoader(path).weights()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("other", ["w.npy", "w"])
def test_two_entries_of_one_name_are_refused(other: str, tmp_path: Path) -> None:
    """An archive in which a name means two arrays is refused."""
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("w.npy", npy())
        archive.writestr(other, npy())
    with pytest.raises(CorruptCheckpointError, match="same name"):
        NumpyLoader(tmp_path / "m.npz").weights()


@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_numpy_does_not_use_are_refused(kind: int, tmp_path: Path) -> None:
    """They hold a million times their size, so nothing bounds what a small file could claim."""
    with zipfile.ZipFile(tmp_path / "m.npz", "w", kind) as archive:
        archive.writestr("w.npy", npy())
    with pytest.raises(CheckpointError, match="in a way that NumPy does not use"):
        NumpyLoader(tmp_path / "m.npz").weights()


def patched(path: Path, member: str, **changes: int) -> None:
    """Change what the directory of an archive says of a member."""
    with zipfile.ZipFile(path, "a") as archive:
        info = archive.getinfo(member)
        for name, value in changes.items():
            setattr(info, name, value)
        archive._didModify = True  # type: ignore[attr-defined]


def test_an_entry_that_claims_more_than_it_can_hold_is_refused(tmp_path: Path) -> None:
    """A deflated byte holds 1032 bytes at most; a claim of more is refused before anything is allocated."""
    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", npy(shape=(2**28,), data=b""))
    patched(path, "w.npy", file_size=2**30 + 60)
    with pytest.raises(CorruptCheckpointError, match=r"can hold.*'w'"):
        NumpyLoader(path).weights()


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """Many names for one piece of deflated zeros are how a zip bomb is made."""
    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b.npy", npy(shape=(10_000,), data=bytes(40_000)))
        archive.fp.flush()  # type: ignore[union-attr]
        inner = path.read_bytes()  # as it lies in an archive
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy(descr="|u1", shape=(len(inner),), data=inner), zipfile.ZIP_STORED)
        archive.writestr("b.npy", npy(shape=(10_000,), data=bytes(40_000)))
    patched(path, "b.npy", header_offset=path.read_bytes().index(inner))
    with pytest.raises(CorruptCheckpointError, match=r"'b\.npy' overlaps 'a\.npy'"):
        NumpyLoader(path).weights()


def test_entries_with_two_names_are_refused(tmp_path: Path) -> None:
    """What the directory calls an entry is what stands before its data; NumPy refuses it too."""
    path = tmp_path / "m.npz"
    np.savez(path, w=np.zeros(2))
    path.write_bytes(path.read_bytes().replace(b"w.npy", b"x.npy", 1))
    with pytest.raises(CorruptCheckpointError, match=r"'w\.npy' has another name where its data are"):
        NumpyLoader(path).weights()


@pytest.mark.parametrize("written", [39_999, 40_001, 10_000_000])
def test_an_entry_that_inflates_to_another_length_is_noticed(written: int, tmp_path: Path) -> None:
    """However much really comes out, no byte beyond the weight is written, and the read fails by name."""
    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", npy(shape=(10_000,), data=bytes(written)))
    patched(path, "w.npy", file_size=len(npy(shape=(10_000,), data=bytes(40_000))))
    loader = NumpyLoader(path)
    memory = bytearray(b"x" * 40_010)
    with pytest.raises(WeightReadError, match=r"length|more than the") as caught:
        loader.read_into(loader.weights()["w"], memoryview(memory)[:40_000])
    assert (caught.value.weight, caught.value.file) == ("w", str(path))
    assert memory[40_000:] == b"x" * 10


def test_other_deflated_bytes_are_noticed(tmp_path: Path) -> None:
    """The checksum of a deflated array is checked."""
    path = tmp_path / "m.npz"
    np.savez_compressed(path, w=np.arange(100))
    patched(path, "w.npy", CRC=1)
    loader = NumpyLoader(path)
    with pytest.raises(WeightReadError, match="checksum"):
        read_bytes(loader, loader.weights()["w"])


def test_inflating_takes_little_memory_beside_the_buffer(tmp_path: Path) -> None:
    """64 MiB of deflated zeros pass through less than 2 MiB."""
    path = tmp_path / "m.npz"
    np.savez_compressed(path, w=np.zeros(16 << 20, np.float32))
    loader = NumpyLoader(path)
    buffer = bytearray(64 << 20)
    tracemalloc.start()
    try:
        loader.read_into(loader.weights()["w"], memoryview(buffer))
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_that_changes_in_use_is_noticed(save: Any, tmp_path: Path) -> None:
    """The read after the change names weight and file; so does the one after it is gone."""
    path = tmp_path / "m.npz"
    save(path, w=np.arange(1000))
    loader = NumpyLoader(path)
    info = loader.weights()["w"]
    os.truncate(path, 60)
    with pytest.raises(WeightReadError, match=r"60 now.*'w'.*m\.npz"):
        read_bytes(loader, info)
    path.unlink()
    with pytest.raises(WeightReadError, match=r"no longer.*'w'.*m\.npz"):
        read_bytes(loader, info)


def accepted_by_numpy(content: bytes) -> np.ndarray[Any, Any] | None:
    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception:  # a mutilated header makes it raise nearly anything
        return None
    return found if isinstance(found, np.ndarray) else None


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(sorted(NUMPY_DTYPES)),
    order=st.sampled_from("<>=|"),
    shape=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    fortran=st.booleans(),
    edits=st.lists(st.tuples(st.integers(6, 90), st.sampled_from(b" '(),<>:0123456789fiuTFalse")), max_size=2),
)
def test_mutilated_files_are_never_judged_laxer_than_by_numpy(
    tmp_path: Path, dtype: str, order: str, shape: tuple[int, ...], fortran: bool, edits: list[tuple[int, int]]
) -> None:
    """What is accepted here NumPy accepts, and finds the same in; what NumPy wrote is accepted."""
    array = array_of(random_tensor(NUMPY_DTYPES[dtype], shape)).astype(np.dtype(order + dtype), "F" if fortran else "C")
    stream = io.BytesIO()
    np.save(stream, array)
    content = bytearray(stream.getvalue())
    for at, byte in edits:
        content[at] = byte
    path = tmp_path / "w.npy"
    path.write_bytes(content)
    found: WeightInfo | None
    try:
        found = NumpyLoader(path).weights()["w"]
    except CheckpointError:
        found = None
    reference = accepted_by_numpy(bytes(content))
    if not edits:
        assert found is not None
    if found is not None:
        assert reference is not None
        native = reference.astype(reference.dtype.newbyteorder("="))
        assert_same(NumpyLoader(path)("module", ["w"])["w"], torch.from_numpy(native))


def test_an_entry_without_a_name_is_the_array_without_one(tmp_path: Path) -> None:
    """A name of no letters is a name (zipfile itself stumbles over it)."""
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr(zipfile.ZipInfo(""), npy())
    found = NumpyLoader(tmp_path / "m.npz")("module", [""])
    assert bits(found[""]) == b"12345678"


def test_an_archive_behind_something_else_is_refused(tmp_path: Path) -> None:
    """A file that is two things at once is none: NumPy looks at the beginning, zipfile at the end."""
    np.savez(tmp_path / "m.npz", w=np.zeros(2))
    (tmp_path / "m.npz").write_bytes(b"\x80\x04N." + (tmp_path / "m.npz").read_bytes())
    with pytest.raises(CorruptCheckpointError, match="no archive of NumPy"):
        NumpyLoader(tmp_path / "m.npz").weights()


@pytest.mark.parametrize("bit", [0x1, 0x20, 0x40])
def test_entries_that_are_encrypted_or_patches_are_refused(bit: int, tmp_path: Path) -> None:
    """Their bytes are not the array's."""
    np.savez(tmp_path / "m.npz", w=np.zeros(2))
    patched(tmp_path / "m.npz", "w.npy", flag_bits=bit)
    with pytest.raises(CheckpointError, match="encrypted"):
        NumpyLoader(tmp_path / "m.npz").weights()
