"""Files of torch.save: the suite, hostile pickles and archives (trap 33)."""

import argparse
import datetime
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from odewei import verify
from odewei.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from odewei.loaders import TorchLoader, WeightInfo, open_checkpoint
from odewei.loaders.tensors import DTYPES
from tests.files import save_without_checksums

from .conformance import COMPLEX, LoaderConformance, assert_same, bits, random_tensor, read_bytes

_ALL = DTYPES | COMPLEX
_UNTYPED = ("U1", "U3", "U6", "F8_", "F4")  # saved in storages without a type, which the old format does not have


class TestTorchLoader(LoaderConformance):
    """The suite over one file."""

    keeps_strides = keeps_gaps = True
    dtypes = _ALL

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> TorchLoader:
        torch.save(tensors, folder / "model.pt")
        return TorchLoader(folder / "model.pt", **options)


class TestLegacyTorchLoader(TestTorchLoader):
    """The suite over a file as torch wrote them before 1.6."""

    dtypes = {name: dtype for name, dtype in _ALL.items() if not name.startswith(_UNTYPED)}  # noqa: RUF012, as its parent's

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> TorchLoader:
        torch.save(tensors, folder / "model.pt", _use_new_zipfile_serialization=False)
        return TorchLoader(folder / "model.pt", **options)


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
    """Of a training checkpoint the only mapping with tensors is read; a key that is given is what counts."""
    path = saved({"epoch": 3, "model": {"w": torch.ones(2)}, "optimizer": {"lr": 1.0}}, tmp_path)
    assert_same(TorchLoader(path)("module", ["w"])["w"], torch.ones(2))
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
        ({"w": [1, 2]}, "list.*'w'"),
    ],
    ids=["sparse", "conjugate", "negative", "list"],
)
def test_what_bytes_do_not_describe_is_refused(value: object, problem: str, tmp_path: Path) -> None:
    """Values whose bytes are not what they are worth are refused by name, where they are asked for."""
    assert isinstance(value, dict)
    with pytest.raises(CheckpointError, match=problem) as caught:
        TorchLoader(saved(value, tmp_path)).weights()
    assert caught.value.file == str(tmp_path / "model.pt")
    loader = TorchLoader(saved(value | {"other": torch.ones(2)}, tmp_path))
    assert list(loader.weights()) == ["other"]
    for ask in (lambda: loader.weights()["w"], lambda: loader.weights().get("w"), lambda: loader.locate(["w"])):
        with pytest.raises(CheckpointError, match=problem):
            ask()


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
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), UnsafeCheckpointError)
    assert caught.value.file == str(path)
    assert "weights_only=False" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # the control: a careless reader does run it
    assert (tmp_path / "ran").exists()


