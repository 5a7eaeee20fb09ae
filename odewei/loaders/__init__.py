"""Where the bytes of the weights are.

A loader knows files, headers, indexes and dtypes; it knows nothing of modules, streams, threads or asyncio. It answers
``locate(names)`` with the place of each weight and ``read_into(info, buffer)`` with its bytes. A plain function
``(module_name, weight_names) -> {name: tensor}`` is a full citizen behind :class:`CallableLoader`.

Nothing in a checkpoint is trusted: headers, indexes and archives are checked before anything is allocated or opened on
their word, and pickles may build tensors only.
"""

from typing import TYPE_CHECKING

from odewei.loaders.base import CheckpointFile, Span, WeightInfo, WeightPart, WeightsLoader
from odewei.loaders.gathering import Concat, GatheringLoader, Recipe, Stack
from odewei.loaders.open_checkpoint import open_checkpoint
from odewei.loaders.plain_callable import CallableLoader, as_source
from odewei.loaders.remote_path import RemoteOptions
from odewei.loaders.safetensors_file import SafetensorsLoader
from odewei.loaders.shard_set import ShardSetLoader
from odewei.loaders.sharded import ShardedWeightsLoader
from odewei.loaders.state_dict import StateDictLoader
from odewei.loaders.tensors import is_castable, read_tensor, view_as_weight
from odewei.on_demand import on_demand

if TYPE_CHECKING:
    from odewei.loaders.distributed import DistributedLoader
    from odewei.loaders.gguf_file import GgufLoader
    from odewei.loaders.numpy_file import NumpyLoader
    from odewei.loaders.torch_file import TorchLoader

__all__ = [
    "CallableLoader",
    "CheckpointFile",
    "Concat",
    "DistributedLoader",
    "GatheringLoader",
    "GgufLoader",
    "NumpyLoader",
    "Recipe",
    "RemoteOptions",
    "SafetensorsLoader",
    "ShardSetLoader",
    "ShardedWeightsLoader",
    "Span",
    "Stack",
    "StateDictLoader",
    "TorchLoader",
    "WeightInfo",
    "WeightPart",
    "WeightsLoader",
    "as_source",
    "is_castable",
    "open_checkpoint",
    "read_tensor",
    "view_as_weight",
]

__getattr__ = on_demand(
    __name__,
    {
        "DistributedLoader": "odewei.loaders.distributed",
        "GgufLoader": "odewei.loaders.gguf_file",
        "NumpyLoader": "odewei.loaders.numpy_file",
        "TorchLoader": "odewei.loaders.torch_file",
    },
)
