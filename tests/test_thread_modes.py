"""torch's modes of one thread, in another."""

from __future__ import annotations

import contextvars
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from odewei.thread_modes import ThreadModes

_variable: contextvars.ContextVar[str] = contextvars.ContextVar("_variable", default="unset")


def _state() -> tuple[object, ...]:
    product = torch.ones(2, 2, requires_grad=True) @ torch.ones(2, 2)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        torch.is_autocast_cache_enabled(),
        product.dtype,
        product.requires_grad,
        _variable.get(),
    )


@pytest.mark.parametrize("name", ["nothing", "no_grad", "inference_mode", "autocast", "uncached"])
def test_modes_are_carried_over(name: str) -> None:
    """What a thread has set for itself holds where it is carried to, and is gone there afterwards."""
    modes: dict[str, AbstractContextManager[object]] = {
        "nothing": nullcontext(),
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.float16),
        "uncached": torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
    }
    token = _variable.set(name)
    try:
        with ThreadPoolExecutor(1) as pool:
            plain = pool.submit(_state).result()
            with modes[name]:
                expected, carried = _state(), ThreadModes.here()
            assert pool.submit(carried.run, _state).result() == expected
            assert (expected == (*plain[:-1], name)) == (name == "nothing")
            assert pool.submit(_state).result() == plain
    finally:
        _variable.reset(token)


def test_modes_are_those_of_the_moment_in_which_they_were_taken() -> None:
    """Several threads may use the same ones at once, whatever mode each is in itself."""
    with torch.no_grad():
        carried = ThreadModes.here()
    with torch.inference_mode(), ThreadPoolExecutor(4) as pool:
        assert [future.result()[0] for future in [pool.submit(carried.run, _state) for _ in range(8)]] == [False] * 8
    assert carried.run(torch.is_grad_enabled) is False
    assert torch.is_grad_enabled()
