"""The name users import: ``from odewei.torch import init_on_demand_weights_model, ShardedWeightsLoader``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from odewei.collector import without_collector
from odewei.hf import known_to_transformers
from odewei.loaders import (
    Concat,
    GatheringLoader,
    RemoteOptions,
    SafetensorsLoader,
    ShardedWeightsLoader,
    Stack,
    StateDictLoader,
    WeightsLoader,
    open_checkpoint,
)
from odewei.loaders.plain_callable import as_source
from odewei.loaders.sums import Verify
from odewei.memory_budget import MemoryBudget
from odewei.meta_model import built_without_weights, not_of_a_build
from odewei.on_demand import on_demand
from odewei.options import Granularity, Options
from odewei.runtime import Runtime

if TYPE_CHECKING:
    from odewei.loaders import GgufLoader, NumpyLoader, TorchLoader

__all__ = [
    "Concat",
    "GatheringLoader",
    "GgufLoader",
    "NumpyLoader",
    "RemoteOptions",
    "SafetensorsLoader",
    "ShardedWeightsLoader",
    "Stack",
    "StateDictLoader",
    "TorchLoader",
    "WeightsLoader",
    "init_on_demand_weights_model",
    "open_checkpoint",
]

__getattr__ = on_demand(__name__, dict.fromkeys(("GgufLoader", "NumpyLoader", "TorchLoader"), "odewei.loaders"))

WeightsSource = (
    WeightsLoader
    | Callable[[str, Sequence[str]], Mapping[str, torch.Tensor]]
    | Mapping[str, torch.Tensor]
    | str
    | os.PathLike[str]
)


def init_on_demand_weights_model(
    model_fn: Callable[[], nn.Module],
    weights_loader_fn: WeightsSource,
    *,
    prefetch_depth: int | str = "auto",
    memory_budget: int | str | MemoryBudget = "auto",
    host_budget: int | str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    granularity: Granularity = "auto",
    io: str = "auto",
    num_readers: int = 4,
    enable_preloading: bool = True,
    on_missing: str = "error",
    on_mismatch: str = "error",
    strict: bool = False,
    verify: Verify = "size",
) -> nn.Module:
    """Build a model whose weights are read from a checkpoint when they are needed, ahead of their need.

    The result is what ``model_fn`` returned, of the same class, and computes the same bits as the model with all
    weights in memory (``load_state_dict(..., assign=True)``). Its parameters are those that ``model_fn`` made,
    trainable as it made them; what is done to one is done to the weight, in memory or not. Calls may come from any
    thread. It is in the mode ``model_fn`` left it in: call ``.eval()`` where the resident model would be.

    Args:
        model_fn: builds the module. It takes no memory for weights; all else is as after an ordinary call, torch's
            generator of random numbers too.
        weights_loader_fn: a loader of ``odewei.loaders``; a path or URL of a checkpoint; a mapping of names to tensors;
            or a function ``(module_name, weight_names) -> {name: tensor}``, which is called in a reader thread.
        prefetch_depth: how many units (layers, mostly) to read ahead of their use; 0 reads each when it is needed,
            without any thread; "auto" reads ahead as far as keeps the disk busy.
        memory_budget: bytes of weights in memory at once, in flight included: an int, text such as "6GiB", "auto":
            what the machine and the process's limits can spare, looked at again while the model runs; or a
            ``MemoryBudget`` that several models share. Each reader has a scratch of at most 1 MiB besides, and buffers
            are not part of it.
        host_budget: on an accelerator, bytes of host memory, pinned, that weights pass on their way to it and that
            keeps what it can: an int, text, or "auto". It has no effect on the CPU.
        device: the execution device: "cpu", or an accelerator that torch finds ("cuda", "xpu", "mps", ...). There
            ``memory_budget`` is of its memory; weights are copied on a stream of their own, and buffers stay there.
            Default: the loader's, else "cpu".
        dtype: floating weights of 16 bits and more are cast to it on load. Default: the loader's, else as stored.
        granularity: what is read together. "auto": the model's blocks, cut finer where the budget asks for it;
            "block": blocks, never finer; "leaf": every module by itself; or ``(name, module) -> bool``: True makes the
            module one unit.
        io: "direct" reads past the page cache, "buffered" through it, "auto" directly when the cache could not hold
            the weights anyway.
        num_readers: reader threads. More than 4 seldom helps. A shared ``MemoryBudget`` has its own number.
        enable_preloading: False is the same as ``prefetch_depth=0``.
        on_missing: a weight that the checkpoint lacks: "error", or "init": it has the value that ``model_fn`` gave it.
        on_mismatch: a weight or buffer that has another shape in the checkpoint: "error", or "init" to initialise it as
            if it were missing (``ignore_mismatched_sizes`` elsewhere).
        strict: entries of the checkpoint that the model has no use for are an error, as in ``load_state_dict``. By
            default they are told once, in the log, and not read.
        verify: for a path: "size": files are as long as their headers say; "sha256": and have the sums that are kept
            beside them, which are compared before the model is built; "none": neither. Loaders have it themselves.

    Raises:
        OptionsError, BudgetTooSmallError: a keyword cannot work; the message says what would.
        CheckpointError: the checkpoint is missing, corrupt, unsafe, incomplete or does not fit the model.
        ModelError: the model cannot be built without its weights.
    """
    source = as_source(weights_loader_fn, verify=verify)
    options = Options.check(
        prefetch_depth=prefetch_depth,
        memory_budget=memory_budget,
        host_budget=host_budget,
        device=source.device if device is None else device,
        dtype=dtype,
        granularity=granularity,
        io=io,
        num_readers=num_readers,
        enable_preloading=enable_preloading,
        on_missing=on_missing,
        on_mismatch=on_mismatch,
        strict=strict,
    )
    if isinstance(source, WeightsLoader):
        with not_of_a_build(), without_collector():
            source.weights()  # before the model, which then takes the memory that reading large headers took
    with built_without_weights(known_to_transformers(model_fn)) as model, not_of_a_build(), without_collector():
        Runtime(model, source, options)
    return model
