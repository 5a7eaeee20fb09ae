"""Repository ids: what is downloaded, what the cache gives, and what is said where neither works."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import odewei
from odewei.errors import CheckpointError, CheckpointNotFoundError, MissingPackageError, OptionsError
from odewei.pretrained.hub import locate, wanted_files
from tests.models import llama
from tests.pretrained.checkpoints import saved

hub: Any = pytest.importorskip("huggingface_hub")
constants: Any = pytest.importorskip("huggingface_hub.constants")
errors: Any = pytest.importorskip("huggingface_hub.errors")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def found(repository: str, **options: Any) -> Path:
    return locate(repository, **{"revision": None, "local_files_only": False, "with_code": False, **options})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's, in the place of the user's."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return folder


@pytest.fixture
def cached(cache: Path) -> Path:
    """The folder in the cache of the repository someone/tiny, with a Llama in several linked files."""
    place = cache / "models--someone--tiny"
    snapshot = place / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    saved(llama, place / "blobs", max_shard_size="100KB")
    for blob in (place / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


class Hub:
    """A hub with one repository; ``error`` is raised instead, if it is given."""

    def __init__(self, files: dict[str, str] | None = None, error: Exception | None = None) -> None:
        self.files, self.error = files or {}, error
        self.downloaded: list[str] = []
        self.asked: list[dict[str, Any]] = []

    def answer(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Have huggingface_hub's functions ask this one."""

        def list_repo_files(_: object, repository: str, *, revision: str | None = None, **how: Any) -> list[str]:
            self.asked.append(how)
            if self.error is not None:
                raise self.error
            return list(self.files)

        def download(repository: str, name: str, *, revision: str | None = None, **how: Any) -> str:
            self.asked.append(how)
            self.downloaded.append(name)
            place = cache / f"models--{repository.replace('/', '--')}"
            (place / "refs").mkdir(parents=True, exist_ok=True)
            (place / "refs" / (revision or "main")).write_text(COMMIT)
            path = place / "snapshots" / COMMIT / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(Path(self.files[name]).read_bytes())
            return str(path)

        monkeypatch.setattr(hub.HfApi, "list_repo_files", list_repo_files)
        monkeypatch.setattr(hub, "hf_hub_download", download)


def failed(kind: Any, status: int) -> Exception:
    """An error as huggingface_hub raises it for an answer with this status."""
    import httpx2 as httpx

    response = httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/api"))
    error: Exception = kind("the hub says no\nin two lines", response=response)
    return error


def test_a_repository_is_downloaded_and_streamed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its files are fetched one by one, the progress is told, and the model streams from the cache."""
    saved(llama, tmp_path / "made")
    answers = Hub({path.name: str(path) for path in sorted((tmp_path / "made").iterdir())})
    answers.files["original/consolidated.00.pth"] = answers.files["flax_model.msgpack"] = "not asked for"
    answers.answer(monkeypatch, cache)
    with caplog.at_level(logging.INFO, "odewei"):
        model = odewei.from_pretrained("someone/tiny", memory_budget="1MiB")
    try:
        assert answers.downloaded == ["config.json", "generation_config.json", "model.safetensors"]
        assert "someone/tiny: file 3 of 3: model.safetensors" in caplog.text
        with torch.no_grad():
            assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, 99)
    finally:
        odewei.close(model)


def test_what_is_cached_needs_no_network(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """local_files_only asks nobody; without it an unreachable hub is a warning, and the cache is used."""
    answers = Hub(error=ConnectionError("no route"))
    answers.answer(monkeypatch, cached)
    assert found("someone/tiny") == cached
    assert found("someone/tiny", revision=COMMIT) == cached
    answers.error = AssertionError("it was asked")
    assert found("someone/tiny", local_files_only=True) == cached
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert found("someone/tiny") == cached
    odewei.close(odewei.from_pretrained("someone/tiny"))


@pytest.mark.parametrize("asked", [False, True])
def test_offline_and_not_cached(asked: bool, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says that it is no folder, not in the cache, and why it was not downloaded."""
    Hub(error=ConnectionError("no route")).answer(monkeypatch, cache)
    why = "nothing is to be downloaded" if asked else "the hub cannot be reached"
    with pytest.raises(CheckpointNotFoundError, match=f"'someone/other'.*not in the cache.*{why}") as raised:
        odewei.from_pretrained("someone/other", local_files_only=asked)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "status", "told"),
    [
        ("GatedRepoError", 403, "'someone/other' is gated.*hf auth login"),
        ("RepositoryNotFoundError", 401, "neither a folder nor a repository 'someone/other'"),
        ("RevisionNotFoundError", 404, "has no revision 'v9'"),
        ("HfHubHTTPError", 403, "does not let this user read 'someone/other'"),
    ],
)
def test_what_the_hub_refuses(kind: str, status: int, told: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gated, private or missing repository, and a missing revision, are one line each that says what to do."""
    Hub(error=failed(getattr(errors, kind), status)).answer(monkeypatch, cache)
    with pytest.raises(CheckpointNotFoundError, match=told) as raised:
        odewei.from_pretrained("someone/other", revision="v9")
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is not None


def test_an_empty_repository(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository without anything that a model needs is said to be one."""
    Hub({"README.md": ""}).answer(monkeypatch, cache)
    with pytest.raises(CheckpointError, match="has no configuration and no weights"):
        found("someone/empty")


@pytest.mark.parametrize("path", ["no/such/folder", "./none", "/none", "~/none", "..", "a\\b", "", "a b", Path("none")])
def test_a_path_that_is_not_there(path: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be an id is said to be a folder that is missing; the hub is not asked."""
    monkeypatch.chdir(cache)
    Hub(error=AssertionError("it was asked")).answer(monkeypatch, cache)
    if path == "..":
        monkeypatch.setattr("os.path.isdir", lambda text: False)
        monkeypatch.setattr("os.path.exists", lambda text: False)
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        odewei.from_pretrained(path)


def test_neither_a_path_nor_an_id(tmp_path: Path) -> None:
    """A file, and what is no path at all, are refused with the cure."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a folder was expected"):
        odewei.from_pretrained(tmp_path / "model.safetensors")
    with pytest.raises(OptionsError, match="not by a int"):
        odewei.from_pretrained(5)  # type: ignore[arg-type]


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch, missing: Any) -> None:
    """An id needs the package, and the message names the extra."""
    missing("huggingface_hub")
    with pytest.raises(MissingPackageError, match=r'huggingface_hub.*pip install "odewei\[hf\]"'):
        odewei.from_pretrained("someone/tiny")


