"""Pickles are read without anything in them being called, in memory that the file bounds."""

import io
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from odewei.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from odewei.loaders import TorchLoader
from odewei.loaders.pickle_reader import _STEPS, PickleReader
from odewei.loaders.pickle_values import Global, Named, OtherKey, TensorRecord, Unreadable

MOST = 32 << 20


def read(data: bytes, most: int = MOST) -> object:
    return PickleReader(io.BytesIO(data), most, file="f").load()


def write(path: Path, data: bytes) -> None:
    """A file of torch.save with another pickle."""
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))


def call(name: str, number: int, instruction: bytes = b"\x85R") -> bytes:
    """A pickle of {"w": name(number)}."""
    module, _, last = name.rpartition(".")
    return b"\x80\x02}X\x01\x00\x00\x00wc%s\n%s\n\x8a\x08" % (module.encode(), last.encode()) + (
        struct.pack("<q", number) + instruction + b"s."
    )


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(deadline=None, max_examples=60)
@given(value=PLAIN, protocol=st.integers(0, 5))
def test_plain_values_come_out_as_pickle_gives_them(value: object, protocol: int) -> None:
    """Of any protocol, whatever is made of nothing but values is read as the standard library reads it."""
    data = pickle.dumps(value, protocol)
    assert read(data) == pickle.loads(data)


