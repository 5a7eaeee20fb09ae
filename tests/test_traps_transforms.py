"""torch.compile, torch.func, vmap and tracing of streamed models give the resident bits, or say why not."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call

import odewei
from odewei.uncompiled import uncompiled
from tests import models as zoo
from tests.traps import DEPTHS, Blocks, rows, twins


def _compiled(model: nn.Module, backend: str) -> tuple[int, list[list[float]]]:
    """The graphs that compiling all blocks takes, and what five passes give; after the first none is compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    for block in model.blocks:
        block.compile(backend=counter)
    found = [model(rows(1))]
    graphs = counter.frame_count
    assert graphs > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += [model(rows(seed)) for seed in (2, 1, 3, 4)]
    assert counter.frame_count == graphs
    return graphs, [one.flatten().tolist() for one in found]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_compiled_blocks_are_compiled_once(backend: str, depth: int | str, tmp_path: Path) -> None:
    """Blocks are compiled in the first pass only, as many graphs as the resident's, while weights come and go."""
    with twins(Blocks, tmp_path, depth, granularity="block") as (model, streamed), torch.no_grad():
        assert _compiled(streamed, backend) == _compiled(model, backend)
        gc.collect()  # the compiler leaves weights to the collector, which may exceed the budget meanwhile
        before = odewei.report(streamed)
        assert zoo.same_bits([streamed(rows(5))], [model(rows(5))])
        after = odewei.report(streamed)
        assert after.bytes_read - before.bytes_read > after.weight_bytes - after.budget_bytes > 0
        assert after.overdrafts == before.overdrafts


def test_a_compiled_model(tmp_path: Path) -> None:
    """The whole model compiled is right in the first pass and in later ones, with other shapes, too."""
    torch._dynamo.reset()
    with twins(Blocks, tmp_path, 0) as (model, streamed), torch.no_grad():
        compiled = torch.compile(streamed, backend="eager")
        for seed, count in enumerate((3, 3, 5, 3)):
            assert torch.equal(compiled(rows(seed, count)), model(rows(seed, count)))
        assert odewei.report(streamed).bytes_read > odewei.report(streamed).weight_bytes


@pytest.mark.parametrize("depth", DEPTHS)
def test_functional_call(depth: int | str, tmp_path: Path) -> None:
    """Calls with some or all parameters given, from either model, are right; so are ordinary ones in between."""
    with twins(Blocks, tmp_path, depth) as (model, streamed), torch.no_grad():
        some = {"blocks.2.up.weight": torch.randn_like(model.blocks[2].up.weight), "blocks.7.down.bias": rows(9, 1)[0]}
        for given in (some, dict(model.named_parameters()), dict(streamed.named_parameters())):
            plain = {name: model.get_parameter(name) if given is not some else one for name, one in given.items()}
            expected = functional_call(model, plain, (rows(1),))
            assert torch.equal(functional_call(streamed, given, (rows(1),)), expected)
            assert torch.equal(streamed(rows(2)), model(rows(2)))
        assert torch.equal(streamed.blocks[2].up.weight, model.blocks[2].up.weight)


@pytest.mark.parametrize("depth", DEPTHS)
def test_functional_call_leaves_a_streamed_model(depth: int | str, tmp_path: Path) -> None:
    """What was replaced for one call streams on afterwards."""
    with twins(Blocks, tmp_path, depth) as (model, streamed), torch.no_grad():
        given = {name: one.clone() for name, one in model.named_parameters()}
        functional_call(streamed, given, (rows(1),))  # torch keeps all that it replaces until it puts it back
        before = odewei.report(streamed)
        for seed in range(4):
            assert torch.equal(streamed(rows(seed)), model(rows(seed)))
        after = odewei.report(streamed)
        assert after.bytes_read - before.bytes_read > after.weight_bytes
        assert after.overdrafts == before.overdrafts
        assert after.resident_bytes <= after.budget_bytes


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("depth", DEPTHS)
def test_transforms(depth: int | str, tmp_path: Path) -> None:
    """vmap, grad, jvp and jacobians over a streamed model are those over the resident one."""
    with twins(Blocks, tmp_path, depth) as (model, streamed):
        batch, tangent = torch.stack([rows(1), rows(2)]), torch.stack([rows(3), rows(4)])
        for transformed in (
            lambda one: torch.vmap(one)(batch),
            lambda one: torch.func.grad(lambda hidden: one(hidden).square().sum())(batch),
            lambda one: torch.vmap(torch.func.grad(lambda hidden: one(hidden).square().sum()))(batch),
            lambda one: torch.func.jvp(one, (batch,), (tangent,)),
            lambda one: torch.func.jacrev(one)(rows(5, 1)),
            lambda one: torch.func.jacfwd(one)(rows(5, 1)),
            lambda one: torch.func.vjp(one, batch)[1](tangent)[0],
            lambda one: torch.vmap(lambda hidden: hidden @ next(one.parameters()).T)(batch),
        ):
            for _ in range(2):
                expected, found = (list(zoo._tensors(transformed(one))) for one in (model, streamed))
                assert zoo.same_bits(found, expected)
        report = odewei.report(streamed)
        assert report.bytes_read > report.weight_bytes


@pytest.mark.parametrize("depth", DEPTHS)
def test_vmap_over_stacked_parameters(depth: int | str, tmp_path: Path) -> None:
    """An ensemble made by stacking a streamed model's weights is right."""
    with twins(Blocks, tmp_path, depth) as (model, streamed), torch.no_grad():
        hidden = rows(1)

        def ensemble(one: nn.Module) -> torch.Tensor:
            stacked = {name: torch.stack([value, value * 2]) for name, value in one.named_parameters()}
            return torch.vmap(lambda given: functional_call(one, given, (hidden,)))(stacked)

        assert torch.equal(ensemble(streamed), ensemble(model))
        assert torch.equal(streamed(rows(2)), model(rows(2)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.trace:FutureWarning")
def test_jit_trace(tmp_path: Path) -> None:
    """Tracing a function that calls the model gives a graph that is right for other inputs."""
    with twins(Blocks, tmp_path) as (model, streamed), torch.no_grad():
        traced = torch.jit.trace(lambda hidden: streamed(hidden), (rows(1),))
        for seed in (1, 2):
            assert torch.equal(traced(rows(seed)), model(rows(seed)))
            assert torch.equal(streamed(rows(seed)), model(rows(seed)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.trace:FutureWarning")
def test_jit_trace_of_the_module(tmp_path: Path) -> None:
    """Tracing the module itself is right, too; torch's comparison of two traces may refuse, as weights come and go."""
    with twins(Blocks, tmp_path) as (model, streamed), torch.no_grad():
        traced = torch.jit.trace(streamed, (rows(1),), check_trace=False)
        assert torch.equal(traced(rows(2)), model(rows(2)))
        assert torch.equal(streamed(rows(3)), model(rows(3)))


def test_another_torch_without_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no such strategy for frames, the public way is taken."""
    monkeypatch.setattr(torch._C._dynamo, "eval_frame", object())
    asked = []
    monkeypatch.setattr(torch.compiler, "disable", lambda function: asked.append(function) or function)

    def read() -> None: ...

    assert uncompiled(read) is read
    assert asked == [read]
