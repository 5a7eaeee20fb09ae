"""A file is what its first bytes say: it is read as that, or refused by what it is, with a cure that works."""

import gzip
import io
import json
import logging
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from odewei import verify
from odewei.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, OdeweiError
from odewei.loaders import (
    NumpyLoader,
    SafetensorsLoader,
    ShardedWeightsLoader,
    TorchLoader,
    WeightsLoader,
    open_checkpoint,
    told,
)

TENSORS = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(3)}


def torch_bytes(**options: object) -> bytes:
    stream = io.BytesIO()
    torch.save(TENSORS, stream, **options)
    return stream.getvalue()


def npz_bytes() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **{name: tensor.numpy() for name, tensor in TENSORS.items()})
    return stream.getvalue()


def zipped(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, "{}")
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return stream.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 548105171\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"

OTHERS: dict[str, tuple[bytes, str]] = {
    "LFS pointer": (LFS, r"pointer of git-LFS.*git lfs pull"),
    "web page": (PAGE, r"web page \(HTML\).*Download the file itself"),
    "short web page": (b"<html>404</html>", r"web page \(HTML\)"),
    "JSON error": (b'{"error":"Access to model x/y is restricted"}', r"JSON text.*restricted.*log in"),
    "JSON list": (b'[{"message": "gone"}]', r"JSON text"),
    "configuration": (b'{\n  "architectures": ["GPT2LMHeadModel"]\n}', r"JSON text.*Name the file of the weights"),
    "XML error": (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', r"answer of a server.*NoSuchKey"),
    "plain text": (b"Entry not found\n", r"a text \('Entry not found'\)"),
    "empty": (b"", r"empty file.*that did not finish"),
    "zeros": (bytes(5000), r"zeros where a header should be"),
    "gzip": (gzip.compress(save(TENSORS)), r"packed with gzip.*gunzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(20), r"packed with zstd"),
    "xz": (b"\xfd7zXZ\x00" + bytes(20), r"packed with xz"),
    "tar": (tarred(), r"tar archive.*tar -xf"),
    "zip": (zipped("model/config.json"), r"zip archive of other files \(model/config\.json\).*unzip"),
    "pickle": (pickle.dumps({"w": 1}), r"pickle that torch\.save has not written; it was not run"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(90), r"HDF5"),
    "old ggml": (b"lmgg" + bytes(90), r"from before GGUF"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".ckpt", ".gguf", ".npz"])
@pytest.mark.parametrize("case", sorted(OTHERS))
def test_what_is_no_file_of_weights_is_named(case: str, suffix: str, tmp_path: Path) -> None:
    """Whatever its name, by itself, in a folder and to ``verify``, a file is refused by what it is."""
    content, problem = OTHERS[case]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    for place in (path, tmp_path):
        with pytest.raises(CheckpointError, match=rf"(?s){problem}") as caught:
            open_checkpoint(place).weights()
        assert caught.value.file == str(path)
        assert "claims" not in str(caught.value)
    assert len(verify(path).problems) == 1


@pytest.mark.parametrize("loader", [SafetensorsLoader, TorchLoader])
@pytest.mark.parametrize("case", sorted(OTHERS.keys() - {"zip"}))
def test_loaders_of_one_format_say_it_too(case: str, loader: type[WeightsLoader], tmp_path: Path) -> None:
    """A loader that was named for another kind of file says what the file is."""
    content, problem = OTHERS[case]
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"(?s){problem}"):
        loader(tmp_path / "model").weights()  # type: ignore[call-arg]


def test_loaders_name_the_loader_that_fits(tmp_path: Path) -> None:
    """A file of another format is refused with the loader that reads it."""
    (tmp_path / "a").write_bytes(torch_bytes())
    (tmp_path / "b").write_bytes(save(TENSORS))
    (tmp_path / "c").write_bytes(b"\x93NUMPY\x01\x00v\x00" + bytes(120))
    with pytest.raises(
        CheckpointError, match=r"torch\.save.*not a safetensors file.*Use TorchLoader, or open_checkpoint"
    ):
        SafetensorsLoader(tmp_path / "a").weights()
    with pytest.raises(CheckpointError, match=r"a safetensors file, not a file of torch\.save.*Use SafetensorsLoader"):
        TorchLoader(tmp_path / "b").weights()
    with pytest.raises(CheckpointError, match=r"a file of NumPy, not a safetensors file.*Use NumpyLoader"):
        SafetensorsLoader(tmp_path / "c").weights()


@pytest.mark.parametrize(
    ("content", "name", "kind"),
    [
        (save(TENSORS), "pytorch_model.bin", SafetensorsLoader),
        (save(TENSORS), "model.ckpt", SafetensorsLoader),
        (save(TENSORS), "model", SafetensorsLoader),
        (torch_bytes(), "model.safetensors", TorchLoader),
        (torch_bytes(), "weights.dat", TorchLoader),
        (torch_bytes(_use_new_zipfile_serialization=False), "model.safetensors", TorchLoader),
        (npz_bytes(), "model.pt", NumpyLoader),
        (torch_bytes(), "model.npz", TorchLoader),
    ],
)
def test_a_file_under_the_name_of_another_format_is_read(
    content: bytes,
    name: str,
    kind: type,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is read as what it is, which is said once."""
    monkeypatch.setattr(told, "_told", set())
    (tmp_path / name).write_bytes(content)
    with caplog.at_level(logging.INFO, "odewei"):
        for _ in range(2):
            loader = open_checkpoint(tmp_path / name)
            assert isinstance(loader, kind)
            assert torch.equal(loader("", ["w"])["w"], TENSORS["w"])
    assert [record.message for record in caplog.records if "whatever its name says" in record.message].__len__() == 1
    assert verify(tmp_path / name).ok


@pytest.mark.parametrize("ending", [".incomplete", ".part", ".crdownload", ".aria2"])
def test_unfinished_downloads_are_told(ending: str, tmp_path: Path) -> None:
    """The name says it, for the file and for a folder that has nothing else."""
    path = tmp_path / f"model.safetensors{ending}"
    path.write_bytes(save(TENSORS)[:-4])
    with pytest.raises(CheckpointError, match=r"download that did not finish.*again.*'model\.safetensors'"):
        open_checkpoint(path)
    with pytest.raises(CheckpointNotFoundError, match=rf"did not finish \(model\.safetensors\{ending}\)"):
        open_checkpoint(tmp_path)


def test_a_file_cut_short_is_told(tmp_path: Path) -> None:
    """Under its own name, the length that it should have is said."""
    for name, content in (("model.safetensors", save(TENSORS)), ("model.bin", torch_bytes())):
        (tmp_path / name).write_bytes(content[:-8])
        with pytest.raises(CorruptCheckpointError, match=r"truncated.*ownload the file again"):
            open_checkpoint(tmp_path / name).weights()
        (tmp_path / name).unlink()


def test_an_archive_whose_directory_is_empty_is_no_empty_checkpoint(tmp_path: Path) -> None:
    """An archive that begins with entries, and lists none, contradicts itself."""
    content = bytearray(torch_bytes())
    end = content.rindex(b"PK\x05\x06")
    content[end - 20 : end] = bytes(20)  # of the longer form of the same record
    content[end + 8 : end + 20] = bytes(8) + end.to_bytes(4, "little")
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"data\.pkl"):
        open_checkpoint(tmp_path / "w.pt").weights()


def make_broken_link(folder: Path) -> Path:
    (folder / "model.safetensors").symlink_to("../blobs/0a1b")
    return folder / "model.safetensors"


def make_file_as_folder(folder: Path) -> Path:
    save_file(TENSORS, folder / "model.safetensors")
    return folder / "model.safetensors" / "model.safetensors"


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (make_broken_link, r"link to '\.\./blobs/0a1b', which does not exist.*Download the checkpoint again"),
        (make_file_as_folder, r"is a file itself.*Name '.*model\.safetensors'"),
    ],
)
def test_paths_that_lead_nowhere_say_why(make: Callable[[Path], Path], problem: str, tmp_path: Path) -> None:
    """A broken link and a file where a folder should be are told from a wrong name."""
    with pytest.raises(CheckpointNotFoundError, match=problem):
        open_checkpoint(make(tmp_path))


def test_a_folder_of_broken_links_says_so(tmp_path: Path) -> None:
    """A cache that has lost its blobs has the names still."""
    make_broken_link(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=r"'model\.safetensors' is a link to a file that does not exist"):
        open_checkpoint(tmp_path)


def test_a_folder_given_for_a_file_and_a_file_for_a_folder(tmp_path: Path) -> None:
    """Each says what it is, and the cure works."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"this is a folder.*open_checkpoint"):
        SafetensorsLoader(tmp_path)
    assert len(open_checkpoint(tmp_path).weights()) == 2
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "model.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"this is a file.*weights_dir=.*open_checkpoint"):
        ShardedWeightsLoader(index, tmp_path / "model.safetensors")
    assert len(open_checkpoint(index).weights()) == 2


def test_an_index_under_another_name_is_one(tmp_path: Path) -> None:
    """What maps weights to files is an index, whatever it is called."""
    save_file(TENSORS, tmp_path / "a.safetensors")
    (tmp_path / "index.json").write_text('{"metadata": {}, "weight_map": {"w": "a.safetensors", "b": "a.safetensors"}}')
    assert isinstance(open_checkpoint(tmp_path / "index.json"), ShardedWeightsLoader)


@pytest.mark.parametrize("case", ["LFS pointer", "web page", "gzip", "empty"])
def test_an_index_that_is_none_says_what_it_is(case: str, tmp_path: Path) -> None:
    """A pointer, a page or an empty file in place of an index is named."""
    content, problem = OTHERS[case]
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(OdeweiError, match=rf"(?s){problem}"):
        open_checkpoint(tmp_path)


def test_one_shard_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    """Of an index with whole shards and one pointer, the pointer is named."""
    save_file({"w": TENSORS["w"]}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(LFS)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"w": "a.safetensors", "b": "b.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match=r"git-LFS.*b\.safetensors"):
        open_checkpoint(tmp_path)


# -- folders ---------------------------------------------------------------------------------------------------------


def hub_cache(root: Path, model: str = "models--x--y", revisions: tuple[str, ...] = ("0a1b",)) -> Path:
    """A cache of a hub as its client makes it."""
    for revision in revisions:
        snapshot = root / model / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (root / model / "blobs").mkdir(exist_ok=True)
        save_file({"w": torch.full((2,), float(len(revision)))}, root / model / "blobs" / f"blob-{revision}")
        os.symlink(f"../../blobs/blob-{revision}", snapshot / "model.safetensors")
    (root / model / "refs").mkdir()
    (root / model / "refs" / "main").write_text(revisions[-1])
    return root / model


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_a_hubs_cache_is_read_from_any_level(levels: int, tmp_path: Path) -> None:
    """The revision, the model's folder and the root of the cache lead to the weights of the main revision."""
    model = hub_cache(tmp_path, revisions=("0a", "1bc"))
    place = (model / "snapshots" / "1bc", model, tmp_path)[levels]
    assert torch.equal(open_checkpoint(place)("", ["w"])["w"], torch.full((2,), 3.0))


def test_several_revisions_without_a_main_one_are_named(tmp_path: Path) -> None:
    """Without a reference nothing is chosen of two revisions; of one that is it."""
    model = hub_cache(tmp_path, revisions=("0a", "1bc"))
    shutil.rmtree(model / "refs")
    with pytest.raises(CheckpointError, match=r"2 folders below have: 0a, 1bc.*Name one of them, such as '.*0a'"):
        open_checkpoint(model)
    shutil.rmtree(model / "snapshots" / "0a")
    assert len(open_checkpoint(model).weights()) == 1


def test_two_models_in_a_cache_are_named(tmp_path: Path) -> None:
    """The root of a cache with two models is refused with both."""
    hub_cache(tmp_path)
    hub_cache(tmp_path, "models--x--z")
    with pytest.raises(CheckpointError, match=r"models--x--y, models--x--z"):
        open_checkpoint(tmp_path)


def test_a_folder_too_high_is_read_where_only_one_is_below(tmp_path: Path) -> None:
    """One or two levels too high leads to the only checkpoint below; of a pipeline's parts none is chosen."""
    inner = tmp_path / "out" / "checkpoint-500"
    inner.mkdir(parents=True)
    (tmp_path / "out" / "logs").mkdir()
    save_file(TENSORS, inner / "model.safetensors")
    for place in (tmp_path, tmp_path / "out", inner):
        assert len(open_checkpoint(place).weights()) == 2
    other = tmp_path / "out" / "checkpoint-1000"
    other.mkdir()
    save_file(TENSORS, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"2 folders below have: checkpoint-1000, checkpoint-500"):
        open_checkpoint(tmp_path)


def test_verify_takes_the_folder_itself_only(tmp_path: Path) -> None:
    """Sums are by names from the folder on: one too high is refused with the right one."""
    (tmp_path / "inner").mkdir()
    save_file(TENSORS, tmp_path / "inner" / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"Name the folder below that has one: '.*inner'"):
        verify(tmp_path)


def test_files_of_training_are_no_checkpoints(tmp_path: Path) -> None:
    """An optimizer's state and the like beside the weights do not make them doubtful."""
    torch.save(TENSORS, tmp_path / "last.pt")
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "scaler.pt"):
        torch.save({"x": torch.ones(1)}, tmp_path / name)
    assert len(open_checkpoint(tmp_path).weights()) == 2


@pytest.mark.parametrize("usual", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_the_usual_names_of_diffusers_come_first(usual: str, tmp_path: Path) -> None:
    """A variant beside the file without one does not make it doubtful; shards with an index are read."""
    write = save_file if usual.endswith("safetensors") else torch.save
    stem, _, ending = usual.rpartition(".")
    write(TENSORS, tmp_path / f"{stem}-00001-of-00001.{ending}")
    shard = f"{stem}-00001-of-00001.{ending}"
    (tmp_path / f"{usual}.index.json").write_text(json.dumps({"weight_map": {"w": shard, "b": shard}}))
    write({"w": torch.zeros(1)}, tmp_path / f"{stem}.fp16.{ending}")
    assert torch.equal(open_checkpoint(tmp_path)("", ["w"])["w"], TENSORS["w"])
