"""Remote files: the suite over servers of every kind, and what happens when they fail, lie or change."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from odewei.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    OptionsError,
    UnsafeCheckpointError,
    WeightReadError,
)
from odewei.loaders import (
    GgufLoader,
    NumpyLoader,
    RemoteOptions,
    SafetensorsLoader,
    ShardedWeightsLoader,
    TorchLoader,
    WeightsLoader,
    open_checkpoint,
)
from odewei.loaders.range_cache import BLOCK_NBYTES
from odewei.loaders.tensors import DTYPES
from tests.servers import Fault, Site, Waits, serving

from .conformance import LoaderConformance, assert_same, random_tensor
from .test_sharded import save_shards

pytest.importorskip("aiohttp", reason="the extra remote is not installed")

FEW = {name: DTYPES[name] for name in ("BOOL", "BF16", "F32", "I64")}
TENSORS = {name: random_tensor(torch.float32, (300, 301), seed) for seed, name in enumerate("abcd")}


def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


class OverHttp(LoaderConformance):
    """The suite over one safetensors file of a site that serves the test's folder."""

    ranges = True

    @pytest.fixture(autouse=True)
    def _serve(self, tmp_path: Path) -> Iterator[None]:
        with serving(tmp_path, ranges=self.ranges) as self.site:
            self.prepare(self.site)
            yield

    def prepare(self, site: Site) -> None:
        """Tell the site how to behave."""

    def remote(self, folder: Path) -> RemoteOptions:
        return RemoteOptions(sleep=Waits())

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> WeightsLoader:
        write(tensors, folder / "model.safetensors")
        return SafetensorsLoader(f"{self.site.url}/model.safetensors", remote=self.remote(folder), **options)


class TestHttp(OverHttp):
    """A server as it should be, no cache."""


class TestHttpWithCache(OverHttp):
    """The same with a cache."""

    dtypes = FEW

    def remote(self, folder: Path) -> RemoteOptions:
        return RemoteOptions(sleep=Waits(), cache_dir=folder / "cache")


class TestHttpWithoutRanges(OverHttp):
    """A server that always sends the whole file."""

    ranges = False
    dtypes = FEW

    def remote(self, folder: Path) -> RemoteOptions:
        return RemoteOptions(sleep=Waits(), cache_dir=folder / "cache")


class TestHttpThatDrops(OverHttp):
    """A server that cuts every second part of a file off after a few bytes."""

    dtypes = FEW

    def prepare(self, site: Site) -> None:
        site.fault_for = lambda number: Fault(cut_after=3) if number % 2 and site.requests[-1][1] else Fault()

    def remote(self, folder: Path) -> RemoteOptions:
        return RemoteOptions(sleep=Waits(), attempts=100)


class TestShardsOverHttp(OverHttp):
    """Three shards and their index."""

    dtypes = FEW

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> WeightsLoader:
        save_shards(tensors, folder, [".safetensors"] * 3)
        return ShardedWeightsLoader(f"{self.site.url}/index.json", self.site.url, remote=self.remote(folder), **options)


class TestTorchOverHttp(OverHttp):
    """A file of torch.save."""

    keeps_strides = keeps_gaps = True
    dtypes = FEW

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> WeightsLoader:
        torch.save(tensors, folder / "model.bin")
        return TorchLoader(f"{self.site.url}/model.bin", remote=self.remote(folder), **options)


class TestMemory(LoaderConformance):
    """A file system of fsspec that is not HTTP, and not asynchronous."""

    dtypes = FEW

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> WeightsLoader:
        write(tensors, folder / "model.safetensors")
        put(folder / "model.safetensors", f"{folder.name}/model.safetensors")
        return SafetensorsLoader(f"memory://{folder.name}/model.safetensors", **options)


