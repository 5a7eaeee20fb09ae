"""``odewei plan``"""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import document, invoke, one_line


def test_what_stays_and_what_is_read(checkpoint: Path) -> None:
    """The sums, the disk that was measured, and a row for the layers."""
    result = invoke("plan", checkpoint, "--memory-budget", "2MiB")
    assert result.exit_code == 0, result.output
    for text in ("2.00 MiB", "GB/s (measured", "model.layers.*", "--tokens"):
        assert text in result.stdout


def test_json_with_a_given_bandwidth(checkpoint: Path) -> None:
    """One document: at 1 MB/s the pass takes as many seconds as it reads megabytes, and everything is disk-bound."""
    found = document(
        invoke("plan", checkpoint, "--memory-budget", "2MiB", "--bandwidth", "1MB", "--tokens", "4", "--json")
    )
    assert found["bandwidth"] == 1_000_000
    assert found["disk_bound"] is True
    assert found["budget_bytes"] == 2 << 20
    assert 1_000_000 < found["read_bytes"] < found["weight_bytes"]
    assert found["computing"] > 0
    assert found["seconds"] == pytest.approx(found["read_bytes"] / 1e6, rel=0.1)


def test_auto_is_what_the_machine_has(checkpoint: Path) -> None:
    """Without a budget this small checkpoint fits, and nothing is read after the first pass."""
    found = document(invoke("plan", checkpoint, "--bandwidth", "1GB", "--json"))
    assert found["read_bytes"] == 0
    assert found["tokens"] is None


def test_a_budget_that_is_too_small_names_one_that_is_not(checkpoint: Path) -> None:
    """The smallest budget is in the one line, and works."""
    line = one_line(invoke("plan", checkpoint, "--memory-budget", "10KiB", "--bandwidth", "1GB"))
    least = line.split("that works is ")[1].split()[0]
    assert invoke("plan", checkpoint, "--memory-budget", least, "--bandwidth", "1GB").exit_code == 0


@pytest.mark.parametrize(
    "arguments", [("--memory-budget", "0"), ("--memory-budget", "lots"), ("--bandwidth", "0"), ("--tokens", "0")]
)
def test_values_that_mean_nothing(checkpoint: Path, arguments: tuple[str, ...]) -> None:
    """They are usage errors, with status 2."""
    result = invoke("plan", checkpoint, *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr


def test_the_network_is_not_measured(checkpoint: Path) -> None:
    """The plan of a remote checkpoint asks for its bandwidth, and is made with it."""
    pytest.importorskip("aiohttp", reason="the extra remote is not installed")
    from tests.servers import serving

    with serving(checkpoint) as site:
        result = invoke("plan", site.url, "--memory-budget", "2MiB")
        assert result.exit_code == 2
        assert "give --bandwidth" in " ".join(result.stderr.split())
        assert document(invoke("plan", site.url, "--memory-budget", "2MiB", "--bandwidth", "1MB", "--json"))[
            "disk_bound"
        ]
