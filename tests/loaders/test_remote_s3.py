"""Object stores, by the example of S3: the suite over a server of moto."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from odewei.errors import CheckpointError, CheckpointNotFoundError, WeightReadError
from odewei.loaders import RemoteOptions, SafetensorsLoader, ShardedWeightsLoader, WeightsLoader, open_checkpoint
from tests.servers import Waits

from .conformance import LoaderConformance, assert_same, random_tensor
from .test_remote import FEW
from .test_sharded import save_shards

pytest.importorskip("s3fs", reason="the extra remote is not installed")
pytest.importorskip("moto.server", reason="the extra dev is not installed")

# The libraries of AWS use what newer ones of Python call deprecated; what is odewei's stays an error.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TENSORS = {name: random_tensor(torch.float32, (300, 301), seed) for seed, name in enumerate("abcd")}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Where the store answers."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(endpoint: str) -> Iterator[Any]:
    """A file system with an empty bucket; everything is forgotten afterwards."""
    import s3fs

    filesystem = s3fs.S3FileSystem(**options_of(endpoint))
    if not filesystem.exists("bucket"):
        filesystem.mkdir("bucket")
    yield filesystem
    filesystem.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def options_of(endpoint: str) -> dict[str, Any]:
    return {"key": "key", "secret": "secret", "endpoint_url": endpoint, "use_listings_cache": False}


class TestS3(LoaderConformance):
    """The suite over one safetensors object."""

    dtypes = FEW

    @pytest.fixture(autouse=True)
    def _store(self, store: Any, endpoint: str) -> None:
        self.store, self.endpoint = store, endpoint

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> WeightsLoader:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "m.safetensors")
        self.store.put_file(str(folder / "m.safetensors"), "bucket/m.safetensors")
        return SafetensorsLoader("s3://bucket/m.safetensors", storage_options=options_of(self.endpoint), **options)


@pytest.fixture
def bucket(store: Any, endpoint: str, tmp_path: Path) -> dict[str, Any]:
    """Options for a bucket with a checkpoint of one odd name in ``one``, and one of shards in ``many``."""
    save_file(TENSORS, tmp_path / "odd.safetensors")
    store.put_file(str(tmp_path / "odd.safetensors"), "bucket/one/odd.safetensors")
    save_shards(TENSORS, tmp_path, [".safetensors"] * 2).rename(tmp_path / "model.safetensors.index.json")
    for file in ("model.safetensors.index.json", "part-0.safetensors", "part-1.safetensors"):
        store.put_file(str(tmp_path / file), f"bucket/many/{file}")
    return {"storage_options": options_of(endpoint), "remote": RemoteOptions(sleep=Waits())}


def assert_reads(loader: WeightsLoader) -> None:
    for name, found in loader("module", list(TENSORS)).items():
        assert_same(found, TENSORS[name])


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_folder_is_searched(slash: str, bucket: dict[str, Any]) -> None:
    """The index of a usual name, or the only safetensors object, is found."""
    assert_reads(open_checkpoint(f"s3://bucket/one{slash}", **bucket))
    loader = open_checkpoint(f"s3://bucket/many{slash}", **bucket)
    assert isinstance(loader, ShardedWeightsLoader)
    assert_reads(loader)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint"):
        open_checkpoint(f"s3://bucket/none{slash}", **bucket)


def test_index_and_folder_may_be_given(bucket: dict[str, Any]) -> None:
    """ShardedWeightsLoader takes two URLs."""
    assert_reads(ShardedWeightsLoader("s3://bucket/many/model.safetensors.index.json", "s3://bucket/many", **bucket))


def test_what_is_not_there_or_not_allowed_is_not_tried_again(bucket: dict[str, Any], tmp_path: Path) -> None:
    """The error names the URL and the cure, and there were no waits."""
    with pytest.raises(CheckpointNotFoundError, match=r"s3://bucket/nix\.safetensors.*Check the address"):
        open_checkpoint("s3://bucket/nix.safetensors", **bucket)
    with pytest.raises(CheckpointError, match="s3://"):
        open_checkpoint("s3://no-such-bucket/nix.safetensors", **bucket)
    assert bucket["remote"].sleep.seconds == []


def test_a_changed_object_gives_no_bytes(bucket: dict[str, Any], store: Any, tmp_path: Path) -> None:
    """Its ETag tells, although its size is the same; so does that it is gone."""
    loader = open_checkpoint("s3://bucket/one/odd.safetensors", **bucket)
    assert_reads(loader)
    save_file({name: tensor + 1 for name, tensor in TENSORS.items()}, tmp_path / "odd.safetensors")
    store.put_file(str(tmp_path / "odd.safetensors"), "bucket/one/odd.safetensors")
    with pytest.raises(WeightReadError, match="changed while it was in use"):
        loader("module", ["a"])
    store.rm("bucket/one/odd.safetensors")
    with pytest.raises(WeightReadError, match="no such file"):
        loader("module", ["a"])


def test_large_weights_come_in_pieces(bucket: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stretch that is longer than what is asked for at a time is read with several requests, to the same bytes."""
    from odewei.loaders import remote_fsspec

    monkeypatch.setattr(remote_fsspec, "_PIECE_NBYTES", 100_001)
    assert_reads(open_checkpoint("s3://bucket/one/odd.safetensors", **bucket))