def test_every_instruction_is_known_or_refused() -> None:
    """All that pickletools knows is read, but what leads out of the file, and that is refused as unknown."""
    known = {opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
    assert known - {*_STEPS, b"."} == {b"P", b"\x82", b"\x83", b"\x84", b"\x97", b"\x98"}
    assert _STEPS.keys() <= known
    with pytest.raises(ValueError, match="instruction b'P'"):
        read(b"Pout of here\n.")


@pytest.mark.parametrize("instruction", [b"\x85R", b"\x85\x81"], ids=["REDUCE", "NEWOBJ"])
@pytest.mark.parametrize(
    "name",
    ["builtins.bytearray", "__builtin__.bytearray", "torch.Tensor", "torch.HalfTensor", "torch.storage.UntypedStorage"],
)
def test_memory_by_number_is_refused(name: str, instruction: bytes, tmp_path: Path) -> None:
    """170 bytes that ask for a GiB are refused before anything is made, though torch allows the names."""
    write(tmp_path / "w.pt", call(name, 1 << 30, instruction))
    tracemalloc.start()
    try:
        with pytest.raises(UnsafeCheckpointError, match=r"it was not run") as caught:
            TorchLoader(tmp_path / "w.pt").weights()
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.file == str(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "name",
    [
        *("posix.system", "os.system", "builtins.eval", "__builtin__.exec", "builtins.getattr", "subprocess.Popen"),
        *("shutil.rmtree", "torch.load", "torch.hub.load", "numpy.load", "importlib.import_module", "a.b.function"),
        *("io.FileIO", "socket.socket", "ctypes.CDLL", "builtins.__import__", "runpy.run_path", "webbrowser.open"),
    ],
)
@pytest.mark.parametrize("how", [b"c%s\n%s\nK\x01\x85R.", b"c%s\n%s\nK\x01\x85\x81.", b"(i%s\n%s\n.", b"(c%s\n%s\no."])
def test_what_is_no_class_of_values_is_refused(name: str, how: bytes) -> None:
    """Functions, and classes of the standard library that do something, are refused by name, however called."""
    module, _, last = name.rpartition(".")
    with pytest.raises(UnsafeCheckpointError, match=name.replace(".", r"\.")):
        read(how % (module.encode(), last.encode()))


def test_objects_of_unknown_classes_are_kept_as_names() -> None:
    """A class that is asked for is not looked for: what there is of it are the name, arguments and state."""
    found = read(b"\x80\x02cno.such.module\nThing\n)\x81}X\x01\x00\x00\x00aK\x05sb.")
    assert isinstance(found, Named)
    assert (found.name, found.arguments, found.state) == ("no.such.module.Thing", (), {"a": 5})


def test_a_call_through_another_is_refused() -> None:
    """What rebuilds tensors of other types calls its first argument: only functions that make tensors may be it."""
    data = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nctorch\nTensor\nJ\x00\x00\x00\x40\x85NtR."
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system"):
        read(data)
    data = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(K\x01ctorch\nTensor\nJ\x00\x00\x00\x40\x85NtR."
    with pytest.raises(UnsafeCheckpointError, match="no name"):
        read(data)


@pytest.mark.parametrize("unit", [b"]", b"}", b"\x8f", b"K\x01", b"(", b"]q\x01", b"N\x85", b"]\x94", b"N2", b"(]l"])
def test_many_small_objects_are_refused(unit: bytes) -> None:
    """Instructions of a byte that make objects of many are counted, and end before they take twice what they may."""
    data, most = unit * (1_000_000 // len(unit)) + b".", 4 << 20
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"more objects than weights need|takes what"):
            read(data, most)
        assert tracemalloc.get_traced_memory()[1] < 2 * most + len(data)
    finally:
        tracemalloc.stop()


def test_a_file_of_small_objects_is_refused(tmp_path: Path) -> None:
    """The same through a loader: 64 MiB at most."""
    write(tmp_path / "w.pt", b"\x80\x02" + b"}" * 1_000_000 + b".")
    with pytest.raises(CorruptCheckpointError, match=r"more objects than weights need"):
        TorchLoader(tmp_path / "w.pt").weights()


@pytest.mark.parametrize(
    "data",
    [
        b"X\xff\xff\xff\x7fa.",
        b"\x8d" + b"\xff" * 7 + b"\x7fa.",
        b"B\xff\xff\xff\x7fa.",
        b"\x8e" + b"\xff" * 7 + b"\x7fa.",
        b"\x96" + b"\xff" * 7 + b"\x7fa.",
        b"\x8b\xff\xff\xff\x7fa.",
        b"L" + b"9" * 900 + b"L\n.",
        b"I" + b"9" * 5000 + b"\n.",
        b"p" + b"9" * 300 + b"\n.",
        b"S'" + b"\\x41" * 400 + b"'\n.",
    ],
)
def test_lengths_are_not_believed(data: bytes) -> None:
    """A length in a pickle makes no memory, and a number of many digits takes no time."""

    class Asked(io.BytesIO):
        def read(self, nbytes: int | None = -1) -> bytes:
            assert nbytes is not None
            assert 0 <= nbytes <= MOST
            return super().read(nbytes)

    with pytest.raises(ValueError, match=r"more objects|has \d+ bytes|too long|too early"):
        PickleReader(Asked(data), MOST, file="f").load()


def test_deep_and_cyclic_values_are_no_trouble() -> None:
    """Values that are nested a hundred thousand times, or hold themselves, are read, and as keys they stay apart."""
    deep = b"N" + b"\x85" * 100_000
    assert isinstance(read(deep + b"."), tuple)
    found = read(b"}" + deep + b"K\x01s.")
    assert isinstance(found, dict)
    assert all(isinstance(key, OtherKey) for key in found)
    cycle = read(b"]q\x00h\x00a.")
    assert isinstance(cycle, list)
    assert cycle[0] is cycle


def test_keys_that_collide_take_no_time() -> None:
    """Numbers whose hashes are all the same do not become keys that are compared with each other."""
    modulus = 2**61 - 1
    numbers = b"".join(b"\x8a\x0c" + (number * modulus).to_bytes(12, "little") + b"N" for number in range(1, 30_000))
    found = read(b"}(" + numbers + b"u.")
    assert isinstance(found, dict)
    assert len(found) == 29_999


@pytest.mark.parametrize(
    "persistent_id",
    [
        b"N",
        b"X\x09\x00\x00\x00/etc/link",
        b")",
        b"(X\x07\x00\x00\x00storageNX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02t",
        b"(X\x07\x00\x00\x00storagecos\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02t",
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nK\x00X\x03\x00\x00\x00cpuK\x02t",
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ\xff\xff\xff\xfft",
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu\x88t",
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02K\x05t",
    ],
)
def test_persistent_ids_name_storages_only(persistent_id: bytes) -> None:
    """What is none of torch's ids, of another type, or of no size is refused."""
    with pytest.raises(ValueError, match=r"persistent id|storage"):
        read(persistent_id + b"Q.")


@pytest.mark.parametrize("key", ["../../secret", "/etc/passwd", "data/0", "version", "1", "0\0"])
def test_a_storage_that_the_archive_does_not_have_is_refused(key: str, tmp_path: Path) -> None:
    """A key leads to an entry of this archive's storages, or nowhere."""
    name = key.encode()
    data = (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X" + struct.pack("<I", len(name)) + name + b"X\x03\x00\x00\x00cpuK\x02tQK\x00K\x02\x85K\x01\x85\x89NtRs."
    )
    write(tmp_path / "w.pt", data)
    with pytest.raises(CorruptCheckpointError, match="not within an entry"):
        TorchLoader(tmp_path / "w.pt").weights()


def test_a_tensor_keeps_what_it_was_made_with() -> None:
    """Nothing in a pickle changes a tensor after it was made, as torch's reader would."""
    data = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
        b"X\x03\x00\x00\x00cpuK\x02tQK\x00K\x02\x85K\x01\x85\x89NtR"
    )
    found = read(data + b".")
    assert isinstance(found, TensorRecord)
    assert (found.dtype, found.shape, found.stride, found.offset) == (torch.float32, (2,), (1,), 0)
    with pytest.raises(ValueError, match="another state"):
        read(data + b"Nb.")


def test_what_torch_saves_is_let_through(tmp_path: Path) -> None:
    """State dicts of any dtype, with attributes, parameters, thousands of names and views, and training checkpoints."""
    layer = nn.Linear(2, 2)
    tagged = torch.ones(2)
    tagged.tag = "x"  # type: ignore[attr-defined]
    saved: list[Any] = [
        layer.state_dict(),
        OrderedDict(w=layer.weight, v=layer.weight.data.t(), tagged=tagged),
        {name: torch.zeros(2, dtype=getattr(torch, name)) for name in ("uint16", "float8_e4m3fn", "complex64", "bool")},
        {f"model.layers.{number}.weight": torch.zeros(1) for number in range(3000)},
        {f"view.{number}": layer.weight.data.view(-1) for number in range(3000)},
    ]
    for number, tensors in enumerate(saved):
        torch.save(tensors, tmp_path / f"{number}.pt")
        assert TorchLoader(tmp_path / f"{number}.pt").weights().keys() == tensors.keys()
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    torch.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "all.pt")
    assert TorchLoader(tmp_path / "all.pt", key="model").weights().keys() == {"weight", "bias"}


