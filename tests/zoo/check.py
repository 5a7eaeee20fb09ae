"""Streams an entry of the zoo and compares it with the resident model, byte for byte."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import odewei
from odewei.errors import BudgetTooSmallError
from odewei.report import Report
from odewei.torch import init_on_demand_weights_model
from tests.models import resident, same_bits, save, weight_bytes
from tests.zoo.architecture import Architecture

SHARE = 0.4  # of the weights that the budget may hold; more where less does not work


def check(entry: Architecture, folder: Path) -> Report:
    """Two passes and one with another input equal those of the ordinary resident model, trainable as its class made it,
    within the budget, and weights are read again. So do passes in inference mode and with gradients, and those of the
    frozen model: torch chooses kernels by whether a weight requires gradients, even under no_grad.

    Returns the report of the streamed model after the first three. Raises AssertionError.
    """
    model = resident(entry.build)
    path = save(model, folder / "model.safetensors")
    expected = {seed: outputs(model, entry.inputs(seed)) for seed in (1, 2)}
    assert expected[1], "the call returns no tensor"
    in_modes = [in_mode(mode, model, entry.inputs(1)) for mode in MODES]
    frozen = outputs(model.requires_grad_(False), entry.inputs(1))
    nbytes = weight_bytes(model)
    del model
    with smallest_streamed(entry.build, path, int(SHARE * nbytes)) as streamed:
        read = []
        for seed in (1, 1, 2):
            assert same_bits(outputs(streamed, entry.inputs(seed)), expected[seed]), f"other bits with input {seed}"
            read.append(odewei.report(streamed).bytes_read)
        report = odewei.report(streamed)
        check_streaming(entry, report, read)
        for mode, known in zip(MODES, in_modes, strict=True):
            assert same_bits(in_mode(mode, streamed, entry.inputs(1)), known), f"other bits under {mode.__name__}"
        assert same_bits(outputs(streamed.requires_grad_(False), entry.inputs(1)), frozen), "other bits when frozen"
        return report


MODES = (torch.inference_mode, torch.enable_grad)


def in_mode(
    mode: Callable[[], AbstractContextManager[Any]], model: nn.Module, inputs: dict[str, Any]
) -> list[torch.Tensor]:
    """All tensors that a call under ``mode`` returns; none where the model cannot be called so."""
    torch.manual_seed(0)
    try:
        with mode():
            found = [one.detach().clone() for one in tensors(model(**inputs), set())]
    except odewei.OdeweiError:
        raise
    except Exception:
        return []
    return found


def check_streaming(entry: Architecture, report: Report, read: list[int]) -> None:
    """The budget was kept, and what it cannot hold was read again in later passes: streaming did happen.

    ``read``: the bytes read until the end of each pass.
    """
    if not entry.overdraws:
        assert report.overdrafts == 0, f"{report.overdrafts} overdrafts"
        assert report.peak_bytes <= report.budget_bytes
    lacking = report.weight_bytes - report.budget_bytes
    if lacking > 0:
        assert report.evictions or report.rows_read, "nothing ever left"
        later = read[-1] - read[0]
        assert later > 0, "nothing was read after the first pass"
        assert entry.partly or entry.overdraws or later >= lacking // 2, (
            f"{later} bytes were read in two passes, {lacking} do not fit"
        )


@contextmanager
def smallest_streamed(build: Callable[[], nn.Module], path: Path, budget_bytes: int) -> Iterator[nn.Module]:
    """A streamed model in eval mode under this budget, or the smallest that works; closed afterwards."""
    model = _build(build, path, budget_bytes).eval()
    try:
        yield model
        runtime = next(iter(odewei.runtime.runtimes_in(model)), None)
        assert runtime is not None
        runtime.driver.ledger.check_invariants()
        assert runtime.driver.ledger.leases() == 0, "a lease was not returned"
    finally:
        odewei.close(model)
        del model
        gc.collect(0)


def _build(build: Callable[[], nn.Module], path: Path, budget_bytes: int) -> nn.Module:
    """A larger budget is cut into larger units, so what the error says is asked for again until it is granted."""
    for _ in range(5):
        try:
            return init_on_demand_weights_model(build, str(path), memory_budget=budget_bytes, prefetch_depth="auto")
        except BudgetTooSmallError as error:
            budget_bytes = told_budget(error)
    raise AssertionError("no budget that odewei names is enough for it")


def told_budget(error: BudgetTooSmallError) -> int:
    """The smallest budget that works, in bytes, as the error says."""
    return int(str(error.cure).split("works is ")[1].split(" ")[0])


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """All tensors that a call returns, caches included. What the model draws at random is the same in every call."""
    torch.manual_seed(0)
    with torch.no_grad():
        found = model(**inputs)
    return list(tensors(found, set()))


def tensors(value: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors in a tree of dictionaries, sequences and objects of transformers and diffusers."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        for one in value.values():
            yield from tensors(one, seen)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one, seen)
    elif type(value).__module__.startswith(("transformers", "diffusers")) and not isinstance(value, nn.Module):
        yield from tensors(getattr(value, "__dict__", {}), seen)
