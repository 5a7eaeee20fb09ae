"""Whole models streamed over the network: the same bits, whatever the server does; errors where it cannot be."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import odewei
from odewei.errors import CheckpointError, WeightReadError
from odewei.loaders.remote_file import RemoteFile
from odewei.torch import RemoteOptions, SafetensorsLoader, ShardedWeightsLoader, init_on_demand_weights_model
from tests import models as zoo
from tests.servers import Fault, Site, Waits, serving
from tests.test_recipes import by_expert, fused

pytest.importorskip("aiohttp", reason="the extra remote is not installed")

LLAMA = zoo.CASES["llama"]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site of the test's folder."""
    with serving(tmp_path) as site:
        yield site


def shard(path: Path, count: int) -> None:
    """Deal the weights of a file out to shards with an index of the usual name."""
    weights = load_file(path)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(count)]
    places = {name: names[number * count // len(weights)] for number, name in enumerate(weights)}
    for file in names:
        save_file({name: weights[name] for name, place in places.items() if place == file}, path.parent / file)
    (path.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    path.unlink()


def failing(site: Site, every: int) -> None:
    """Of the answers, one is cut, the next is a 503, the next a wrong length; then so many are right."""
    kinds = [Fault(cut_after=50), Fault(status=503), Fault(cut_after=0)]
    site.fault_for = lambda number: kinds[number % every] if number % every < len(kinds) else Fault()


@pytest.mark.parametrize("depth", [0, "auto"])
@pytest.mark.parametrize("name", ["llama", "gpt2 (tied)", "recurrent"])
def test_the_same_bits_from_a_server_that_fails(name: str, depth: int | str, site: Site) -> None:
    """Three passes under a small budget equal the resident model's, with three of five answers failing."""
    case = zoo.CASES[name]
    model = zoo.resident(case.build)
    path = zoo.save(model, site.folder / "model.safetensors")
    budget = max(int(0.4 * zoo.weight_bytes(model)), zoo.smallest_budget(case.build, path))
    failing(site, 5)
    waits = Waits()
    loader = SafetensorsLoader(f"{site.url}/model.safetensors", remote=RemoteOptions(sleep=waits, attempts=50))
    with zoo.streamed(case.build, loader, prefetch_depth=depth, memory_budget=budget) as streamed:
        for seed in (1, 1, 2):
            assert zoo.same_bits(zoo.outputs(streamed, case.inputs(seed)), zoo.outputs(model, case.inputs(seed)))
        report = odewei.report(streamed)
        assert report.peak_bytes <= budget < report.weight_bytes
    assert len(waits.seconds) > 10


@pytest.mark.parametrize("cache", [False, True])
def test_an_index_url_is_all_that_is_needed(cache: bool, site: Site, tmp_path: Path) -> None:
    """init_on_demand_weights_model takes the URL of an index; a loader takes those of index and folder."""
    model = zoo.resident(LLAMA.build)
    shard(zoo.save(model, site.folder / "model.safetensors"), 3)
    url = f"{site.url}/model.safetensors.index.json"
    remote = RemoteOptions(cache_dir=tmp_path / "cache") if cache else None
    for source in (url, site.url, ShardedWeightsLoader(url, site.url, remote=remote)):
        with zoo.streamed(LLAMA.build, source, memory_budget=zoo.weight_bytes(model) // 2) as streamed:
            zoo.passes(streamed, LLAMA.inputs(1), 2)
            count = len(site.requests)
            assert zoo.same_bits(zoo.outputs(streamed, LLAMA.inputs(2)), zoo.outputs(model, LLAMA.inputs(2)))
    assert (len(site.requests) == count) == cache


class Wide(nn.Module):
    """Blocks of many weights, each large enough to be read in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(512, 960), nn.ReLU(), nn.Linear(960, 512), nn.LayerNorm(512)) for _ in range(4)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


@pytest.mark.parametrize("io", ["auto", "direct", "buffered"])
def test_neighbouring_weights_are_one_request(io: str, site: Site) -> None:
    """A block is asked for in one stretch, by reader threads, whatever ``io`` says, and little else with it."""
    model = zoo.resident(Wide)
    zoo.save(model, site.folder / "model.safetensors")
    inputs = {"hidden": torch.randn(2, 512)}
    threads = set()
    read = RemoteFile.read

    def noting(*args: object, **keywords: object) -> None:
        threads.add(threading.current_thread().name)
        read(*args, **keywords)  # type: ignore[arg-type]

    url, options = f"{site.url}/model.safetensors", {"memory_budget": "8MiB", "granularity": "block", "io": io}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteFile, "read", noting)
        with zoo.streamed(Wide, url, **options) as streamed:
            assert zoo.same_bits(zoo.outputs(streamed, inputs), zoo.outputs(model, inputs))
            parts = site.ranges_of("model.safetensors")[1:]
    per_block = zoo.weight_bytes(model) // 4
    assert len(parts) >= 4
    assert all(per_block <= end - start <= per_block + 2 * 4096 for start, end in parts)
    assert all(name.startswith("odewei-reader") for name in threads)


class Lookup(nn.Module):
    """A table that is only looked up, and something after it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20_000, 64)
        self.head = nn.Linear(64, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


def test_a_table_is_read_by_rows(site: Site) -> None:
    """Of a large embedding table only the rows that are looked up are asked for, neighbours together."""
    model = zoo.resident(Lookup)
    zoo.save(model, site.folder / "model.safetensors")
    ids = torch.tensor([7, 8, 9, 4000, 19_999])
    with zoo.streamed(Lookup, f"{site.url}/model.safetensors", memory_budget="2MiB") as streamed:
        zoo.outputs(streamed, {"ids": torch.tensor([1])})
        before = site.sent_bytes
        assert zoo.same_bits(zoo.outputs(streamed, {"ids": ids}), zoo.outputs(model, {"ids": ids}))
    lengths = sorted(end - start for start, end in site.ranges_of("model.safetensors"))
    assert lengths[:4] == [256, 256, 256, 768]
    assert site.sent_bytes - before < 100_000


def test_a_cast_is_the_same_over_the_network(site: Site) -> None:
    """dtype= gives the bits that it gives of a local file."""
    model = zoo.resident(LLAMA.build)
    path = zoo.save(model, site.folder / "model.safetensors")
    budget = zoo.weight_bytes(model)
    results = []
    for source in (path, f"{site.url}/model.safetensors"):
        with zoo.streamed(LLAMA.build, source, dtype=torch.bfloat16, memory_budget=budget) as streamed:
            results.append(zoo.outputs(streamed, LLAMA.inputs(1)))
    assert zoo.same_bits(*results)


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_recipes_go_over_the_network(io: str, site: Site) -> None:
    """A fused weight is gathered from the parts of a remote file; the same bits from a server that fails."""
    model = zoo.resident(zoo.mixtral)
    save_file(by_expert(model.state_dict()), site.folder / "model.safetensors")
    failing(site, 9)
    loader = fused(f"{site.url}/model.safetensors", model.config.num_hidden_layers)
    loader.loader = SafetensorsLoader(
        f"{site.url}/model.safetensors",
        rename=lambda name: name.replace(".block_sparse_moe.gate", ".mlp.gate"),
        remote=RemoteOptions(sleep=Waits(), attempts=50),
    )
    inputs = zoo.CASES["mixtral"].inputs
    with zoo.streamed(zoo.mixtral, loader, io=io, memory_budget=zoo.weight_bytes(model) * 2 // 3) as streamed:
        for seed in (1, 2):
            assert zoo.same_bits(zoo.outputs(streamed, inputs(seed)), zoo.outputs(model, inputs(seed)))


@pytest.mark.parametrize("depth", [0, "auto"])
def test_what_cannot_be_read_reaches_the_forward(depth: int | str, site: Site) -> None:
    """The error names the module, the URL and the cure; when the server is well again the next call is right."""
    model = zoo.resident(LLAMA.build)
    zoo.save(model, site.folder / "model.safetensors")
    loader = SafetensorsLoader(f"{site.url}/model.safetensors", remote=RemoteOptions(sleep=Waits(), attempts=2))
    budget = zoo.weight_bytes(model) // 2
    with zoo.streamed(LLAMA.build, loader, prefetch_depth=depth, memory_budget=budget) as streamed:
        for status, problem in ((403, "may not be read"), (500, "attempt 2 of 2")):
            site.fault_for = lambda number, status=status: Fault(status=status)  # type: ignore[misc]
            with pytest.raises(WeightReadError, match=problem) as caught:
                zoo.passes(streamed, LLAMA.inputs(1), 2)
            assert caught.value.file == f"{site.url}/model.safetensors"
            assert caught.value.module
            assert caught.value.cure
            assert isinstance(caught.value.__cause__, CheckpointError | WeightReadError)
            site.fault_for = lambda number: Fault()
            assert zoo.same_bits(zoo.outputs(streamed, LLAMA.inputs(2)), zoo.outputs(model, LLAMA.inputs(2)))


def test_a_file_that_changes_under_a_model_is_an_error(site: Site) -> None:
    """Never numbers of two checkpoints."""
    model = zoo.resident(LLAMA.build)
    zoo.save(model, site.folder / "model.safetensors")
    budget = zoo.weight_bytes(model) // 2
    with zoo.streamed(LLAMA.build, f"{site.url}/model.safetensors", memory_budget=budget) as streamed:
        zoo.passes(streamed, LLAMA.inputs(1), 1)
        zoo.save(zoo.resident(LLAMA.build, seed=1), site.folder / "model.safetensors")
        with pytest.raises(WeightReadError, match="changed while it was in use"):
            zoo.passes(streamed, LLAMA.inputs(1), 3)


def test_what_goes_with_a_local_file_goes_without_one(site: Site, tmp_path: Path) -> None:
    """state_dict() has values that load when they are used, orders are kept where one says, materialize loads all."""
    model = zoo.resident(LLAMA.build)
    zoo.save(model, site.folder / "model.safetensors")
    streamed = init_on_demand_weights_model(
        LLAMA.build, f"{site.url}/model.safetensors", memory_budget=zoo.weight_bytes(model) // 2
    ).eval()
    zoo.passes(streamed, LLAMA.inputs(1), 2)
    expected = model.state_dict()
    for name, value in streamed.state_dict().items():
        assert torch.equal(value + 0, expected[name])
    assert not list(site.folder.glob("*trace*"))
    with pytest.raises(odewei.errors.OptionsError, match="path="):
        odewei.save_trace(streamed)
    odewei.save_trace(streamed, tmp_path / "order.json")
    odewei.materialize(streamed)
    assert zoo.same_bits(zoo.outputs(streamed, LLAMA.inputs(2)), zoo.outputs(model, LLAMA.inputs(2)))


def test_closing_while_a_server_is_silent_ends(site: Site) -> None:
    """A model that is closed while a read waits goes when the read's time is over."""
    model = zoo.resident(LLAMA.build)
    zoo.save(model, site.folder / "model.safetensors")
    options = RemoteOptions(sleep=Waits(), attempts=2, timeout_seconds=0.2)
    loader = SafetensorsLoader(f"{site.url}/model.safetensors", remote=options)
    streamed = init_on_demand_weights_model(LLAMA.build, loader, memory_budget=zoo.weight_bytes(model) // 2).eval()
    zoo.passes(streamed, LLAMA.inputs(1), 1)
    site.silence.clear()
    try:
        with pytest.raises(WeightReadError, match="silent"):
            zoo.passes(streamed, LLAMA.inputs(1), 3)
        odewei.close(streamed)
    finally:
        site.silence.set()
