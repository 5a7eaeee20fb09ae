"""Pickles are gone through before anything of them is done."""

import io
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from odewei.errors import CorruptCheckpointError, UnsafeCheckpointError
from odewei.loaders import TorchLoader
from odewei.loaders.pickle_scan import scan_pickle


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
        with pytest.raises(
            UnsafeCheckpointError, match=r"makes as much memory as a number says; it was not run"
        ) as caught:
            TorchLoader(tmp_path / "w.pt").weights()
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.file == str(tmp_path / "w.pt")


def test_a_call_through_another_is_refused() -> None:
    """What rebuilds tensors of other types calls its first argument: that one counts, from the memo too."""
    head = b"\x80\x02cbuiltins\nbytearray\nq\x010ctorch._tensor\n_rebuild_from_type_v2\n"
    with pytest.raises(ValueError, match="instruction '0'"):
        scan_pickle(head + b".", 0, file="f")
    data = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nbytearray\nNJ\x00\x00\x00\x40\x85NtR."
    with pytest.raises(UnsafeCheckpointError, match="bytearray"):
        scan_pickle(data, 0, file="f")
    data = (
        b"\x80\x02}cbuiltins\nbytearray\nq\x01sctorch._tensor\n_rebuild_from_type_v2\n(h\x01NJ\x00\x00\x00\x40\x85NtR."
    )
    with pytest.raises((UnsafeCheckpointError, ValueError)):
        scan_pickle(data, 0, file="f")


@pytest.mark.parametrize("unit", [b"]", b"}", b"\x8f", b"K\x01", b"(", b"]q\x01", b"N\x85"])
def test_many_small_objects_are_refused(unit: bytes, tmp_path: Path) -> None:
    """Instructions of a byte that make objects of many are counted, and end before they take 64 MiB."""
    write(tmp_path / "w.pt", b"\x80\x02" + unit * (5_000_000 // len(unit)) + b".")
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError, match=r"more objects than weights need|takes what"):
            TorchLoader(tmp_path / "w.pt").weights()
        assert tracemalloc.get_traced_memory()[1] < (5_000_000 * 2) + (64 << 20)
    finally:
        tracemalloc.stop()


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


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"\x80\x02X\xff\xff\xff\xffa.", b"R.", b"t.", b"h\x05.", b"cos\nsystem"]
)
def test_broken_pickles_are_value_errors(data: bytes) -> None:
    """What ends too early, or takes what is not there, is no pickle of weights."""
    with pytest.raises(ValueError, match=r"ends too early|not found"):
        scan_pickle(data, 0, file="f")


def test_other_instructions_are_none_of_torch() -> None:
    """A pickle of another protocol, which names things from the stack, is not gone through any further."""
    with pytest.raises(ValueError, match=r"torch\.save does not write"):
        scan_pickle(pickle.dumps([1, 2], protocol=5), 0, file="f")
