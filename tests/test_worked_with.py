"""A streamed model under what people do to models: each action on the ordinary resident model and on the streamed one.

After it both have the same bits in outputs and state, the same flags, and what the action returned is the same.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import odewei
from tests import models

Action = Callable[[Any], object]
X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(7))


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(F.gelu(self.up(self.norm(hidden) + self.shift)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, 10, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return self.head(self.lstm(hidden)[0])


def weight(model: Any) -> Any:
    return model.blocks[1].up.weight


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(X)


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return [None if one.grad is None else one.grad.clone() for one in model.parameters()]


ACTIONS: dict[str, Action] = {}


def action(function: Action) -> Action:
    ACTIONS[function.__name__] = function
    return function


# -- writing -----------------------------------------------------------------------------------------------------------


@action
def data_in_place(model: Any) -> None:
    weight(model).data.mul_(2)


@action
def data_replaced(model: Any) -> None:
    weight(model).data = torch.ones(64, 32)


@action
def data_added_to(model: Any) -> None:
    weight(model).data += 1


@action
def data_of_another_dtype(model: Any) -> object:
    for one in model.parameters():
        one.data = one.data.double()
    with torch.no_grad():
        return model(X.double()), model.float() and None


@action
def data_through_halves(model: Any) -> None:
    weight(model).data = weight(model).data.half().float()


@action
def data_filled_and_gradient_given(model: Any) -> object:
    weight(model).data.fill_(1)
    weight(model).grad = torch.ones(64, 32)
    return weight(model).grad


@action
def set_to_other_memory(model: Any) -> None:
    with torch.no_grad():
        weight(model).set_(torch.ones(64, 32))


@action
def numpy_of_it_written(model: Any) -> None:
    weight(model).detach().numpy()[:] = 3
    output(model)
    model.blocks[2].down.bias.detach().numpy()[3] = 1


@action
def storage_filled(model: Any) -> None:
    weight(model).untyped_storage().fill_(0)


@action
def view_written_later(model: Any) -> None:
    view = weight(model).detach().view(-1)
    output(model), output(model)
    view.mul_(3)


@action
def shallow_copy_written(model: Any) -> object:
    made = copy.copy(weight(model))
    with torch.no_grad():
        made.mul_(2)
    return made.sum().item()


@action
def copied_into_and_indexed(model: Any) -> None:
    with torch.no_grad():
        weight(model).copy_(torch.ones(64, 32))
        weight(model)[0] = 2
        weight(model)[:, 1] += 1


@action
def initialised(model: Any) -> None:
    nn.init.zeros_(weight(model))
    torch.manual_seed(3)
    model.blocks[0].up.reset_parameters()


@action
def in_place_in_grad_mode(model: Any) -> None:
    weight(model).mul_(2)


@action
def state_written(model: Any) -> None:
    for one in model.state_dict().values():
        one.mul_(0.5)


@action
def swapped_with_another(model: Any) -> object:
    other = nn.Parameter(torch.ones(64, 32))
    torch.utils.swap_tensors(weight(model), other)
    return other


@action
def loaded_in_part(model: Any) -> object:
    state = {name: one.clone() * 2 for name, one in model.state_dict().items() if "blocks" in name}
    return str(model.load_state_dict(state, strict=False))


@action
def loaded_by_assignment(model: Any) -> None:
    model.load_state_dict({name: one.clone() * 2 for name, one in model.state_dict().items()}, assign=True)


@action
def loaded_by_swapping(model: Any) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        state = {name: one.clone() * 2 for name, one in model.blocks.state_dict().items()}
        model.blocks.load_state_dict(state)  # of recurrent modules torch can swap nothing: they have weak references
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@action
def to_a_vector_and_back(model: Any) -> object:
    flat = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(flat * 2, model.parameters())
    return flat.detach()


@action
def resized_through_data(model: Any) -> object:
    made = weight(model).data
    made.resize_(64, 16)
    return tuple(made.shape), tuple(weight(model).shape)


# -- flags, gradients, training
# -------------------------------------------------------------------------------------------


@action
def frozen_in_part(model: Any) -> object:
    model.blocks[2].requires_grad_(False)
    model.head.weight.requires_grad = False
    for one in model.lstm.parameters():
        one.requires_grad_(False)
    model(X).sum().backward()
    return gradients(model)


@action
def frozen_and_unfrozen(model: Any) -> object:
    model.requires_grad_(False)
    frozen = output(model)
    dict(model.named_parameters())["blocks.1.up.weight"].requires_grad_(True)
    model(X).sum().backward()
    return frozen, gradients(model)


@action
def adam(model: Any) -> object:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    kept = {id(one) for one in optimizer.state}
    return [id(one) in kept for one in model.parameters()]


@action
def tensor_hooks(model: Any) -> object:
    seen: list[bool] = []
    weight(model).register_hook(lambda grad: grad * 2)
    weight(model).register_post_accumulate_grad_hook(lambda one: seen.append(one is weight(model)))
    model(X).sum().backward()
    return seen, gradients(model)


@action
def gradients_asked_for(model: Any) -> object:
    return torch.autograd.grad(model(X).square().sum(), list(model.parameters()))


@action
def backward_twice(model: Any) -> object:
    loss = model(X).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients(model)


@action
def gradients_of_gradients(model: Any) -> object:
    (grad,) = torch.autograd.grad(model.blocks[1](X).square().sum(), [weight(model)], create_graph=True)
    grad.square().sum().backward()
    return gradients(model)


@action
def written_before_backward(model: Any) -> None:
    loss = model(X).sum()
    with torch.no_grad():
        weight(model).mul_(2)
    loss.backward()


@action
def replaced_before_backward(model: Any) -> object:
    loss = model(X).sum()
    weight(model).data = torch.ones(64, 32)
    loss.backward()
    return gradients(model)


@action
def saved_on_the_host(model: Any) -> object:
    with torch.autograd.graph.save_on_cpu():
        loss = model(X).square().sum()
    loss.backward()
    return gradients(model)


@action
def checkpointed(model: Any) -> object:
    hidden = X.clone().requires_grad_()
    for block in model.blocks:
        hidden = checkpoint(block, hidden, use_reentrant=False)
    hidden = checkpoint(model.attention, hidden, hidden, hidden, use_reentrant=True)[0]
    hidden.square().sum().backward()
    return gradients(model)


@action
def autocast_backward(model: Any) -> object:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.blocks[1](X).float().sum()
    loss.backward()
    return gradients(model)


@action
def functional_gradients(model: Any) -> object:
    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (X,)).square().sum()

    return list(torch.func.grad(loss)(dict(model.named_parameters())).values())


@action
def called_with_others(model: Any) -> object:
    doubled = {name: one * 2 for name, one in model.named_parameters()}
    return torch.func.functional_call(model, doubled, (X,)).detach()


# -- surgery, copies, libraries of torch
# ------------------------------------------------------------------------------------


@action
def layers_moved(model: Any) -> object:
    model.blocks[0], model.blocks[3] = model.blocks[3], model.blocks[0]
    del model.blocks[2]
    model.blocks.insert(1, nn.Linear(32, 32, bias=False))
    nn.init.ones_(model.blocks[1].weight)
    return output(model)


@action
def weights_tied(model: Any) -> object:
    model.blocks[1].up.weight = model.blocks[2].up.weight
    model(X).sum().backward()
    return gradients(model), len(list(model.parameters()))


@action
def parameter_replaced(model: Any) -> None:
    model.blocks[1].up.weight = nn.Parameter(torch.ones(64, 32))


@action
def parameter_deleted_and_registered(model: Any) -> None:
    del model.blocks[1].up.weight
    model.blocks[1].up.register_parameter("weight", nn.Parameter(torch.ones(64, 32)))


@action
def parameter_of_its_data(model: Any) -> object:
    made = nn.Parameter(weight(model).data)
    again = nn.Parameter(weight(model))
    with torch.no_grad():
        made.mul_(2)
        again.add_(1)
    return made, again


@action
def head_left_out(model: Any) -> object:
    del model.head
    model.head = nn.Identity()
    return output(model)


@action
def pruned(model: Any) -> object:
    prune.l1_unstructured(model.blocks[1].up, "weight", amount=0.5)
    found = output(model)
    prune.remove(model.blocks[1].up, "weight")
    return found


@action
def weight_norm(model: Any) -> object:
    parametrizations.weight_norm(model.blocks[1].up)
    found = output(model)
    parametrize.remove_parametrizations(model.blocks[1].up, "weight")
    return found


@action
def orthogonal(model: Any) -> object:
    torch.manual_seed(0)
    parametrizations.orthogonal(model.blocks[1].up)
    return output(model)


@action
def spectral_norm(model: Any) -> object:
    torch.manual_seed(0)
    parametrizations.spectral_norm(model.blocks[1].up)
    model.eval()
    return output(model)


@action
def averaged(model: Any) -> object:
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        weight(model).mul_(2)
    average.update_parameters(model)
    return average.module.blocks[1].up.weight.detach().clone()


@action
def copied_whole(model: Any) -> object:
    made = copy.deepcopy(model)
    with torch.no_grad():
        weight(made).mul_(3)
    return output(made)


@action
def state_copied_and_assigned(model: Any) -> object:
    """What two names of the state share their copies share."""
    model.blocks[3].up.weight = model.blocks[1].up.weight
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with torch.no_grad():
        weight(model).mul_(2)
    return output(model), model.blocks[3].up.weight


@action
def copied_in_part(model: Any) -> object:
    made = copy.deepcopy(model.lstm)
    assert all(type(one) is nn.Parameter for one in made.parameters())
    return made(X)[0].detach()


@action
def pickled(model: Any) -> object:
    return pickle.loads(pickle.dumps(weight(model))).sum().item()


@action
def saved_and_loaded(model: Any) -> object:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    made = Net()
    made.load_state_dict(torch.load(file))
    return output(made)


@action
def moved_to_where_it_is(model: Any) -> None:
    model.to(torch.float32)
    model.cpu().float()
    model.train()
    model.eval()


@action
def recurrent(model: Any) -> object:
    model.lstm.flatten_parameters()
    model.lstm.weight_hh_l0.data.mul_(2)
    return model.lstm(X)[0].detach()


@action
def hooks_copied_to_another(model: Any) -> object:
    made = nn.Linear(64, 32)
    nn.init.ones_(made.weight), nn.init.zeros_(made.bias)
    made._forward_pre_hooks.update(model.blocks[1]._forward_pre_hooks)
    made._forward_hooks.update(model.blocks[1]._forward_hooks)
    model.blocks[1].down = made
    return output(model)


@action
def replaced_within_a_forward(model: Any) -> object:
    """Another weight takes one's place for a moment of the forward, and what was found there is put back."""
    inner, before = model.blocks[1].up, weight(model)

    def swap(module: nn.Module, args: Any) -> None:
        kept = inner._parameters["weight"]
        inner._parameters["weight"] = nn.Parameter(torch.ones(64, 32))
        inner._parameters["weight"] = kept

    handle = model.blocks[1].norm.register_forward_pre_hook(swap)
    found = output(model)
    handle.remove()
    model(X).sum().backward()
    return found, weight(model) is before, gradients(model)