class _Twice(torch.Tensor):
    """Of more than bytes."""


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.eye(2).to_sparse(), r"layout torch\.sparse_coo"),
        (torch.ones(2).as_subclass(_Twice), "_Twice is more than"),
        (torch.empty(2, device="meta"), "meta device"),
    ],
    ids=["sparse", "subclass", "meta"],
)
def test_tensors_that_are_more_than_bytes_say_what_they_are(tensor: Any, problem: str, tmp_path: Path) -> None:
    """Sparse and meta tensors and subclasses are errors where they are asked for, and no others."""
    torch.save({"w": tensor, "x": torch.ones(1)}, tmp_path / "w.pt")
    known = TorchLoader(tmp_path / "w.pt").weights()
    assert list(known) == ["x"]
    with pytest.raises(CheckpointError, match=problem):
        known["w"]


def test_dtypes_are_those_of_torch_only() -> None:
    """A name is a dtype if torch has it, and asking imports nothing."""
    assert Global("torch.float16").dtype is torch.float16
    assert Global("torch.nn").dtype is None
    assert Global("os.float16").dtype is None
    assert Unreadable("x").cure


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80", b"\x80\x02X\xff\xff\x00\x00a.", b"R.", b"t.", b"h\x05.", b"cos\nsystem", b"0.", b"N\x86.", b"b."],
)
def test_broken_pickles_are_value_errors(data: bytes) -> None:
    """What ends too early, or takes what is not there, is no pickle of weights."""
    with pytest.raises(ValueError, match=r"ends too early"):
        read(data)