def put(file: Path, name: str) -> None:
    """Copy a file into fsspec's memory."""
    import fsspec

    fsspec.filesystem("memory").pipe_file(name, file.read_bytes())


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site with one checkpoint of one file."""
    write(TENSORS, tmp_path / "model.safetensors")
    with serving(tmp_path) as site:
        yield site


def loader_of(site: Site, **options: Any) -> SafetensorsLoader:
    return SafetensorsLoader(f"{site.url}/model.safetensors", remote=RemoteOptions(sleep=Waits(), **options))


def assert_reads(loader: WeightsLoader) -> None:
    found = loader("module", list(TENSORS))
    for name, expected in TENSORS.items():
        assert_same(found[name], expected)


# -- what is asked for -----------------------------------------------------------------------------------------------


def test_only_the_bytes_of_the_weight_are_asked_for(site: Site) -> None:
    """A weight is one request, for its span; the header is another, and the file is looked at once."""
    loader = loader_of(site)
    span = loader.weights()["c"].span
    assert span is not None
    assert site.requests == [("/model.safetensors", "bytes=0-0"), ("/model.safetensors", "bytes=0-262143")]
    loader("module", ["c"])
    assert site.ranges_of("model.safetensors")[1:] == [(span.offset, span.offset + span.nbytes)]


def test_storage_options_reach_the_server(site: Site, tmp_path: Path) -> None:
    """Headers given as storage_options are sent with each request, of shards and of an index in a folder too."""
    save_shards(TENSORS, tmp_path, [".safetensors"] * 2)
    site.needs = ("Authorization", "Bearer x")
    options: dict[str, Any] = {"storage_options": {"headers": {"Authorization": "Bearer x"}}}
    assert_reads(open_checkpoint(f"{site.url}/model.safetensors", **options))
    assert_reads(open_checkpoint(f"{site.url}/index.json".replace("index.json", "model.safetensors"), **options))
    assert_reads(ShardedWeightsLoader(f"{site.url}/index.json", f"{site.url}/", **options))


def test_a_folder_is_searched_for_the_usual_names(site: Site, tmp_path: Path) -> None:
    """A URL without a known ending is a folder: its index comes first, then its file."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "model.safetensors").rename(folder / "model.safetensors")
    for url in (f"{site.url}/folder", f"{site.url}/folder/"):
        assert_reads(open_checkpoint(url))
    save_shards(TENSORS, folder, [".safetensors"] * 2).rename(folder / "model.safetensors.index.json")
    assert isinstance(open_checkpoint(f"{site.url}/folder"), ShardedWeightsLoader)
    assert_reads(open_checkpoint(f"{site.url}/folder"))


def test_a_page_of_links_is_used_where_the_usual_names_are_not_there(site: Site, tmp_path: Path) -> None:
    """The only safetensors file of a listing is taken; links to other folders and hosts are not followed."""
    folder = tmp_path / "folder"
    folder.mkdir()
    write(TENSORS, folder / "odd-name.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"")
    links = ["odd-name.safetensors", "../other.safetensors", "http://127.0.0.2/evil.safetensors", "a/b.safetensors"]
    page = "".join(f'<a href="{link}">{link}</a> ' for link in links)
    site.pages["/folder/"] = page
    assert_reads(open_checkpoint(f"{site.url}/folder"))
    site.pages["/folder/"] = page + '<a href="second.safetensors">'
    with pytest.raises(CheckpointError, match=r"2 files that could be.*odd-name\.safetensors, second.*Name the file"):
        open_checkpoint(f"{site.url}/folder")


def test_a_folder_without_a_checkpoint_is_said(site: Site) -> None:
    """The error names the folder and what was looked for."""
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint: looked for model\.safetensors\.index") as caught:
        open_checkpoint(f"{site.url}/nothing")
    assert caught.value.file == f"{site.url}/nothing"


def test_names_with_odd_characters_are_the_names_of_files(site: Site, tmp_path: Path) -> None:
    """What would mean something in a URL does not when it stands in an index, and a query goes with its folder."""
    for odd in ("a b?c#d%2e.safetensors", "ünï/x.safetensors"):
        (tmp_path / odd).parent.mkdir(exist_ok=True)
        write(TENSORS, tmp_path / odd)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, odd)}))
        assert_reads(open_checkpoint(f"{site.url}/?token=1"))
        assert_reads(open_checkpoint(f"{site.url}/model.safetensors.index.json?token=1"))


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "a/../../x.safetensors",
        "/x.safetensors",
        "//127.0.0.2/x.safetensors",
        "http://127.0.0.2/x.safetensors",
        "s3://bucket/x.safetensors",
        "file:///etc/x.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
    ],
)
def test_names_in_an_index_that_lead_elsewhere_are_refused(name: str, site: Site, tmp_path: Path) -> None:
    """Out of the folder, or to another host: UnsafeCheckpointError, and nothing but the index was asked for."""
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UnsafeCheckpointError, match="shard name"):
        ShardedWeightsLoader(f"{site.url}/index.json", site.url)
    assert {path for path, _ in site.requests} == {"/index.json"}