def test_hostile_legacy_files_and_other_files_are_refused(tmp_path: Path) -> None:
    """A file of torch before 1.6 that asks to call something, or any other file, is refused and nothing of it run."""
    torch.save({"w": _Evil(tmp_path / "ran")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("PKzip? no")
    with pytest.raises(UnsafeCheckpointError, match=r"asks for posix\.mkdir"):
        TorchLoader(tmp_path / "old.pt").weights()
    for name in ("empty.pt", "text.pt"):
        with pytest.raises(CheckpointError, match=r"not? (a )?file of torch\.save"):
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


def test_archives_written_anew_are_right(tmp_path: Path) -> None:
    """The places of tensors are those of the archive's directory, whatever layout torch would write."""
    tensors = {f"w{i}": random_tensor(torch.float32, (i + 1,), i) for i in range(5)}
    path = saved(tensors, tmp_path)
    for left_out in ("", ".format_version"):
        plain = rewritten(path, lambda name, content, left_out=left_out: None if name == left_out else content)
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


class _Configuration:
    """Of a class that only the training program has."""

    def __init__(self) -> None:
        self.values = {"lr": 1.0, "scale": torch.ones(3)}


def test_a_lightning_checkpoint_is_read(tmp_path: Path) -> None:
    """Weights beside an optimizer, a scheduler, callbacks and hyper-parameters of unknown classes."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    value = {
        "epoch": 3,
        "state_dict": {f"model.{name}": tensor for name, tensor in layer.state_dict().items()},
        "optimizer_states": [optimizer.state_dict()],
        "optimizer": optimizer.state_dict(),
        "hyper_parameters": argparse.Namespace(folder=tmp_path, mean=np.float64(0.5), made=datetime.date(2024, 1, 1)),
        "configuration": _Configuration(),
        "callbacks": {"best": np.arange(3), "keys": {(1, 2): 3}},
    }
    for options in ({}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}):
        torch.save(value, tmp_path / "last.ckpt", **options)
        loader = open_checkpoint(tmp_path / "last.ckpt", prefix="model.")
        assert_same(loader("module", ["weight"])["weight"], layer.weight.detach())
        assert loader.weights().keys() == {"weight", "bias"}


def test_of_several_mappings_each_weight_has_the_key(tmp_path: Path) -> None:
    """Where two mappings have tensors nothing is chosen: both are there, under their keys."""
    value = {"params": {"w": torch.zeros(2)}, "params_ema": {"w": torch.ones(2), "note": "x"}, "iteration": 7}
    loader = TorchLoader(saved(value, tmp_path))
    assert list(loader.weights()) == ["params.w", "params_ema.w"]
    assert_same(open_checkpoint(loader.path, prefix="params_ema.")("module", ["w"])["w"], torch.ones(2))
    assert_same(TorchLoader(loader.path, key="params_ema")("module", ["w"])["w"], torch.ones(2))


def test_what_is_no_tensor_is_an_error_for_who_needs_it(tmp_path: Path) -> None:
    """Other entries do not keep the weights from being read, and can be left out by name."""
    path = saved({"0.weight": torch.ones(2), "epoch": 3, "note": None, 5: torch.ones(1)}, tmp_path)
    assert list(TorchLoader(path).weights()) == ["0.weight"]
    assert list(TorchLoader(path, rename={"epoch": None}).weights()) == ["0.weight"]
    known = TorchLoader(path).weights()
    assert "epoch" in known
    with pytest.raises(CheckpointError, match=r"this is a int.*'epoch'"):
        known["epoch"]
    with pytest.raises(KeyError):
        known["nothing"]


def test_a_whole_model_is_told_apart(tmp_path: Path) -> None:
    """A module that was saved as an object is named, with what to do."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"holds a Linear.*torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"):
        TorchLoader(tmp_path / "model.pt").weights()


def _patched_load(monkeypatch: pytest.MonkeyPatch) -> None:
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *given, **options: load(*given, **{**options, "weights_only": False}))


def _patched_unpickler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._weights_only_unpickler.Unpickler", pickle.Unpickler)
    monkeypatch.setattr("torch.serialization.pickle", pickle)


def _trusted_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._weights_only_unpickler._marked_safe_globals_set", {os.mkdir, "posix.mkdir"})


def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


@pytest.mark.parametrize("by", [_patched_load, _patched_unpickler, _trusted_globals, _environment])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_never_run_whatever_is_done_to_torch(
    by: Callable[[pytest.MonkeyPatch], None], legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither loading nor verifying runs code of a pickle, whatever torch and pickle were made to trust."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2), "evil": _Evil(tmp_path / "ran")}, path, _use_new_zipfile_serialization=not legacy)
    by(monkeypatch)
    with pytest.raises(UnsafeCheckpointError, match=r"asks for posix\.mkdir"):
        open_checkpoint(tmp_path).weights()
    assert "posix.mkdir" in verify(tmp_path).problems[0]
    assert not (tmp_path / "ran").exists()


def test_torch_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right files are read with torch.load and the standard library's unpicklers taken away."""
    path = saved({"w": torch.arange(3)}, tmp_path)
    for name in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler"):
        monkeypatch.setattr(name, None)
    assert_same(TorchLoader(path)("module", ["w"])["w"], torch.arange(3))
