"""The options of a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.runner import groups
from benchmarks.settings import parse_settings
from odewei.demo.synthetic import _shards


def test_default_run_fits_its_disk_with_every_default_peer() -> None:
    """Six gigabytes hold the default checkpoint, and no default peer writes it once more."""
    settings = parse_settings([])
    assert settings.weight_bytes < settings.disk_bytes == 6_000_000_000
    assert not settings.needs_disk_again & set(settings.peers)


@pytest.mark.parametrize("size", ["4.15GB", "200MB", "100MB"])
def test_each_file_of_the_checkpoint_holds_one_module(size: str) -> None:
    """The embedding, each layer, the norm and the head have a file each, which is what AirLLM can link to."""
    import torch

    settings = parse_settings(["--size", size])
    assert settings.has_file_a_layer
    shards = _shards(settings.shape, torch.bfloat16, settings.shard_bytes)
    modules = [{".".join(name.split(".")[:3]) if "layers" in name else name for name in names} for names in shards]
    assert [len(found) for found in modules] == [1] * (settings.shape.layers + 3)


def test_tables_smaller_than_a_layer_cost_airllm_a_copy() -> None:
    """Where files hold more than one module AirLLM needs the disk twice, and runs only if that is allowed."""
    settings = parse_settings(["--size", "16GB", "--disk", "20GB"])
    assert not settings.has_file_a_layer
    assert "airllm" in settings.needs_disk_again
    assert parse_settings(["--size", "16GB", "--disk", "40GB"]).needs_disk_again == frozenset()


def test_sweep_peers_are_only_those_that_run_at_all() -> None:
    """A peer that is not asked for is not measured in the sweep either."""
    assert parse_settings(["--peers", "mmap"]).sweep_peers == ()
    assert parse_settings(["--peers", "mmap,accelerate"]).sweep_peers == ("accelerate",)


def test_budgets_are_sorted_and_taken_of_the_weights() -> None:
    """The sweep goes from small to large, whatever the order on the command line."""
    settings = parse_settings(["--budgets", "75, 25"])
    assert settings.budgets == (25, 75)
    assert settings.sweep_budget_bytes(25) == math.floor(settings.weight_bytes / 4)


@pytest.mark.parametrize(
    "arguments",
    [["--tokens", "1,1"], ["--tokens", ""], ["--budgets", "100"], ["--peers", "llama"], ["--passes", "0"]],
)
def test_nonsense_ends_with_a_message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot work is refused before anything is measured."""
    with pytest.raises(SystemExit):
        parse_settings(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_folder_is_absolute() -> None:
    """Contenders run in another folder, so a relative one would be another one."""
    assert parse_settings(["--folder", "here"]).checkpoint.parent == Path.cwd() / "here"


@pytest.mark.parametrize(("passes", "expected"), [(1, [1]), (2, [1, 1]), (5, [3, 2])])
def test_passes_are_shared_out_around_the_peers(passes: int, expected: list[int]) -> None:
    """All passes are made, and no group is empty."""
    assert groups(passes) == expected
