"""What a model computes on the simulated device is what it computes on the CPU, to rounding, on every schedule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.models import CASES, outputs, resident, same_bits
from tests.sim.simulator import Simulator

Operator = Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]]

# Each for a way of its own: views, results in place, out=, lists, several results, values that the host needs.
OPERATORS: dict[str, Operator] = {
    "arithmetic": lambda x: (x * 2 + 1) / x.exp(),
    "a scalar of the CPU": lambda x: x * torch.tensor(3.0),
    "an index of the CPU": lambda x: x[torch.tensor([3, 0, 1])],
    "other dtypes": lambda x: (x.bfloat16() @ x.bfloat16().t()).double(),
    "a comparison": lambda x: torch.where(x > 0, x, -x),
    "views": lambda x: x.t()[1:].unsqueeze(0).expand(2, -1, -1).reshape(-1, 4).narrow(0, 1, 3),
    "windows": lambda x: x.unfold(1, 3, 2),
    "complex numbers": lambda x: torch.view_as_real(torch.view_as_complex(x.view(4, 3, 2)).conj() * 1j),
    "in place": lambda x: x.add_(1).mul_(x).clamp_(min=0.5),
    "in place through a view": lambda x: (x[1].fill_(7), x)[1],
    "assigned": lambda x: (x.__setitem__((slice(None), 2), 9.0), x)[1],
    "a range": lambda x: torch.arange(2, 11, 3, device=x.device) + x[0, 0],
    "out=": lambda x: torch.mm(x, x.t(), out=torch.empty(0, device=x.device)),
    "lists in": lambda x: torch.cat([x, x[:1]]),
    "lists out": lambda x: list(torch.split(x, 3)),
    "several results": lambda x: tuple(torch.topk(x, 2)),
    "sorted": lambda x: tuple(torch.sort(x, dim=0)),
    "shaped by values": lambda x: torch.nonzero(x > 0),
    "masked": lambda x: x[x > 0],
    "unique": lambda x: tuple(torch.unique(x.round(), return_counts=True)),
    "a value": lambda x: x + x.sum().item(),
    "whether equal": lambda x: torch.tensor([torch.equal(x, x), torch.equal(x, x + 1)]),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(*[x.view(1, 2, 2, 6)] * 3),
    "normalised": lambda x: nn.functional.layer_norm(x, (6,)) + nn.functional.rms_norm(x, (6,)),
    "a histogram": lambda x: torch.histc(x, 5, -2, 2),
    "nothing": lambda x: x[:0] * 2,
}


def _tensors(result: torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_agrees_with_the_cpu(sim: Simulator, name: str) -> None:
    """Values, shapes, dtypes and strides are those of the CPU."""
    operator = OPERATORS[name]
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    expected = _tensors(operator(x.clone()))
    got = _tensors(operator(x.to(sim.device)))
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours.cpu(), theirs)


@pytest.mark.parametrize("name", CASES)
def test_model_agrees_with_the_cpu(sim: Simulator, name: str) -> None:
    """Whole models, the Llama of transformers among them, give what they give on the CPU."""
    case = CASES[name]
    model, inputs = resident(case.build), case.inputs(1)
    expected = outputs(model, inputs)
    model.to(sim.device)
    got = outputs(model, {key: value.to(sim.device) for key, value in inputs.items()})
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "convnet"])
def test_schedules_give_the_same_bits(sim: Simulator, name: str) -> None:
    """A model run twice on one schedule, and so on any, gives the same bits."""
    case = CASES[name]
    model = resident(case.build).to(sim.device)
    inputs = {key: value.to(sim.device) for key, value in case.inputs(1).items()}
    first = [tensor.cpu() for tensor in outputs(model, inputs)]
    assert same_bits([tensor.cpu() for tensor in outputs(model, inputs)], first)


@pytest.mark.parametrize("name", ["tied head", "llama"])
def test_gradients_agree_with_the_cpu(sim: Simulator, name: str) -> None:
    """The backward pass runs on the device as well."""
    model, inputs = resident(CASES[name].build), CASES[name].inputs(2)
    grads = []
    for device in ("cpu", "sim"):
        model.to(device).zero_grad(set_to_none=True)
        result = model(**{key: value.to(device) for key, value in inputs.items()})
        (result if isinstance(result, torch.Tensor) else result.logits).square().mean().backward()
        grads.append([parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None])
    assert len(grads[0]) > 3
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_random_numbers_are_drawn_in_the_order_of_calls(sim: Simulator) -> None:
    """Two streams draw from one generator; which values each gets does not depend on the schedule."""
    torch.manual_seed(11)
    expected = [torch.randn(5), torch.rand(5)]
    torch.manual_seed(11)
    with torch.Stream(device="sim"):
        first = torch.randn(5, device="sim")
        torch.accelerator.current_stream().synchronize()
    second = torch.rand(5, device="sim")
    assert same_bits([first.cpu(), second.cpu()], expected)


def test_a_scalar_of_the_cpu_is_taken_as_it_is_at_the_call(sim: Simulator) -> None:
    """Changing it afterwards does not change what was queued."""
    scalar = torch.tensor(3.0)
    product = torch.ones(4, device="sim") * scalar
    scalar.fill_(9)
    assert product.tolist() == [3, 3, 3, 3]


def test_tensors_of_two_devices_are_refused(sim: Simulator) -> None:
    """As on CUDA, a tensor of the CPU that is more than a scalar does not mix with tensors of the device."""
    with pytest.raises(RuntimeError, match="xpected all tensors to be on the same device"):
        torch.ones(3, device="sim") + torch.ones(3)
    with pytest.raises(RuntimeError, match="xpected all tensors to be on the same device"):
        torch.ones(3, 3, device="sim") @ torch.ones(3, 3)


def test_errors_in_shapes_are_raised_by_the_call(sim: Simulator) -> None:
    """Shapes that do not fit are found when the operator is called, not when it runs."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.ones(3, 2, device="sim") @ torch.ones(3, 2, device="sim")