def test_which_files_are_wanted() -> None:
    """Weights beside a config.json, safetensors before pickles, no variants and copies for others, code if trusted."""
    names = [
        ".gitattributes", "README.md", "model_index.json", "v1-5-pruned.safetensors", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin", "vae/config.json", "vae/diffusion_pytorch_model.bin",
        "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.txt",
        "onnx/model.onnx", "onnx/model.safetensors", "tool/run.py", "unet/code.py",
    ]  # fmt: skip
    expected = [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.bin", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.txt",
    ]  # fmt: skip
    assert wanted_files(names, with_code=False) == expected
    assert wanted_files(names, with_code=True) == [*expected, "unet/code.py"]
    plain = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
    assert wanted_files([*plain, "consolidated.safetensors", "training_args.bin"], with_code=False) == plain[:3]


def test_subfolders_variants_and_adapters_are_wanted_by_name() -> None:
    """Of a subfolder only what is in it, of a variant what has it, and an adapter's two files, are downloaded."""
    names = [
        "config.json", "model.safetensors", "model.fp16.safetensors", "model.safetensors.index.json",
        "model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors", "pytorch_model.fp16.bin",
        "sub/config.json", "sub/model.safetensors", "sub/in/config.json", "sub/in/model.safetensors",
        "subway/config.json",
    ]  # fmt: skip
    inside = ["sub/config.json", "sub/model.safetensors", "sub/in/config.json", "sub/in/model.safetensors"]
    assert wanted_files(names, with_code=False, subfolder="sub") == inside
    assert wanted_files(names, with_code=False, subfolder="sub/in/") == inside[2:]
    chosen = wanted_files(names, with_code=False, variant="fp16")
    assert chosen == ["config.json", names[2], *names[4:6], *inside, "subway/config.json"]
    adapter = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"]
    assert wanted_files(adapter, with_code=False) == adapter[:2]


def test_how_the_hub_is_asked(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """token=, cache_dir= and force_download= reach huggingface_hub; the model's name is the repository's."""
    saved(llama, tmp_path / "made")
    answers = Hub({f"part/{path.name}": str(path) for path in sorted((tmp_path / "made").iterdir())})
    other = tmp_path / "other"
    answers.answer(monkeypatch, other)
    model: Any = odewei.from_pretrained(
        "someone/tiny", token="secret", cache_dir=other, force_download=True, subfolder="part", revision="v1"
    )
    try:
        assert answers.asked[0] == {"token": "secret"}
        assert answers.asked[1] == {"token": "secret", "cache_dir": str(other), "force_download": True}
        assert model.config.name_or_path == "someone/tiny"
    finally:
        odewei.close(model)
    offline: Any = odewei.from_pretrained(
        "someone/tiny", cache_dir=other, local_files_only=True, subfolder="part", revision="v1"
    )
    odewei.close(offline)
    with pytest.raises(CheckpointNotFoundError, match="not in the cache"):
        odewei.from_pretrained("someone/tiny", local_files_only=True)
