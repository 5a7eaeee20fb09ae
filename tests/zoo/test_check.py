"""The zoo's check fails where it should."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models import CASES
from tests.zoo.architecture import Architecture, text
from tests.zoo.check import check, check_streaming

ENTRY = Architecture(name="plain", family="", build=CASES["tied head"].build, inputs=text)


def test_other_bits_are_noticed(tmp_path: Path) -> None:
    """A model whose streamed outputs are not the resident model's does not pass."""
    calls = itertools.count()
    changing = replace(ENTRY, inputs=lambda seed: {"input_ids": torch.full((1, 4), next(calls))})
    with pytest.raises(AssertionError, match="other bits"):
        check(changing, tmp_path)


def test_a_model_that_stays_in_memory_is_noticed(tmp_path: Path) -> None:
    """Reports of a model of which nothing left, nothing was read again, or too little, do not pass."""
    report = check(ENTRY, tmp_path)
    assert report.budget_bytes < report.weight_bytes
    whole = report.weight_bytes
    with pytest.raises(AssertionError, match="nothing ever left"):
        check_streaming(ENTRY, replace(report, evictions=0, rows_read=0), [whole, 2 * whole, 3 * whole])
    with pytest.raises(AssertionError, match="nothing was read"):
        check_streaming(ENTRY, report, [whole, whole, whole])
    with pytest.raises(AssertionError, match="do not fit"):
        check_streaming(ENTRY, report, [whole, whole + 1, whole + 2])
    with pytest.raises(AssertionError, match="overdrafts"):
        check_streaming(ENTRY, replace(report, overdrafts=1), [whole, 2 * whole, 3 * whole])
