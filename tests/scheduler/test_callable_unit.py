"""A unit that a function delivers: asked once, checked, copied, resized when its dtype was not foreseen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from odewei.errors import WeightMismatchError
from odewei.scheduler.budget import Budget
from odewei.scheduler.callable_unit import CallableUnit, Expected
from odewei.scheduler.reader import FileTable, Resized
from odewei.scheduler.slabs import SlabPool

WEIGHTS = [Expected("m.a", (3, 4), torch.float32), Expected("m.b", (), torch.int64)]
FILES = FileTable(direct=False, scratch_bytes=8192)


class Source:
    """Answers with ``tensors``, and remembers what it was asked for."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = {f"m.{name}": tensor for name, tensor in tensors.items()}
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, module: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        assert module == "m"
        self.asked.append(tuple(names))
        return self.tensors


def unit(source: Source, room: int = 1 << 20) -> CallableUnit:
    return CallableUnit("m", WEIGHTS, source, SlabPool(Budget(room)), lambda dtype: dtype, lambda name: True)


def slab(of: CallableUnit) -> np.ndarray:
    return np.zeros(of.nbytes, np.uint8)


def test_what_the_function_returns_is_copied() -> None:
    """The tensors over the slab have the function's values and none of its memory."""
    source = Source(a=torch.arange(12.0).reshape(3, 4), b=torch.tensor(7))
    one = unit(source)
    memory = slab(one)
    assert one.jobs()[0].run(memory, FILES) == 12 * 4 + 8
    source.tensors["m.a"].zero_()
    found = one.tensors(memory)
    assert torch.equal(found["m.a"], torch.arange(12.0).reshape(3, 4))
    assert found["m.b"] == 7
    assert source.asked == [("m.a", "m.b")]


def test_another_dtype_needs_another_slab_and_no_second_call() -> None:
    """What came in an unforeseen dtype is kept until the slab of the right size is there."""
    source = Source(a=torch.ones(3, 4, dtype=torch.float64), b=torch.tensor(7))
    one = unit(source)
    with pytest.raises(Resized) as caught:
        one.run(slab(one), FILES)
    assert caught.value.nbytes == one.nbytes == 192
    memory = slab(one)
    assert one.run(memory, FILES) == 0
    assert one.tensors(memory)["m.a"].dtype is torch.float64
    assert len(source.asked) == 1


def test_a_function_that_never_makes_up_its_mind() -> None:
    """Without room to keep an answer, a function with ever other dtypes is an error, not an endless loop."""
    dtypes = [torch.float64, torch.bfloat16] * 2
    source = Source(a=torch.ones(3, 4), b=torch.tensor(7))
    one = unit(source, room=0)
    for _ in range(2):
        for dtype in dtypes[:3]:
            source.tensors["m.a"] = torch.ones(3, 4, dtype=dtype)
            with pytest.raises(Resized):
                one.run(slab(one), FILES)
        source.tensors["m.a"] = torch.ones(3, 4, dtype=dtypes[3])
        with pytest.raises(WeightMismatchError, match="dtypes"):
            one.run(slab(one), FILES)
        source.tensors["m.a"] = torch.ones(3, 4, dtype=dtypes[3])
        one.run(slab(one), FILES)


@pytest.mark.parametrize("wrong", [torch.ones(4, 3), torch.ones(3, 4, dtype=torch.int32)])
def test_what_does_not_fit_is_named(wrong: torch.Tensor) -> None:
    """Another shape or kind of dtype is an error that names module and weight."""
    one = unit(Source(a=wrong, b=torch.tensor(7)))
    with pytest.raises(WeightMismatchError) as caught:
        one.run(slab(one), FILES)
    assert (caught.value.module, caught.value.weight) == ("m", "m.a")


def test_what_is_too_much_is_kept_without_its_larger_storage() -> None:
    """A view of something large is kept as a copy of itself, and counted as that."""
    large = torch.arange(1000.0)
    source = Source(a=torch.ones(3, 4), b=torch.tensor(7), c=large[:10])
    pool = SlabPool(Budget(1 << 20))
    one = CallableUnit("m", WEIGHTS, source, pool, lambda dtype: dtype, lambda name: True)
    one.run(slab(one), FILES)
    assert pool.budget.used_bytes == 40
    kept = pool.take_spare("m.c")
    assert isinstance(kept, torch.Tensor)
    assert kept.untyped_storage().nbytes() == 40
    assert torch.equal(kept, large[:10])
