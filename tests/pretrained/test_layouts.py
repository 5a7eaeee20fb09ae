"""Folders as people have them: shards without an index, caches, nesting, both kinds of files, pointers, variants."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import odewei
from odewei.errors import CheckpointError, CheckpointNotFoundError, OptionsError
from tests.models import gpt2, llama, same_bits
from tests.pretrained.checkpoints import as_loaded, saved
from tests.pretrained.test_transformers_model import TEXT, outputs, streamed
from tests.zoo.check import outputs as called
from tests.zoo.diffusion import DIFFUSION

transformers = pytest.importorskip("transformers")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"
_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"


def same(kept: Any, path: Path, **options: Any) -> None:
    """What is streamed from the path computes what ``kept`` does."""
    with streamed(path, **options) as model:
        assert type(model) is type(kept)
        assert same_bits(outputs(model, **TEXT), outputs(kept, **TEXT))


def zeroed(folder: Path, file: str) -> None:
    """A file of the same weights, but all zero."""
    found = {name: torch.zeros_like(value) for name, value in load_file(folder / "model.safetensors").items()}
    torch.save(found, folder / file) if file.endswith(".bin") else save_file(found, folder / file, {"format": "pt"})


def as_pickle(folder: Path) -> None:
    """The folder's safetensors files as files of torch, their index too."""
    for path in sorted(folder.glob("*.safetensors")):
        torch.save(
            load_file(path), folder / path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        )
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