# -- looking
# --------------------------------------------------------------------------------------------------------------


@action
def identities(model: Any) -> object:
    named = dict(model.named_parameters())
    before = [id(one) for one in model.parameters()]
    output(model)
    return (
        weight(model) is named["blocks.1.up.weight"],
        weight(model) in set(model.parameters()),
        before == [id(one) for one in model.parameters()],
        model.lstm._flat_weights[0] is model.lstm.weight_ih_l0,
    )


@action
def addresses(model: Any) -> object:
    before = weight(model).data_ptr()
    output(model), output(model)
    return before == weight(model).data_ptr(), len({one.data_ptr() for one in model.parameters()})


@action
def described(model: Any) -> object:
    one = weight(model)
    return one.is_leaf, one.grad_fn, one.shape, len(one), one.type(), one.double().sum().item(), one.tolist()[0][:3]


@action
def modes(model: Any) -> object:
    with torch.inference_mode():
        found = model(X)
    return found.clone(), model(X).detach(), model(X).requires_grad


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and models.same_bits([one.detach()], [other.detach()])
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _result(do: Action, model: nn.Module) -> object:
    try:
        return do(model)
    except odewei.OdeweiError:
        raise
    except Exception as error:
        return type(error).__name__, str(error)[:60]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("depth", [0, "auto"])
