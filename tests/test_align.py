"""The aligned copy of a checkpoint: the same weights for everybody, and nothing to move when they are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import odewei
from odewei import cli
from odewei.align import align
from odewei.errors import OptionsError
from odewei.loaders.safetensors_file import read_header
from odewei.runtime import runtime_of
from odewei.scheduler.reads import PlacedRead
from tests import models

WEIGHTS = {"one.weight": torch.randn(512, 640), "one.bias": torch.randn(512), "two": torch.randn(640, 512)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards, whose data does not lie at multiples of 64, with what usually lies beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    shards = {"a.safetensors": ["one.weight", "one.bias"], "b.safetensors": ["two"]}
    for file, names in shards.items():
        for blanks in range(8):
            save_file({name: WEIGHTS[name] for name in names}, folder / file, metadata={"x": " " * 8 * blanks})
            if offset(folder / file) % 64:
                break
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    return folder


def offset(file: Path) -> int:
    """Where the data begins."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_shards_in_subfolders_stay_there(folder: Path, tmp_path: Path) -> None:
    """The index of the copy finds them."""
    index = folder / "model.safetensors.index.json"
    for place in ("x", "y"):
        (folder / place).mkdir()
    (folder / "a.safetensors").rename(folder / "x" / "w.safetensors")
    (folder / "b.safetensors").rename(folder / "y" / "w.safetensors")
    text = index.read_text().replace("a.safetensors", "x/w.safetensors").replace("b.safetensors", "y/w.safetensors")
    index.write_text(text)
    align(index, tmp_path / "copy")
    loader = odewei.open_checkpoint(tmp_path / "copy")
    for name, tensor in loader("", list(WEIGHTS)).items():
        assert torch.equal(tensor, WEIGHTS[name])


@pytest.mark.parametrize("what", ["folder", "index", "file"])
def test_the_same_weights_at_pages(what: str, folder: Path, tmp_path: Path) -> None:
    """Both safetensors and odewei read the same from it; the header's text is as it was."""
    source = {"folder": folder, "index": folder / "model.safetensors.index.json", "file": folder / "a.safetensors"}
    made = align(source[what], tmp_path / "copy")
    expected = {"a.safetensors"} | ({"b.safetensors"} if what != "file" else set())
    assert {file.name for file in made} == expected
    for file in made:
        original = folder / file.name
        assert offset(original) % 64
        assert offset(file) % 4096 == 0
        for name, tensor in load_file(original).items():
            assert torch.equal(load_file(file)[name], tensor)
        assert list(read_header(file)) == list(read_header(original))
        assert file.read_bytes()[8 : offset(file)].rstrip() == original.read_bytes()[8 : offset(original)].rstrip()
    there = {entry.name for entry in (tmp_path / "copy").iterdir()}
    besides = {"folder": {"config.json", "model.safetensors.index.json"}, "index": {"model.safetensors.index.json"}}
    assert there == expected | besides.get(what, set())


def test_nothing_is_moved_when_it_is_read(folder: Path, tmp_path: Path) -> None:
    """The plans of a model over the copy shift no bytes, those over the original do; the results are the same."""
    align(folder, tmp_path / "copy")

    def build() -> torch.nn.Module:
        model = torch.nn.Module()
        model.one = torch.nn.Linear(640, 512)
        model.two = torch.nn.Parameter(torch.empty(640, 512))
        return model

    shifts = {}
    for path in (folder / "model.safetensors.index.json", tmp_path / "copy" / "model.safetensors.index.json"):
        with models.streamed(build, path, io="direct") as streamed:
            plans = [record.reader.plan for record in runtime_of(streamed).account.units]
            reads = [read for plan in plans for job in plan.jobs for read in job if isinstance(read, PlacedRead)]
            shifts[path] = [read.shift for read in reads]
            assert torch.equal(streamed.one.weight, WEIGHTS["one.weight"])
            assert torch.equal(streamed.two, WEIGHTS["two"])
    original, copy = shifts.values()
    assert len(copy) == len(original) > 0
    assert any(original)
    assert not any(copy)


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    """Not even by an aligned copy of itself, and a refusal leaves nothing behind."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(odewei.OdeweiError, match="is there already"):
        align(folder, folder)
    align(folder, tmp_path / "copy")
    with pytest.raises(odewei.OdeweiError, match="is there already"):
        align(folder, tmp_path / "copy")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_what_cannot_be_aligned(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch file, an empty folder, half a file: an error, and no copy; a full disk leaves no half of one."""
    (tmp_path / "empty").mkdir()
    for source, message in (
        (folder / "pytorch_model.bin", "only safetensors"),
        (tmp_path / "empty", "no .safetensors"),
        (tmp_path / "nothing.safetensors", "does not exist"),
    ):
        with pytest.raises(odewei.OdeweiError, match=message):
            align(source, tmp_path / "copy")
    half = (folder / "b.safetensors").read_bytes()[:-1]
    (folder / "b.safetensors").write_bytes(half)
    with pytest.raises(odewei.OdeweiError, match="truncated"):
        align(folder, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(odewei.OdeweiError, match="No space left"):
        align(folder / "a.safetensors", tmp_path / "copy")
    assert list((tmp_path / "copy").iterdir()) == []


def test_the_command(folder: Path, tmp_path: Path) -> None:
    """It names what it writes; mistakes are one line."""
    result = CliRunner().invoke(cli.group(), ["align", str(folder), str(tmp_path / "copy")])
    assert result.exit_code == 0, result.output
    assert "a.safetensors" in result.output
    again = CliRunner().invoke(cli.group(), ["align", str(folder), str(tmp_path / "copy")])
    assert again.exit_code == 1
    assert "is there already" in again.output
    assert "Traceback" not in again.output


def test_a_url_is_not_aligned(tmp_path: Path) -> None:
    """What is to be copied is downloaded first."""
    with pytest.raises(OptionsError, match=r"only a local checkpoint.*Download it"):
        align("https://127.0.0.1/model.safetensors", tmp_path / "copy")
