"""Checkpoints in the layout of Hugging Face: a folder, or the id of a repository, becomes a model that streams.

``from_pretrained`` reads the configuration, picks the class, builds it without weights and gives it a loader that has
the checkpoint's weights under the model's names, converted as transformers converts them. Nothing of transformers,
diffusers or huggingface_hub is imported before one of the functions here is called; ``import odewei`` needs none of
them.

- ``hub``: a path or a repository id -> a folder on this machine
- ``folder``: what is in that folder: configuration, weights
- ``classes``: the class of the model, and whose code that is
- ``naming``, ``tracing``, ``converted``: what transformers makes of the weights -> places in files, or computing
- ``ties``, ``quantisation``, ``transformers_model``, ``diffusers_model``, ``pipelines``: building
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Unpack

import torch
from torch import nn

from odewei.memory_budget import MemoryBudget
from odewei.meta_model import not_of_a_build
from odewei.pretrained.options import StreamOptions, check_options

if TYPE_CHECKING:
    from odewei.pretrained.pipelines import Pipeline

__all__ = ["StreamOptions", "from_pretrained", "stream_pipeline"]


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    model_class: type | None = None,
    config: object = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    **options: Unpack[StreamOptions],
) -> nn.Module:
    """A model of transformers or diffusers whose weights are read from its checkpoint when they are needed.

    It computes the bits of the model that the library's own ``from_pretrained`` gives, with its weights frozen
    (``requires_grad_(False)``), and is in eval mode. Needs the extra ``hf`` (diffusers for its models).

    Args:
        path: a folder with a ``config.json`` and weights, or the id of a repository on the hub, whose files are
            downloaded first, or taken from the hub's cache where they are there.
        model_class: the class to build, or an auto class of transformers. Default: the first of the configuration's
            ``architectures`` (of diffusers: ``_class_name``).
        config: the configuration to build it with, in place of the folder's.
        dtype: of the floating weights; "auto" is what the library does by itself: transformers takes the
            configuration's, else the first weight's; diffusers takes float32.
        revision: a branch, tag or commit of the repository.
        local_files_only: download nothing.
        trust_remote_code: run Python code that comes with the checkpoint. Without it, such code is refused.
        **options: the keywords of ``init_on_demand_weights_model``.

    Raises:
        OptionsError: a keyword is unknown or cannot work.
        CheckpointNotFoundError: there is no such folder or repository, or it is not in the cache and may not be
            downloaded.
        UnsafeCheckpointError: it needs code of its own.
        MissingPackageError: a package is missing; the message names the extra or the package.
        CheckpointError: the folder is no checkpoint, of an unknown architecture, or its weights do not fit the model.
    """
    check_options(dict(options))
    from odewei.pretrained.build import build_pretrained
    from odewei.pretrained.hub import locate

    with not_of_a_build():
        folder = locate(path, revision=revision, local_files_only=local_files_only, with_code=trust_remote_code)
        return build_pretrained(
            folder, model_class=model_class, config=config, dtype=dtype, trusts_code=trust_remote_code, options=options
        )


def stream_pipeline(
    path_or_pipeline: str | os.PathLike[str] | Pipeline,
    *,
    folder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    **options: Unpack[StreamOptions],
) -> Pipeline:
    """A pipeline of diffusers all of whose models stream, under one ``memory_budget`` and with one history.

    ``path_or_pipeline`` is a folder with a ``model_index.json``, or the id of such a repository, or a pipeline that was
    built already: its models are then replaced by streamed ones, read from ``folder`` (default: the folder that it was
    loaded from). What is no model (tokenizers, schedulers) is loaded as usual. Other keywords and errors are those of
    ``from_pretrained``. ``odewei.close`` the parts, or drop the pipeline.
    """
    check_options(dict(options))
    from odewei.pretrained.pipelines import stream_folder, stream_parts

    budget = options.get("memory_budget", "auto")
    if not isinstance(budget, MemoryBudget):
        readers, host = options.get("num_readers", 4), options.get("host_budget", "auto")
        budget = MemoryBudget(budget, num_readers=readers, host_budget=host)
    shared = options.copy()
    shared.pop("host_budget", None)
    shared["memory_budget"] = budget
    if not isinstance(path_or_pipeline, str | os.PathLike):
        return stream_parts(path_or_pipeline, folder, dtype=dtype, trusts_code=trust_remote_code, options=shared)
    from odewei.pretrained.hub import locate

    place = locate(path_or_pipeline, revision=revision, local_files_only=local_files_only, with_code=trust_remote_code)
    return stream_folder(place, dtype=dtype, trusts_code=trust_remote_code, options=shared)