@pytest.mark.parametrize("name", ACTIONS)
def test_as_the_resident_model(name: str, depth: int | str, tmp_path: Path) -> None:
    """What the action gives, and the model after it, are the resident one's; so are the errors."""
    torch.manual_seed(0)
    model = Net()
    path = models.save(model, tmp_path / "model.safetensors")
    budget = models.weight_bytes(model) // 2
    streamed = odewei.torch.init_on_demand_weights_model(Net, path, memory_budget=budget, prefetch_depth=depth)
    assert torch.equal(output(streamed), output(model))
    assert _same(_result(ACTIONS[name], streamed), _result(ACTIONS[name], model))
    for _ in range(2):
        assert [one.requires_grad for one in streamed.parameters()] == [one.requires_grad for one in model.parameters()]
        state, expected = streamed.state_dict(), model.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[key], one) for key, one in expected.items())
        assert _same(_result(output, streamed), _result(output, model))
    for runtime in odewei.runtime.runtimes_in(streamed):
        runtime.driver.ledger.check_invariants()
    odewei.close(streamed)


@pytest.mark.parametrize("how", ["data", "assign", "set"])
@pytest.mark.parametrize("depth", [0, "auto"])
def test_units_of_which_nothing_is_left_are_not_read(how: str, depth: int | str, tmp_path: Path) -> None:
    """Where the user's own weights are in all places nothing is read for them, not even if the file is gone."""
    model = Net()
    path = models.save(model, tmp_path / "model.safetensors")
    streamed = odewei.torch.init_on_demand_weights_model(Net, path, memory_budget="60kB", prefetch_depth=depth)
    for one in (model, streamed):
        if how == "assign":
            one.load_state_dict({name: value.clone() * 2 for name, value in one.state_dict().items()}, assign=True)
        for module in one.modules():
            for name, weight in list(module._parameters.items()):
                if weight is None:
                    continue
                if how == "data":
                    weight.data = weight.data.clone() * 2
                elif how == "set":
                    setattr(module, name, nn.Parameter(weight.detach().clone() * 2))
    path.unlink()
    accesses = odewei.report(streamed).accesses
    for _ in range(2):
        assert torch.equal(output(streamed), output(model))
    assert odewei.report(streamed).accesses == accesses
    odewei.close(streamed)
