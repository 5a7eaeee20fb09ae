"""Checkpoints of any size with random weights, in the layout that Hugging Face checkpoints have.

The shape is a pure value; writing needs torch and safetensors only. A checkpoint appears under its name when it is
complete and on the disk, and not before: it is written beside, and renamed. Only :func:`model_fn` needs transformers.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from odewei.demo.needs import need_disk, need_folder
from odewei.errors import OptionsError
from odewei.scheduler.budget import format_nbytes

__all__ = ["LlamaShape", "default_dtype", "model_fn", "write_llama_checkpoint"]

_WEIGHT_STD = 0.02
_MIN_LAYERS = 12  # as many as make a pass long enough to look ahead in


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The numbers of a model of the Llama architecture (untied head, no biases).

    ``kv_heads`` divides ``heads`` (grouped-query attention), ``heads`` divides ``hidden``.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @classmethod
    def near(cls, nbytes: int, dtype: torch.dtype = torch.bfloat16) -> LlamaShape:
        """The widest usual shape with at least twelve layers whose weights take about ``nbytes`` bytes.

        For less than twelve layers of the narrowest shape: that, with two layers or more. Raises OptionsError where
        even those are larger than ``nbytes``.
        """
        for widest in _WIDTHS:
            layers = widest._layers_for(nbytes, dtype)
            if layers >= _MIN_LAYERS or (widest is _WIDTHS[-1] and layers >= 2):
                return widest.with_layers(layers)
        smallest = _WIDTHS[-1].with_layers(2).nbytes(dtype)
        raise OptionsError(
            f"no model is as small as {format_nbytes(nbytes)}", cure=f"The smallest is {format_nbytes(smallest)}"
        )

    def with_layers(self, layers: int) -> LlamaShape:
        """The same widths, ``layers`` deep."""
        return LlamaShape(self.hidden, self.intermediate, layers, self.heads, self.kv_heads, self.vocab)

    @property
    def name(self) -> str:
        """A name for files, the same for the same shape and no other."""
        return f"llama-{self.hidden}x{self.intermediate}-h{self.heads}-{self.kv_heads}-v{self.vocab}-l{self.layers}"

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, in the order of the model's state dict."""
        vocab = (self.vocab, self.hidden)
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocab}
        for index in range(self.layers):
            found |= {f"model.layers.{index}.{name}.weight": shape for name, shape in self._layer().items()}
        return found | {"model.norm.weight": (self.hidden,), "lm_head.weight": vocab}

    def nbytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of all weights when stored as ``dtype``."""
        return sum(math.prod(shape) for shape in self.weights.values()) * dtype.itemsize

    def config(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, object]:
        """What the checkpoint's ``config.json`` says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "dtype": str(dtype).removeprefix("torch."),
        }

    def _layer(self) -> dict[str, tuple[int, ...]]:
        kv_width = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv_width, self.hidden),
            "self_attn.v_proj": (kv_width, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }

    def _layers_for(self, nbytes: int, dtype: torch.dtype) -> int:
        around = self.with_layers(0).nbytes(dtype)
        layer = self.with_layers(1).nbytes(dtype) - around
        return round((nbytes - around) / layer)


_WIDTHS = (
    LlamaShape(4096, 14336, 0, heads=32, kv_heads=8, vocab=32000),
    LlamaShape(2048, 8192, 0, heads=32, kv_heads=8, vocab=32000),
    LlamaShape(1024, 4096, 0, heads=16, kv_heads=4, vocab=16000),
    LlamaShape(512, 2048, 0, heads=8, kv_heads=2, vocab=8000),
    LlamaShape(256, 1024, 0, heads=4, kv_heads=2, vocab=4000),
    LlamaShape(128, 512, 0, heads=4, kv_heads=2, vocab=1000),
)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Floating tensors made inside have ``dtype`` unless told otherwise. Holds for all threads, as torch's does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def model_fn(shape: LlamaShape, dtype: torch.dtype = torch.bfloat16) -> Callable[[], torch.nn.Module]:
    """A function that builds the model, as ``init_on_demand_weights_model`` takes it. Imports transformers now."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build() -> torch.nn.Module:
        with default_dtype(dtype):
            model = LlamaForCausalLM(LlamaConfig(**shape.config(dtype)))
        assert isinstance(model, torch.nn.Module)
        return model.eval()

    return build


def write_llama_checkpoint(
    folder: Path,
    shape: LlamaShape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 256 * 1024**2,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> bool:
    """Make ``folder`` a checkpoint of ``shape`` with random weights; False if one is there already.

    The weights depend on ``seed`` and on nothing else. No more than ``shard_bytes`` bytes of them (or one weight, if
    that is larger) are in memory at a time. ``progress`` is called after each file with all bytes of weights written so
    far; what it raises ends the writing. ``folder`` appears complete or not at all, also when the process is
    killed; what a killed one left beside it is removed by the next. A second process waits for the first.

    Raises OdeweiError, before anything is written, where the folder or the disk cannot take it.
    """
    need_folder(folder.parent, "Choose another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    with _alone(folder.with_name(f".{folder.name}.lock")):
        if folder.exists():
            return False
        shutil.rmtree(partial, ignore_errors=True)
        need_disk(folder.parent, shape.nbytes(dtype), "Free some, choose another folder, or choose a smaller size")
        partial.mkdir()
        try:
            _write_files(partial, shape, dtype, _shards(shape, dtype, shard_bytes), seed, progress)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _sync(folder.parent)
    return True


def _shards(shape: LlamaShape, dtype: torch.dtype, shard_bytes: int) -> list[list[str]]:
    """Cut the weights, in order, into files of at most ``shard_bytes`` bytes; a larger weight has a file of its own."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in shape.weights.items():
        nbytes = math.prod(size) * dtype.itemsize
        if nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= nbytes
    return shards


def _write_files(
    folder: Path,
    shape: LlamaShape,
    dtype: torch.dtype,
    shards: Sequence[Sequence[str]],
    seed: int,
    progress: Callable[[int], None] | None,
) -> None:
    seeds = {name: seed + index for index, name in enumerate(shape.weights)}
    sizes = shape.weights
    weight_map: dict[str, str] = {}
    done_bytes = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for number, names in enumerate(shards, 1):
            drawn = threads.map(lambda name: _draw(sizes[name], dtype, seeds[name]), names)
            shard = dict(zip(names, drawn, strict=True))
            file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, file, metadata={"format": "pt"})
            _sync(file)
            weight_map |= dict.fromkeys(names, file.name)
            done_bytes += sum(weight.nbytes for weight in shard.values())
            if progress is not None:
                progress(done_bytes)
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": done_bytes}, "weight_map": weight_map}
    )
    _write_json(folder / "config.json", shape.config(dtype))
    _sync(folder)


def _draw(size: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A matrix of normal numbers, or a norm's vector of ones."""
    if len(size) == 1:
        return torch.ones(size, dtype=dtype)
    return torch.empty(size, dtype=dtype).normal_(0, _WEIGHT_STD, generator=torch.Generator().manual_seed(seed))


def _write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    _sync(file)


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold the lock file; it is the kernel that lets go of it when the process ends in whatever way."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
