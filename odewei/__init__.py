"""odewei runs PyTorch models whose weights do not fit in memory, bit for bit as if they did.

The way of a byte: a *loader* says where in the checkpoint it is → the *scheduler* decides that its unit is next and
that there is room → a reader fills a *slab* → the forward pass enters the unit: its tensors are bound to the module →
the layer computes → the lease ends → the unit stays while its next use is near, or its memory goes to the unit whose
next use is nearer.

- ``odewei.torch``: ``init_on_demand_weights_model`` and the loaders; start there.
- ``odewei.from_pretrained`` and ``stream_pipeline``: checkpoints in the layout of Hugging Face, in one call.
- ``odewei.loaders``: where the bytes are. Knows files; knows nothing of modules, threads or asyncio.
- ``odewei.scheduler``: when bytes move. Knows units, budgets, slabs; knows nothing of modules.
- the modules of this package itself: the model; building it without weights, cutting it into units, hooks, binding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from odewei.collector import without_collector
from odewei.on_demand import on_demand

if TYPE_CHECKING:
    from odewei.pretrained import from_pretrained, stream_pipeline
    from odewei.profiling import Timeline, profile
    from odewei.tools.verify import verify

with without_collector():  # it would look at all that torch has just made, for longer than this import takes
    from odewei.edit import edit
    from odewei.errors import OdeweiError
    from odewei.loaders import open_checkpoint
    from odewei.memory_budget import MemoryBudget
    from odewei.report import Report
    from odewei.runtime import runtime_of, runtimes_in
    from odewei.throughput import generate_many
    from odewei.throughput import map as map  # not in __all__: a star import keeps Python's own
    from odewei.torch import init_on_demand_weights_model
    from odewei.trace import Trace, load_trace, save_trace, trace

__all__ = [
    "MemoryBudget",
    "OdeweiError",
    "Report",
    "Timeline",
    "Trace",
    "close",
    "edit",
    "from_pretrained",
    "generate_many",
    "init_on_demand_weights_model",
    "load_trace",
    "materialize",
    "open_checkpoint",
    "profile",
    "report",
    "save_trace",
    "stream_pipeline",
    "trace",
    "verify",
]

__version__ = "0.2.0.dev0"


__getattr__ = on_demand(
    __name__,
    {
        "Timeline": "odewei.profiling",
        "from_pretrained": "odewei.pretrained",
        "profile": "odewei.profiling",
        "stream_pipeline": "odewei.pretrained",
        "verify": "odewei.tools.verify",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def report(model: nn.Module) -> Report:
    """What happened so far in a streamed model; ``print`` it for a table."""
    return runtime_of(model).report()


def materialize(model: nn.Module) -> nn.Module:
    """Load all weights of a streamed model for good and take odewei out of it. Returns the model.

    Needs memory for all weights besides the budget. A model that is not streamed is returned as it is.
    """
    for runtime in runtimes_in(model):
        runtime.materialize(model)
    return model


def close(model: nn.Module) -> None:
    """Stop the threads and close the files of a streamed model, now; its weights can no longer be used.

    May be called twice. Dropping the last reference to the model does the same.
    """
    for runtime in runtimes_in(model):
        runtime.close()
