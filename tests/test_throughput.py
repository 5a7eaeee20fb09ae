"""Several passes at once: in order, lazy, right, and nothing left behind whatever ends them."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import odewei
from odewei.errors import OptionsError
from tests import models as zoo
from tests.traps import DEPTHS, Blocks, rows, twins

PATIENCE = 60


@pytest.mark.parametrize("depth", DEPTHS)
def test_results_come_in_order_with_the_bits_of_one_pass_alone(depth: int | str, tmp_path: Path) -> None:
    """Forty inputs by four threads, whichever is ready first, are as the resident model's."""
    with twins(Blocks, tmp_path, depth) as (model, streamed), torch.no_grad():
        inputs = [rows(seed, 1 + seed % 5) for seed in range(40)]
        found = list(odewei.map(streamed, inputs, concurrency=4))
        assert zoo.same_bits(found, [model(one) for one in inputs])


def test_what_an_input_is() -> None:
    """A mapping is keyword arguments, a tuple positional ones, anything else one argument; keywords go with all."""

    def show(*args: object, **kwargs: object) -> tuple[tuple[object, ...], dict[str, object]]:
        return args, kwargs

    inputs = [{"b": 2}, (1, 2), [1, 2], "ab", (), {"a": 7}]
    assert list(odewei.map(show, inputs, concurrency=2, a=0)) == [
        ((), {"a": 0, "b": 2}),
        ((1, 2), {"a": 0}),
        (([1, 2],), {"a": 0}),
        (("ab",), {"a": 0}),
        ((), {"a": 0}),
        ((), {"a": 7}),
    ]


def _names() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("odewei-map")}


def test_it_runs_so_many_at_once_and_no_more() -> None:
    """Three calls are under way together, which each of them waits for; a fourth never is."""
    together = threading.Barrier(3)
    running: list[int] = []
    most: list[int] = []

    def call(number: int) -> int:
        running.append(number)
        most.append(len(running))
        together.wait(PATIENCE)
        running.remove(number)
        together.wait(PATIENCE)
        return number

    assert list(odewei.map(call, range(9), concurrency=3)) == list(range(9))
    assert max(most) == 3
    assert not _names()


def test_it_is_lazy() -> None:
    """Nothing is taken before the first result is asked for, and then never more than twice as many as run at once."""
    taken: list[int] = []

    def endless() -> Iterator[int]:
        number = 0
        while True:
            taken.append(number)
            yield number
            number += 1

    results = odewei.map(lambda number: number, endless(), concurrency=3)
    assert not taken
    for number in range(20):
        assert next(results) == number
        assert len(taken) - number <= 2 * 3
    results.close()
    assert not _names()
    assert list(results) == []


def test_an_exception_arrives_at_its_position_and_ends_the_rest() -> None:
    """Results before it are there, it is itself, and of what follows only what was running has run."""
    called: list[int] = []

    def call(number: int) -> int:
        called.append(number)
        if number == 5:
            raise KeyError("five")
        return number

    results = odewei.map(call, range(100), concurrency=2)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(KeyError, match="five"):
        next(results)
    assert not _names()
    assert len(called) <= 5 + 2 * 2 + 1
    assert list(results) == []


def test_an_exception_of_the_inputs_arrives_at_its_position() -> None:
    """What came before it is called and yielded first."""

    def inputs() -> Iterator[int]:
        yield from range(3)
        raise OSError("no more")

    results = odewei.map(lambda number: number, inputs(), concurrency=8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="no more"):
        next(results)
    assert not _names()


@pytest.mark.parametrize("how", ["closed", "dropped", "thrown into"])
def test_stopping_early_ends_the_threads(how: str) -> None:
    """The calls that run are waited for, no other begins, and no thread is left."""
    called: list[int] = []

    def call(number: int) -> int:
        called.append(number)
        return number

    results = odewei.map(call, range(1000), concurrency=4)
    assert next(results) == 0
    if how == "closed":
        results.close()
    elif how == "thrown into":
        with pytest.raises(KeyboardInterrupt):
            results.throw(KeyboardInterrupt)
    del results
    gc.collect()
    assert not _names()
    assert len(called) <= 2 * 4 + 1


def test_the_last_reference_may_die_in_one_of_its_own_threads() -> None:
    """A generator that its own call drops waits for nobody: not for itself."""
    kept: list[object] = []
    ready, dropped = threading.Event(), threading.Event()

    def call(number: int) -> int:
        if number == 1:
            assert ready.wait(PATIENCE)
            kept.clear()
            dropped.set()
        return number

    results = odewei.map(call, range(3), concurrency=2)
    assert next(results) == 0
    kept.append(results)
    del results
    ready.set()
    assert dropped.wait(PATIENCE)
    for thread in threading.enumerate():
        if thread.name.startswith("odewei-map"):
            thread.join(PATIENCE)
    assert not _names()


class Modes(nn.Module):
    """Tells how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, bool, bool]:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden, torch.is_grad_enabled(), hidden.is_inference()


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode", "autocast"])
def test_the_callers_modes_hold_in_the_passes(mode: str, tmp_path: Path) -> None:
    """Gradients, inference mode and autocast are those of whoever called map, also for results taken later."""
    contexts = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    with twins(Modes, tmp_path) as (model, streamed):
        with contexts[mode]():
            expected = model(hidden)
            results = odewei.map(streamed, [hidden] * 4, concurrency=2)
            found = [next(results)]
        found += list(results)
    for result in found:
        assert zoo.same_bits([result[0]], [expected[0]])
        assert result[1:] == expected[1:]
        assert result[0].dtype == expected[0].dtype


@pytest.mark.parametrize("depth", DEPTHS)
def test_prompts_of_any_length_generate_what_each_does_alone(depth: int | str, tmp_path: Path) -> None:
    """Without padding, in order, bit for bit: prompts as ids of one and two dimensions and as a tokenizer's mapping."""
    pytest.importorskip("transformers")
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 90, (1, 2 + 3 * (index % 4)), generator=draw) for index in range(9)]
    prompts: list[object] = list(ids)
    prompts[3] = ids[3][0]
    prompts[4] = {"input_ids": ids[4], "attention_mask": torch.ones_like(ids[4])}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with twins(zoo.llama, tmp_path, depth) as (model, streamed):
        expected = [model.generate(one, **options) for one in ids]
        found = list(odewei.generate_many(streamed, prompts, concurrency=3, **options))
        assert zoo.same_bits(found, expected)


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, True, "two"])
def test_a_concurrency_that_cannot_work_is_an_error_at_once(concurrency: object) -> None:
    """The error names the value, before anything is asked for."""
    with pytest.raises(OptionsError, match="concurrency="):
        odewei.map(print, [], concurrency=concurrency)  # type: ignore[arg-type]


def test_progress_is_shown_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """A bar that counts the results; stdout stays what it is."""
    pytest.importorskip("rich")
    assert list(odewei.map(lambda number: number, [1, 2, 3], concurrency=2, progress=True)) == [1, 2, 3]
    captured = capsys.readouterr()
    assert "3/3" in captured.err
    assert captured.out == ""


def test_progress_without_rich_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes at once and says what to install; without a bar nothing is needed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(OptionsError, match=r"odewei\[cli\]"):
        odewei.map(print, [], progress=True)
    assert list(odewei.map(lambda number: number, [1], concurrency=1)) == [1]