def test_an_encoded_way_out_stays_in_the_folder(site: Site, tmp_path: Path) -> None:
    """A name that would lead out once it is decoded is the name of a file that is not there."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.json").write_text(json.dumps({"weight_map": {"a": "%2e%2e/model.safetensors"}}))
    with pytest.raises(CheckpointNotFoundError):
        ShardedWeightsLoader(f"{site.url}/folder/index.json", f"{site.url}/folder")
    assert site.requests[-1][0] == "/folder/%2e%2e/model.safetensors"


def test_other_kinds_of_files_are_read(site: Site, tmp_path: Path) -> None:
    """NumPy's archives, compressed ones too, and GGUF files are remote files like any other."""
    import numpy as np

    from .test_gguf_file import gguf_bytes

    arrays = {"a": np.arange(70000, dtype=np.float32), "b": np.ones((3, 2), np.int64)}
    np.savez(tmp_path / "x.npz", **arrays)
    np.savez_compressed(tmp_path / "y.npz", **arrays)
    np.save(tmp_path / "z.npy", arrays["a"])
    (tmp_path / "m.gguf").write_bytes(gguf_bytes([("a", (70000,), 0, arrays["a"].tobytes())]))
    for name, kind in {"x.npz": NumpyLoader, "y.npz": NumpyLoader, "z.npy": NumpyLoader, "m.gguf": GgufLoader}.items():
        loader = open_checkpoint(f"{site.url}/{name}")
        assert type(loader) is kind
        for weight, found in loader("module", ["a", "b", "z"]).items():
            assert_same(found, torch.from_numpy(arrays["b" if weight == "b" else "a"]))


# -- what fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status: int, site: Site) -> None:
    """Four failures in a row are four waits, which grow, and the fifth answer counts."""
    loader = loader_of(site)
    loader.weights()
    waits = loader.path.remote.options.sleep  # type: ignore[union-attr]
    assert isinstance(waits, Waits)
    site.faults = [Fault(status=status)] * 4
    assert_reads(loader)
    assert len(waits.seconds) == 4
    assert all(0.25 * 2**number <= wait <= 0.5 * 2**number for number, wait in enumerate(waits.seconds))


def test_the_server_may_ask_for_a_longer_wait(site: Site) -> None:
    """Retry-After is kept, up to the longest wait."""
    loader = loader_of(site)
    site.faults = [Fault(status=503, headers={"Retry-After": after}) for after in ("7", "3600", "soon")]
    assert_reads(loader)
    waits: Any = loader.path.remote.options.sleep  # type: ignore[union-attr]
    assert waits.seconds[:2] == [7.0, 30.0]
    assert waits.seconds[2] < 30


def test_a_connection_that_drops_goes_on_where_it_stopped(site: Site) -> None:
    """What had come is kept; the next request asks for the rest."""
    loader = loader_of(site)
    span = loader.weights()["b"].span
    assert span is not None
    before = len(site.ranges_of("model.safetensors"))
    site.faults = [Fault(cut_after=1000), Fault(cut_after=0), Fault(cut_after=500)]
    assert_same(loader("module", ["b"])["b"], TENSORS["b"])
    starts = [start - span.offset for start, _ in site.ranges_of("model.safetensors")[before:]]
    assert starts == [0, 1000, 1000, 1500]


def test_what_does_not_pass_is_an_error_that_names_file_and_cure(site: Site) -> None:
    """After the last attempt the error says so; a later read may succeed."""
    loader = loader_of(site, attempts=3)
    loader.weights()
    count = len(site.requests)
    site.faults = [Fault(status=503)] * 3
    with pytest.raises(WeightReadError, match=r"answers 503 \(attempt 3 of 3\)") as caught:
        loader("module", ["a"])
    assert len(site.requests) == count + 3
    assert (caught.value.weight, caught.value.file) == ("a", f"{site.url}/model.safetensors")
    assert caught.value.cure
    assert_reads(loader)


