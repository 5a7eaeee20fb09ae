"""A module tree from names: it is cut as the model would be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from odewei.layout import Layout
from odewei.loaders.state_dict import StateDictLoader
from odewei.skeleton import skeleton
from odewei.stock import Stock
from odewei.survey import survey
from tests import models


def units_of(model: nn.Module, state: dict[str, torch.Tensor], budget: int) -> set[frozenset[str]]:
    """The names of each unit's weights."""
    infos = StateDictLoader(state).weights()
    stock = Stock(survey(model), infos, None)
    layout = Layout(model, stock, lambda nbytes: budget, "auto", by_rows=True)
    return {frozenset(weight.name for weight in unit.weights) for unit in layout.units}


@pytest.mark.parametrize("build", [models.llama, models.gpt2, models.bert, models.mixtral])
@pytest.mark.parametrize("part", [1.0, 0.3])
def test_units_are_those_of_the_model(build: Callable[[], nn.Module], part: float) -> None:
    """Of models with the usual names, the tree of names is cut into the model's own units, whatever the budget."""
    model = build()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    budget = int(sum(value.nbytes for value in parameters.values()) * part)
    tied = "lm_head.weight" in model.state_dict() and "lm_head.weight" not in parameters
    found = skeleton(StateDictLoader(parameters).weights(), tied=tied)
    assert units_of(found, parameters, budget) == units_of(model, parameters, budget)


def test_numbers_are_in_order_and_any_name_will_do() -> None:
    """Layer 10 comes after layer 9; names that no module could have make a tree as well."""
    names = ["layers.10.w", "layers.9.w", "", "a..b", "x", "x.y", "0"]
    infos = StateDictLoader({name: torch.zeros(()) for name in names}).weights()
    tree = skeleton(infos)
    assert {weight.name for weight in survey(tree)} == set(names) - {""} | {""}
    assert list(tree._modules["layers"]._modules) == ["9", "10"]


def test_a_tied_head_is_the_table() -> None:
    """Where the head is the table of tokens, that is one weight, which is more than looked up."""
    infos = StateDictLoader(
        {"model.embed_tokens.weight": torch.zeros(600, 600), "model.norm": torch.zeros(6)}
    ).weights()
    tied, untied = skeleton(infos, tied=True), skeleton(infos)
    assert sorted(weight.aliases for weight in survey(tied)) == [(), ("lm_head.weight",)]
    assert [weight.aliases for weight in survey(untied)] == [(), ()]
