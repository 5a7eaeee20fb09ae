"""Every contender: how its own documentation says to run a model whose weights lie in a folder of safetensors files.

Each function imports what it needs, so that imports are no part of any time, and returns one that builds the model.
What that returns is called with token ids and ``use_cache=False``. Runs in the contender's own process.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

__all__ = ["CONTENDERS", "Job", "Model"]

Model = Callable[..., Any]
"""A module, or what stands for one: returns an object with ``logits``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to run: the checkpoint, a folder that may be written in, and odewei's keywords (others ignore them)."""

    folder: Path
    scratch: Path
    keywords: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        """The files with weights."""
        return sorted(self.folder.glob("*.safetensors"))


def odewei(job: Job) -> Callable[[], Model]:
    """odewei with default options, but for the keywords of the job."""
    from odewei.torch import init_on_demand_weights_model

    build = _from_config(job)
    return lambda: init_on_demand_weights_model(build, str(job.folder), **job.keywords).eval()


def resident(job: Job) -> Callable[[], Model]:
    """All weights in memory, where torch itself would have put them (the last bits depend on their alignment)."""
    return lambda: _assigned(job, clone=True)


def mapped(job: Job) -> Callable[[], Model]:
    """Weights assigned from ``load_file``: mapped files, which the kernel reads page by page as they are touched."""
    return lambda: _assigned(job, clone=False)


def accelerate(job: Job) -> Callable[[], Model]:
    """accelerate's disk offload from the checkpoint's own files, through its offload index.

    Of the two ways it has, this one needs no disk; for the other see ``accelerate_dat``.
    """
    from accelerate import dispatch_model, init_empty_weights

    build = _from_config(job)

    def make() -> Model:
        weight_map = json.loads((job.folder / "model.safetensors.index.json").read_text())["weight_map"]
        index = {
            name: {"safetensors_file": str(job.folder / file), "weight_name": name} for name, file in weight_map.items()
        }
        with init_empty_weights(include_buffers=False):
            model = build().eval()
        made: Model = dispatch_model(model, {"": "disk"}, offload_index=index)
        return made

    return make


def accelerate_dat(job: Job) -> Callable[[], Model]:
    """``accelerate.disk_offload``, which first writes every weight into a file of its own: as much disk again."""
    from accelerate import disk_offload

    def make() -> Model:
        made: Model = disk_offload(_assigned(job, clone=False), job.scratch / "offload")
        return made

    return make


def transformers(job: Job) -> Callable[[], Model]:
    """``from_pretrained`` with everything mapped to the disk."""
    from transformers import AutoModelForCausalLM

    _from_config(job)

    def make() -> Model:
        made: Model = AutoModelForCausalLM.from_pretrained(
            job.folder, device_map={"": "disk"}, offload_folder=job.scratch / "offload", local_files_only=True
        )
        return made.eval()  # type: ignore[attr-defined, no-any-return]

    return make


def airllm(job: Job) -> Callable[[], Model]:
    """AirLLM on the CPU. It wants a file a layer: it links to those of a checkpoint that has them, or writes its own.

    Its class for all models is used as it is, but for the tokenizer, which the checkpoint does not have.
    """
    from airllm import AirLLMBaseModel

    class WithoutTokenizer(AirLLMBaseModel):  # type: ignore[misc]
        def get_tokenizer(self, hf_token: str | None = None) -> None:
            return None

    _from_config(job)
    return partial(WithoutTokenizer, str(job.folder), device="cpu", layer_shards_saving_path=str(job.scratch))


CONTENDERS: dict[str, Callable[[Job], Callable[[], Model]]] = {
    "odewei": odewei,
    "resident": resident,
    "mmap": mapped,
    "accelerate": accelerate,
    "accelerate-dat": accelerate_dat,
    "transformers": transformers,
    "airllm": airllm,
}


def _from_config(job: Job) -> Callable[[], torch.nn.Module]:
    """A function that builds the model as anybody would; the module with its code is imported now."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = json.loads((job.folder / "config.json").read_text())["model_type"]
    importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")

    def build() -> torch.nn.Module:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.folder, local_files_only=True))
        assert isinstance(model, torch.nn.Module)
        return model

    return build


def _assigned(job: Job, *, clone: bool) -> torch.nn.Module:
    """The model with the files' weights assigned, or clones of them. What it was built with is never touched."""
    from safetensors.torch import load_file
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = _from_config(job)()
    missing = set(model.state_dict())
    for file in job.files:
        weights = load_file(file)
        if clone:
            weights = {name: weight.clone() for name, weight in weights.items()}
        model.load_state_dict(weights, strict=False, assign=True)
        missing -= weights.keys()
    if missing:
        raise RuntimeError(f"the checkpoint lacks {', '.join(sorted(missing))}")
    return model.eval()