@pytest.mark.parametrize("pickled", [False, True])
def test_shards_without_an_index(pickled: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A complete set of shards is read as one checkpoint, and this is said once."""
    kind = saved(llama, tmp_path, max_shard_size="100KB")
    kept = as_loaded(kind, tmp_path)
    if pickled:
        as_pickle(tmp_path)
    next(tmp_path.glob("*.index.json")).unlink()
    with caplog.at_level(logging.WARNING, "odewei"):
        same(kept, tmp_path)
    assert caplog.text.count("has no index: its ") == 1


def test_shards_of_which_one_is_missing(tmp_path: Path) -> None:
    """Without an index the missing shard is named; with one that names it too."""
    saved(llama, tmp_path, max_shard_size="100KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointNotFoundError, match=rf"{lost.name}.*holds.*Download the missing shard"):
        odewei.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match=rf"of \d+ shards it lacks 1: {lost.name}"):
        odewei.from_pretrained(tmp_path)


def test_shards_of_two_checkpoints(tmp_path: Path) -> None:
    """Two sets of shards without an index are not guessed between; a set beside adapters and other programs' is one."""
    kind = saved(llama, tmp_path, max_shard_size="100KB")
    kept = as_loaded(kind, tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    first = next(tmp_path.glob("*.safetensors"))
    shutil.copy(first, tmp_path / "consolidated-00001-of-00001.safetensors")
    same(kept, tmp_path)
    shutil.copy(first, tmp_path / "ema-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"shards of 2 checkpoints: ema-\*-of-00001.*, model-\*-of"):
        odewei.from_pretrained(tmp_path)
    (tmp_path / "ema-00001-of-00001.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="shards of 2 checkpoints"):
        odewei.from_pretrained(tmp_path)


def test_shards_that_say_a_thing_twice(tmp_path: Path) -> None:
    """A weight in two shards without an index is not guessed."""
    saved(llama, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    shutil.copy(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="two shards without an index have a weight of this name"):
        odewei.from_pretrained(tmp_path)


def cached(cache: Path, source: Path, *commits: str, main: str | None = COMMIT) -> Path:
    """A repository in a cache of the hub, with snapshots of the source's files."""
    place = cache / "models--someone--tiny"
    for commit in commits:
        shutil.copytree(source, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "blobs").mkdir()
    if main is not None:
        (place / "refs" / "main").write_text(main)
    return place


def test_a_repository_in_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The folder models--owner--name is its main snapshot, or that of revision=; the cache around it, if it has one."""
    kind = saved(llama, tmp_path / "made")
    kept = as_loaded(kind, tmp_path / "made")
    place = cached(tmp_path / "hub", tmp_path / "made", COMMIT, OTHER)
    zeroed(place / "snapshots" / OTHER, "model.safetensors")
    with caplog.at_level(logging.INFO, "odewei"):
        same(kept, place)
    assert f"its snapshot {COMMIT} is read" in caplog.text
    same(kept, tmp_path / "hub")
    same(kept, place / "snapshots" / COMMIT)
    same(as_loaded(kind, place / "snapshots" / OTHER), place, revision=OTHER)
    (place / "refs" / "v1").write_text(OTHER)
    same(as_loaded(kind, place / "snapshots" / OTHER), place, revision="v1")
    for revision in ("v2", "../main", "main/.."):
        with pytest.raises(
            CheckpointNotFoundError, match=rf"no snapshot of '{revision}'; there are: {COMMIT}, {OTHER}"
        ):
            odewei.from_pretrained(place, revision=revision)


def test_a_repository_without_references(tmp_path: Path) -> None:
    """Its only snapshot is read; of two the user has to choose, and of none there is nothing."""
    kept = as_loaded(saved(llama, tmp_path / "made"), tmp_path / "made")
    same(kept, cached(tmp_path / "one", tmp_path / "made", COMMIT, main=None))
    with pytest.raises(CheckpointNotFoundError, match=r"no snapshot of 'main'.*revision="):
        odewei.from_pretrained(cached(tmp_path / "two", tmp_path / "made", COMMIT, OTHER, main=None))
    empty = tmp_path / "none" / "models--someone--tiny"
    (empty / "snapshots").mkdir(parents=True)
    with pytest.raises(CheckpointNotFoundError, match="there are: none"):
        odewei.from_pretrained(empty)


def test_a_folder_around_a_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One folder, or one in one, that has a checkpoint is read and logged; hidden folders do not count."""
    kind = saved(llama, tmp_path / "a" / "b" / "model")
    kept = as_loaded(kind, tmp_path / "a" / "b" / "model")
    with caplog.at_level(logging.INFO, "odewei"):
        same(kept, tmp_path / "a" / "b")
        same(kept, tmp_path / "a")
    assert caplog.text.count("it is the only checkpoint in the folder") == 2
    shutil.copytree(tmp_path / "a" / "b" / "model", tmp_path / "a" / ".cache")
    same(kept, tmp_path / "a")
    with pytest.raises(CheckpointNotFoundError, match=r"has no config\.json, but a"):
        odewei.from_pretrained(tmp_path)


def test_a_folder_around_several(tmp_path: Path) -> None:
    """Several are listed, and none is guessed."""
    for name in ("first", "second"):
        saved(llama, tmp_path / name)
    with pytest.raises(CheckpointNotFoundError, match=r"2 of the folders in it are: first, second.*Name one of them"):
        odewei.from_pretrained(tmp_path)


def test_weights_without_a_configuration_are_no_folder_around_one(tmp_path: Path) -> None:
    """A folder that has weights itself is not left for one inside that has a configuration."""
    saved(llama, tmp_path / "inside")
    shutil.move(tmp_path / "inside" / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"has no config\.json, but inside, model\.safetensors"):
        odewei.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("files", "asked"),
    [
        (("model.safetensors", "pytorch_model.bin"), {}),
        (("model.safetensors", "pytorch_model.bin"), {"use_safetensors": True}),
        (("model.safetensors", "pytorch_model.bin"), {"use_safetensors": False}),
        (("model.safetensors", "model.fp16.safetensors"), {"variant": "fp16"}),
        (("model.safetensors", "model.fp16.safetensors"), {}),
        (("pytorch_model.bin",), {}),
        (("pytorch_model.fp16.bin", "pytorch_model.bin"), {"variant": "fp16"}),
        (("model.safetensors", "pytorch_model.ema.bin"), {"variant": "ema", "use_safetensors": False}),
    ],
)
def test_which_file_is_taken(files: tuple[str, ...], asked: dict[str, Any], tmp_path: Path) -> None:
    """Of several files with other weights each, that is read which transformers reads."""
    kind = saved(llama, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for number, file in enumerate(files, 1):
        weights = {name: value * number for name, value in found.items()}
        if file.endswith(".bin"):
            torch.save(weights, tmp_path / file)
        else:
            save_file(weights, tmp_path / file, {"format": "pt"})
    same(as_loaded(kind, tmp_path, **asked), tmp_path, **asked)


@pytest.mark.parametrize("asked", [{"use_safetensors": True}, {"variant": "fp16"}, {"variant": "no_such"}])
def test_a_file_that_is_asked_for_and_not_there(asked: dict[str, Any], tmp_path: Path) -> None:
    """What is asked for by a name is not replaced by something else, in transformers neither."""
    kind = saved(gpt2, tmp_path)
    as_pickle(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="no weights: looked for"):
        odewei.from_pretrained(tmp_path, **asked)
    with pytest.raises(OSError, match="no file named"):
        kind.from_pretrained(tmp_path, **asked)


@pytest.mark.parametrize("build", [llama, DIFFUSION.entries[1].build])
def test_variants_in_shards(build: Callable[[], Any], tmp_path: Path) -> None:
    """Shards of a variant are found by the index that save_pretrained writes, and without it by their names."""
    kind = saved(build, tmp_path, variant="fp16", max_shard_size="60KB")
    kept = as_loaded(kind, tmp_path, variant="fp16")
    entry = None if hasattr(kept, "generate") else DIFFUSION.entries[1]
    inputs = TEXT if entry is None else entry.inputs(1)
    for _ in range(2):
        with streamed(tmp_path, variant="fp16") as model:
            assert same_bits(called(model, inputs), called(kept, inputs))
        with pytest.raises(CheckpointNotFoundError, match="variant='fp16'"):
            odewei.from_pretrained(tmp_path)
        next(iter(tmp_path.glob("*.index.fp16.json")), tmp_path / "none").unlink(missing_ok=True)


def test_old_shards_of_a_variant(tmp_path: Path) -> None:
    """As older versions of diffusers named them and their index, they are read too."""
    from tests.pretrained.test_diffusers_model import _ENTRIES

    kind = saved(_ENTRIES["AutoencoderKL"].build, tmp_path, max_shard_size="30KB")
    kept = as_loaded(kind, tmp_path)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    text = index.read_text().replace(".safetensors", ".fp16.safetensors")
    (tmp_path / "diffusion_pytorch_model.safetensors.fp16.index.json").write_text(text)
    index.unlink()
    for path in list(tmp_path.glob("*-of-*.safetensors")):
        path.rename(tmp_path / path.name.replace(".safetensors", ".fp16.safetensors"))
    inputs = _ENTRIES["AutoencoderKL"].inputs(1)
    for _ in range(2):
        with streamed(tmp_path, variant="fp16") as model:
            assert same_bits(called(model, inputs), called(kept, inputs))
        (tmp_path / "diffusion_pytorch_model.safetensors.fp16.index.json").unlink(missing_ok=True)


@pytest.mark.parametrize("asked", [{}, {"use_safetensors": False}])
def test_pickled_shards_of_diffusers(asked: dict[str, Any], tmp_path: Path) -> None:
    """Several .bin files with their index are one model of diffusers."""
    from tests.pretrained.test_diffusers_model import _ENTRIES

    kind = saved(_ENTRIES["AutoencoderKL"].build, tmp_path, max_shard_size="30KB")
    kept = as_loaded(kind, tmp_path)
    for path in list(tmp_path.glob("*.safetensors")):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / "diffusion_pytorch_model.bin.index.json").write_text(index.read_text().replace(".safetensors", ".bin"))
    index.unlink()
    inputs = _ENTRIES["AutoencoderKL"].inputs(1)
    with streamed(tmp_path, **asked) as model:
        assert same_bits(called(model, inputs), called(kept, inputs))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("has_index", [True, False])
def test_pointers_of_git_lfs(shards: int, has_index: bool, tmp_path: Path) -> None:
    """A pointer in the place of a file of weights, or of one shard, is called what it is, with what to run."""
    saved(llama, tmp_path, **({} if shards == 1 else {"max_shard_size": "200KB"}))
    if not has_index:
        (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    path.write_text(_POINTER)
    with pytest.raises(CheckpointError, match=rf"a pointer of [Gg]it.LFS.*{path.name}.*git lfs pull"):
        odewei.from_pretrained(tmp_path)


def test_other_pointers_of_git_lfs(tmp_path: Path) -> None:
    """So is one in the place of a configuration, of an index, and of a file of torch."""
    saved(llama, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_text(_POINTER)
    with pytest.raises(CheckpointError, match=r"pointer of Git LFS.*pytorch_model\.bin"):
        odewei.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(_POINTER)
    with pytest.raises(CheckpointError, match=r"pointer of Git LFS.*index\.json"):
        odewei.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(_POINTER)
    with pytest.raises(CheckpointError, match=r"pointer of Git LFS.*config\.json"):
        odewei.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_to_nothing(name: str, tmp_path: Path) -> None:
    """A link whose file is not there, as in a cache that was copied in part, is called one."""
    saved(llama, tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(CheckpointNotFoundError, match=rf"a link to .*gone.*which is not there.*{name}.*blobs"):
        odewei.from_pretrained(tmp_path)


@pytest.mark.parametrize(("text", "told"), [("", "is empty"), ("<!DOCTYPE html><title>Log in", "an HTML page")])
def test_a_configuration_that_is_something_else(text: str, told: str, tmp_path: Path) -> None:
    """An empty file and a web page in the place of config.json are called what they are."""
    saved(llama, tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"{told}.*config\.json.*Download it again"):
        odewei.from_pretrained(tmp_path)


def test_a_configuration_only(tmp_path: Path) -> None:
    """A folder with config.json alone, or with a file of another name, says which names count and what helps."""
    saved(llama, tmp_path)
    path = (tmp_path / "model.safetensors").rename(tmp_path / "my_weights.safetensors")
    told = r"no weights: looked for model\.safetensors.*If my_weights\.safetensors holds the weights, name that file"
    with pytest.raises(CheckpointNotFoundError, match=told):
        odewei.from_pretrained(tmp_path)
    odewei.close(odewei.from_pretrained(path, config=tmp_path))
    path.unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"no weights: looked for.*download it again"):
        odewei.from_pretrained(tmp_path)


@pytest.mark.parametrize("build", [llama, DIFFUSION.entries[1].build])
def test_subfolder(build: Callable[[], Any], tmp_path: Path) -> None:
    """subfolder= is where configuration, weights and generation settings are; the name stays the whole folder's."""
    kind = saved(build, tmp_path / "parts" / "one")
    kept = as_loaded(kind, str(tmp_path), subfolder="parts/one")  # type: ignore[arg-type]
    with streamed(tmp_path, subfolder="parts/one") as model:
        assert type(model) is kind
        if hasattr(kept, "generation_config"):
            assert model.config.name_or_path == kept.config.name_or_path == str(tmp_path)
            assert model.generation_config == kept.generation_config
        else:
            assert model.config == kept.config
    for wrong in ("../parts", "/parts", 5):
        with pytest.raises(OptionsError, match="subfolder="):
            odewei.from_pretrained(tmp_path, subfolder=wrong)  # type: ignore[arg-type]
    with pytest.raises(CheckpointNotFoundError, match=r"has no config\.json|no folder"):
        odewei.from_pretrained(tmp_path, subfolder="parts/two")


def test_hub_options_with_a_folder(tmp_path: Path) -> None:
    """What is for the hub may be said of a folder too, as in transformers: it asks nobody."""
    kind = saved(llama, tmp_path)
    options: dict[str, Any] = {"revision": "main", "cache_dir": str(tmp_path / "cache"), "token": "no-such-token",
                               "local_files_only": True, "force_download": True}  # fmt: skip
    same(as_loaded(kind, tmp_path, **options), tmp_path, **options)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [kind.__name__]
