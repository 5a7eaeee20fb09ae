"""A module tree from nothing but the names of a checkpoint's tensors, good enough to be cut into units.

Knows names, shapes and what they usually mean. The tree cannot run: its parameters have no values and its modules no
code. What the code of a real model would say is guessed from names: which lists are repeated blocks, which matrices are
only looked up (``nn.Embedding``), and whether a head that is not there is tied to one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.nn import functional

from odewei.loaders.base import WeightInfo

__all__ = ["BUFFERS", "skeleton"]

BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked", "position_ids", "inv_freq", "rotary_emb"})
"""Last parts of names that are buffers in all models that are known: loaded once, and no part of the budget."""

_TABLE = re.compile(
    r"(?!embed_out)((.*_)?embed(d?ing)?s?(_tokens|_positions)?|tok_embeddings|wte|wpe|shared|token_embd)"
)
_HEAD = "lm_head"


class _Table(nn.Module):
    """A matrix that is only looked up."""

    weight: nn.Parameter

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(ids, self.weight)  # never called; says what a look-up's code would


def skeleton(infos: Mapping[str, WeightInfo], *, tied: bool = False) -> nn.Module:
    """Modules in the order of the names, numbers in lists by their value; parameters on the meta device.

    ``tied``: the first table of tokens serves as the head too, if the names have no head.
    """
    nodes: dict[str, _Node] = {"": _Node()}
    for name in infos:
        owner, _, local_name = name.rpartition(".")
        _node(nodes, owner).weights.append(local_name)
    modules: dict[str, nn.Module] = {}
    for path in sorted(nodes, key=lambda path: -path.count(".") - bool(path)):  # what is below first
        modules[path] = _module(path, nodes[path], modules, infos)
    root = modules[""]
    if tied:
        _tie(root, modules)
    return root


class _Node:
    """A module to be: its children's local names and its weights'."""

    def __init__(self) -> None:
        self.children: list[str] = []
        self.weights: list[str] = []


def _node(nodes: dict[str, _Node], path: str) -> _Node:
    """The node of a path, made with all above it if need be."""
    missing = []
    while path not in nodes:
        missing.append(path)
        path = path.rpartition(".")[0]
    for each in reversed(missing):
        parent, _, local_name = each.rpartition(".")
        nodes[parent].children.append(local_name)
        nodes[each] = _Node()
    return nodes[missing[0] if missing else path]


def _module(path: str, node: _Node, modules: Mapping[str, nn.Module], infos: Mapping[str, WeightInfo]) -> nn.Module:
    prefix = f"{path}." if path else ""
    children = node.children
    if children and not node.weights and all(map(str.isdecimal, children)):
        children = sorted(children, key=int)
        module = _list_of([modules[prefix + child] for child in children])
    elif _is_table(path, node.weights, infos):
        module = _Table()
    else:
        module = nn.Module()
    for child in children:
        module._modules[child] = modules[prefix + child]
    for local_name in node.weights:
        info = infos[prefix + local_name]
        value = torch.empty(info.shape, dtype=info.dtype, device="meta")
        module._parameters[local_name] = nn.Parameter(value, requires_grad=False)
    return module


def _list_of(children: Collection[nn.Module]) -> nn.Module:
    """Repeated blocks are a list; what only stands one after another (a linear layer, a norm) a sequence."""
    kinds = {tuple(name for name, _ in child.named_parameters()) for child in children}
    return nn.ModuleList() if len(kinds) == 1 else nn.Sequential()


def _is_table(path: str, weights: Collection[str], infos: Mapping[str, WeightInfo]) -> bool:
    if list(weights) != ["weight"] or len(infos[f"{path}.weight" if path else "weight"].shape) != 2:
        return False
    return _TABLE.fullmatch(path.rpartition(".")[2]) is not None


def _tie(root: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    tables = [module for module in modules.values() if isinstance(module, _Table)]
    if not tables or _HEAD in root._modules:
        return
    largest = max(tables, key=lambda table: table._parameters["weight"].numel())  # type: ignore[union-attr]
    head = nn.Module()
    head._parameters["weight"] = largest._parameters["weight"]
    root._modules[_HEAD] = head