def test_a_server_that_is_not_there_is_said(tmp_path: Path) -> None:
    """A refused connection is tried again, and then an error."""
    with serving(tmp_path) as gone:
        url = gone.url
    waits = Waits()
    with pytest.raises(CheckpointError, match=r"cannot be read.*attempt 5 of 5"):
        SafetensorsLoader(f"{url}/model.safetensors", remote=RemoteOptions(sleep=waits))
    assert len(waits.seconds) == 4


def test_a_silent_server_is_a_timeout(site: Site) -> None:
    """A server that sends nothing is given up after the timeout, and asked again."""
    loader = loader_of(site, timeout_seconds=0.05, attempts=2)
    site.silence.clear()
    try:
        with pytest.raises(CheckpointError, match=r"silent, or too slow.*attempt 2 of 2"):
            loader_of(site, timeout_seconds=0.05, attempts=2)
    finally:
        site.silence.set()
    assert loader.path.name == "model.safetensors"


@pytest.mark.parametrize(
    ("status", "kind", "problem"),
    [
        (404, CheckpointNotFoundError, r"does not exist: the server answers 404.*Check the address"),
        (410, CheckpointNotFoundError, r"does not exist"),
        (403, CheckpointError, r"may not be read: the server answers 403.*storage_options="),
        (401, CheckpointError, r"storage_options="),
        (400, CheckpointError, r"answers 400"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(status: int, kind: type, problem: str, site: Site) -> None:
    """One request, and an error that names the URL and the cure; while reading too."""
    site.faults = [Fault(status=status)]
    with pytest.raises(kind, match=problem) as caught:
        loader_of(site)
    assert len(site.requests) == 1
    assert caught.value.file == f"{site.url}/model.safetensors"
    loader = loader_of(site)
    loader.weights()
    count = len(site.requests)
    site.faults = [Fault(status=status)]
    with pytest.raises(WeightReadError, match=problem):
        loader("module", ["a"])
    assert len(site.requests) == count + 1


def test_secrets_of_a_url_are_not_in_messages(site: Site) -> None:
    """Neither the password nor the query is shown; both reach the server."""
    url = f"{site.url.replace('//', '//user:secret@')}/nix.safetensors?signature=secret"
    with pytest.raises(CheckpointNotFoundError) as caught:
        SafetensorsLoader(url)
    assert "secret" not in str(caught.value)
    write(TENSORS, site.folder / "nix.safetensors")
    loader = SafetensorsLoader(url, storage_options={"headers": {"X-Key": "secret"}})
    assert_reads(loader)
    assert "secret" not in repr(loader) + repr(loader.path) + repr(loader.weights()["a"])


def test_a_server_may_not_lead_to_where_anybody_can_listen(site: Site) -> None:
    """From https to http: refused before a byte is used."""
    from types import SimpleNamespace

    from odewei.loaders.remote_http import HttpTransport
    from odewei.loaders.remote_path import RemotePath, as_place

    path = as_place("https://127.0.0.1/model.safetensors")
    assert isinstance(path, RemotePath)
    answer = SimpleNamespace(url=SimpleNamespace(scheme="http"), status=206, headers={})
    with pytest.raises(UnsafeCheckpointError, match="from https"):
        HttpTransport(path, None)._check(answer)
    answer.url.scheme = "https"
    HttpTransport(path, None)._check(answer)


def test_compressed_answers_are_not_asked_for(site: Site) -> None:
    """The offsets are those of the file itself."""
    site.needs = ("Accept-Encoding", "identity")
    assert_reads(loader_of(site))


# -- what lies -------------------------------------------------------------------------------------------------------


LIES = {
    "no Content-Range": {"Content-Range": None},
    "another place": {"Content-Range": "bytes 1-99/%d"},
    "too many": {"Content-Range": "bytes 0-999999999/%d"},
    "nonsense": {"Content-Range": "bytes x"},
    "backwards": {"Content-Range": "bytes 9-3/%d"},
    "compressed": {"Content-Encoding": "gzip"},
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_contradicts_itself_is_refused(lie: str, site: Site) -> None:
    """Whatever its bytes are, they are not used."""
    loader = loader_of(site)
    loader.weights()
    size = (site.folder / "model.safetensors").stat().st_size
    headers = {name: value and value.replace("%d", str(size)) for name, value in LIES[lie].items()}
    site.faults = [Fault(headers=headers)]
    with pytest.raises(WeightReadError, match=r"the server|cannot be read"):
        loader("module", ["a"])
    assert_reads(loader)


def test_another_part_of_the_same_length_is_refused(site: Site) -> None:
    """What the answer says of its place counts, although all lengths agree."""
    loader = loader_of(site)
    span = loader.weights()["a"].span
    assert span is not None
    first, last = span.offset, span.offset + span.nbytes - 1
    for moved in (-1, 1):
        place = f"bytes {first + moved}-{last + moved}/{span.file.size}"
        site.faults = [Fault(headers={"Content-Range": place})]
        with pytest.raises(WeightReadError, match="was asked for the bytes"):
            loader("module", ["a"])
    assert_reads(loader)


def test_a_content_length_that_is_wrong_is_never_wrong_bytes(site: Site) -> None:
    """A length that is not that of the part is refused, whatever the body has."""
    loader = loader_of(site)
    loader.weights()
    for length in ("10", "100000000"):
        site.faults = [Fault(headers={"Content-Length": length}, cut_after=10)]
        with pytest.raises(WeightReadError):
            loader("module", ["a"])
    assert_reads(loader)


def test_a_part_that_is_shorter_than_asked_for_is_completed(site: Site) -> None:
    """A server may send fewer bytes than asked for, if it says so; the rest is asked for."""
    loader = loader_of(site)
    site.longest_part = 100_000
    assert_reads(loader)


def test_a_server_without_ranges_needs_a_cache(site: Site, tmp_path: Path) -> None:
    """Without one the error says what to do, before a byte of the body is taken for another."""
    site.ranges = False
    with pytest.raises(CheckpointError, match=r"whole file, whatever part.*cache_bytes="):
        loader_of(site).weights()


def test_a_file_of_a_server_without_ranges_is_downloaded_once(site: Site, tmp_path: Path) -> None:
    """Eight loaders at once, as of eight processes: one download, although it breaks off twice."""
    site.ranges = False
    loaders = [loader_of(site, cache_dir=tmp_path / "cache") for _ in range(8)]
    breaks = [400_000, 1000]

    def fault(number: int) -> Fault:
        whole = site.requests[-1][1] is None
        return Fault(cut_after=breaks.pop()) if whole and breaks else Fault()

    site.fault_for = fault
    start = threading.Barrier(8)

    def work(loader: SafetensorsLoader) -> None:
        start.wait()
        assert_reads(loader)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, loaders))
    assert [span for _, span in site.requests].count(None) == 3
    assert (tmp_path / "model.safetensors").stat().st_size > BLOCK_NBYTES


def test_a_file_that_does_not_fit_into_the_cache_is_not_downloaded(site: Site, tmp_path: Path) -> None:
    """The error names the bytes that the cache would need."""
    site.ranges = False
    with pytest.raises(CheckpointError, match=r"the cache cannot keep it.*Give the cache \d+ bytes"):
        loader_of(site, cache_dir=tmp_path / "cache", cache_bytes=1 << 20).weights()
    assert all(span is not None for _, span in site.requests)


def test_without_ranges_an_index_is_read_whole(site: Site, tmp_path: Path) -> None:
    """What is wanted whole needs neither ranges nor a cache, and is asked for anew when it breaks off."""
    site.ranges = False
    save_shards(TENSORS, tmp_path, [".safetensors"])
    site.faults = [Fault(), Fault(cut_after=10)]
    remote = RemoteOptions(sleep=Waits())
    loader = ShardedWeightsLoader(f"{site.url}/index.json", site.url, remote=remote)
    with pytest.raises(CheckpointError, match="whole file"):
        loader.weights()


# -- verify ----------------------------------------------------------------------------------------------------------


def test_sums_are_for_local_files(site: Site, tmp_path: Path) -> None:
    """verify="sha256" with a URL is an OptionsError, whether a file, a shard or the index is remote."""
    index = save_shards(TENSORS, tmp_path, [".safetensors"])
    for make in (
        lambda: SafetensorsLoader(f"{site.url}/model.safetensors", verify="sha256"),
        lambda: open_checkpoint(f"{site.url}/model.safetensors", verify="sha256"),
        lambda: ShardedWeightsLoader(f"{site.url}/{index.name}", tmp_path, verify="sha256"),
        lambda: ShardedWeightsLoader(index, site.url, verify="sha256"),
    ):
        with pytest.raises(OptionsError, match=r"for local files.*download the checkpoint"):
            make()


def test_a_part_of_a_remote_file_is_read_where_that_is_asked_for(site: Site, tmp_path: Path) -> None:
    """A file that was cut is refused; with verify="none" the weights that are whole are read, others are errors."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError):
        loader_of(site).weights()
    loader = SafetensorsLoader(f"{site.url}/model.safetensors", verify="none", remote=RemoteOptions(sleep=Waits()))
    assert_same(loader("module", ["a"])["a"], TENSORS["a"])
    with pytest.raises(WeightReadError, match="ends 1 bytes too early"):
        loader("module", ["d"])


# -- what changes ----------------------------------------------------------------------------------------------------


def replace(site: Site) -> None:
    """Another checkpoint of the same size."""
    write({name: tensor + 1 for name, tensor in TENSORS.items()}, site.folder / "model.safetensors")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changed_is_noticed_before_its_bytes_are_used(ranges: bool, site: Site, tmp_path: Path) -> None:
    """Between the header and a weight, and between two attempts at one weight; with a cache too."""
    site.ranges = ranges
    for cache in (None, tmp_path / "cache") if ranges else (tmp_path / "cache",):
        write(TENSORS, tmp_path / "model.safetensors")
        loader = loader_of(site, cache_dir=cache, cache_bytes=None if cache is None else 2 << 20)
        if ranges:
            loader.weights()
        replace(site)
        with pytest.raises((WeightReadError, CheckpointError), match=r"changed while it was in use"):
            loader("module", list(TENSORS))


def test_a_change_between_two_attempts_is_noticed(site: Site) -> None:
    """The rest of a read that broke off is not taken from another version."""
    loader = loader_of(site)
    loader.weights()
    site.faults = [Fault(cut_after=1000)]
    waits: Any = loader.path.remote.options.sleep  # type: ignore[union-attr]
    waits.then = lambda: replace(site)
    with pytest.raises(WeightReadError, match="changed"):
        loader("module", ["a"])


def test_a_file_that_was_cut_is_noticed(site: Site) -> None:
    """Its size tells, where there is no ETag; a file that was deleted is said too."""
    site.validators = False
    loader = loader_of(site)
    loader.weights()
    path = site.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightReadError, match="changed"):
        loader("module", ["a"])
    path.write_bytes(path.read_bytes()[:9])
    with pytest.raises(WeightReadError, match="changed"):
        loader("module", ["d"])
    path.unlink()
    with pytest.raises(WeightReadError, match="404"):
        loader("module", ["a"])


def test_the_time_of_the_last_change_tells_too(site: Site) -> None:
    """A server without ETags that says Last-Modified is believed."""
    site.validators = False
    site.fault_for = lambda number: Fault(headers={"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"})
    loader = loader_of(site)
    assert_reads(loader)
    site.fault_for = lambda number: Fault(headers={"Last-Modified": "Mon, 01 Jan 2024 00:00:01 GMT"})
    with pytest.raises(WeightReadError, match="changed"):
        loader("module", ["a"])


def test_a_truncated_remote_file_is_refused_as_a_local_one(site: Site) -> None:
    """The header is checked against the size that the server says."""
    path = site.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match="truncated"):
        loader_of(site).weights()
    path.write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match=r"truncated.*it has 0"):
        loader_of(site).weights()


class Changing:
    """A file of fsspec's memory whose next read is of another version than its information."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, content: bytes, name: str) -> None:
        from fsspec.implementations.memory import MemoryFileSystem

        plain = MemoryFileSystem.cat_file
        self.armed = False

        def cat_file(filesystem: Any, path: str, **keywords: Any) -> bytes:
            if self.armed:
                filesystem.pipe_file(name, content)
            return bytes(plain(filesystem, path, **keywords))

        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)


def test_other_file_systems_are_looked_at_after_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes while it is read, and not only before, gives no bytes."""
    write(TENSORS, tmp_path / "model.safetensors")
    put(tmp_path / "model.safetensors", "changing/model.safetensors")
    loader = open_checkpoint("memory://changing")
    assert_reads(loader)
    content = bytes((tmp_path / "model.safetensors").read_bytes())
    changing = Changing(monkeypatch, content[:-1] + b"x", "/changing/model.safetensors")
    changing.armed = True
    with pytest.raises(WeightReadError, match="changed"):
        loader("module", ["d"])


# -- the cache -------------------------------------------------------------------------------------------------------


def test_what_is_in_the_cache_is_not_asked_for_again(site: Site, tmp_path: Path) -> None:
    """A second loader only looks at the file; a new version of the file is read anew."""
    assert_reads(loader_of(site, cache_dir=tmp_path / "cache"))
    count = len(site.requests)
    assert_reads(loader_of(site, cache_dir=tmp_path / "cache"))
    assert site.requests[count:] == [("/model.safetensors", "bytes=0-0")]
    replace(site)
    changed = loader_of(site, cache_dir=tmp_path / "cache")("module", ["a"])["a"]
    assert_same(changed, TENSORS["a"] + 1)


def test_there_is_no_cache_unless_it_is_asked_for(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written; given only a size, the cache is in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert_reads(loader_of(site))
    assert not (tmp_path / "home").exists()
    assert_reads(loader_of(site, cache_bytes=8 << 20))
    assert (tmp_path / "home" / "odewei" / "remote").is_dir()


def test_what_nothing_tells_versions_apart_of_is_not_kept(site: Site, tmp_path: Path) -> None:
    """Without an ETag or a time a file may be another one of the same size next time."""
    site.validators = False
    for _ in range(2):
        count = len(site.requests)
        assert_reads(loader_of(site, cache_dir=tmp_path / "cache"))
        assert len(site.requests) - count > 2
    assert not (tmp_path / "cache").exists()


# -- what is asked wrongly -------------------------------------------------------------------------------------------


def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    registry = importlib.import_module("fsspec.registry")
    for protocol in ("http", "https"):
        monkeypatch.delitem(registry._registry, protocol, raising=False)
    with pytest.raises(CheckpointError, match=r"not installed.*pip install 'odewei\[remote\]'"):
        open_checkpoint("https://127.0.0.1/model.safetensors")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(CheckpointError, match=r"pip install 'odewei\[remote\]'"):
        open_checkpoint("memory://model.safetensors")


def test_urls_that_cannot_work_are_refused() -> None:
    """Unknown protocols, chains, spaces, URLs that were a Path: each with what to do."""
    with pytest.raises(CheckpointError, match="nonsense"):
        open_checkpoint("nonsense://x/model.safetensors")
    with pytest.raises(OptionsError, match="one URL"):
        open_checkpoint("simplecache::https://127.0.0.1/model.safetensors")
    with pytest.raises(OptionsError, match="%20"):
        open_checkpoint("https://127.0.0.1/a b.safetensors")
    with pytest.raises(OptionsError, match="as text"):
        open_checkpoint(Path("https://127.0.0.1/model.safetensors"))


@pytest.mark.parametrize(
    "options", [{"cache_bytes": 0}, {"cache_bytes": "1GiB"}, {"attempts": 0}, {"timeout_seconds": -1}]
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    """The error names the keyword and its value."""
    with pytest.raises(OptionsError, match=f"{next(iter(options))}="):
        RemoteOptions(**options)


def test_file_urls_are_local(tmp_path: Path) -> None:
    """file:// needs no extra and is read like the path."""
    write(TENSORS, tmp_path / "a model.safetensors")
    loader = open_checkpoint(f"file://{tmp_path}/a%20model.safetensors")
    assert_reads(loader)
    assert loader.place == tmp_path / "a model.safetensors"


def test_a_remote_path_is_never_opened_as_a_local_one(site: Site) -> None:
    """Whatever would do so gets an error."""
    path = loader_of(site).path
    with pytest.raises(OptionsError, match="opened as a local one"):
        Path(path)
    assert loader_of(site).place is None
    assert pickle.loads(pickle.dumps(path)) == path
