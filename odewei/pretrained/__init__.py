"""Checkpoints in the layout of Hugging Face: a folder, or the id of a repository, becomes a model that streams.

``from_pretrained`` reads the configuration, picks the class, builds it without weights and gives it a loader that has
the checkpoint's weights under the model's names, converted as transformers converts them. Nothing of transformers,
diffusers or huggingface_hub is imported before one of the functions here is called; ``import odewei`` needs none of
them.

- ``options``: the keywords: streamed, honoured, or refused
- ``hub``, ``nested``: a path or a repository id -> a folder on this machine
- ``folder``, ``joined``: what is in that folder: configuration, weights
- ``classes``, ``dtypes``: the class of the model, whose code that is, and its dtype
- ``naming``, ``tracing``, ``converted``, ``single_file``: what the libraries make of the weights -> places in files, or
  computing
- ``ties``, ``missing``, ``quantisation``, ``adapters``, ``build``, ``transformers_model``, ``diffusers_model``,
  ``pipelines``: building
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

import torch
from torch import nn

from odewei.errors import OptionsError
from odewei.memory_budget import MemoryBudget
from odewei.meta_model import not_of_a_build
from odewei.pretrained.options import PipelineOptions, PretrainedOptions, StreamOptions, asked_for

if TYPE_CHECKING:
    from odewei.pretrained.pipelines import Pipeline

__all__ = ["PipelineOptions", "PretrainedOptions", "StreamOptions", "from_pretrained", "stream_pipeline"]


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    model_class: type | None = None,
    config: object = None,
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    **options: Unpack[PretrainedOptions],
) -> nn.Module:
    """A model of transformers or diffusers whose weights are read from its checkpoint when they are needed.

    It computes the bits of the model that the library's own ``from_pretrained`` gives, and is in eval mode. Every
    keyword that the library takes is honoured, or refused by its name with what to do instead. Needs the extra ``hf``
    (diffusers for its models).

    Args:
        path: a folder with a ``config.json`` and weights, or the id of a repository on the hub, whose files are
            downloaded first, or taken from the hub's cache where they are there. A folder around one such folder is as
            good, the hub's cache of a repository too. Where the folder has an adapter (``adapter_config.json``), it is
            put on the model beside it, or on the one that it names. A file of weights, with ``config``: of diffusers
            (``model_class``) also in the form of the program that it was made for.
        model_class: the class to build, or an auto class of transformers. Default: the first of the configuration's
            ``architectures`` (of diffusers: ``_class_name``).
        config: the configuration to build it with, in place of the folder's: an object, what a config.json holds, or
            its path.
        dtype: of the floating weights; "auto" is what the library does by itself: transformers takes the
            configuration's, else the first weight's; diffusers takes float32.
        revision: a branch, tag or commit of the repository.
        local_files_only: download nothing.
        trust_remote_code: run Python code that comes with the checkpoint. Without it, such code is refused.
        **options: the keywords of ``init_on_demand_weights_model``; those of the library's own ``from_pretrained``
            (``variant``, ``subfolder``, ``use_safetensors``, ``key_mapping``, ``ignore_mismatched_sizes``, ``token``,
            ``cache_dir``, ...); and values of the configuration (``attn_implementation``, ``num_labels``, ...).

    Raises:
        OptionsError: a keyword is unknown, not done for a streamed model, or cannot work.
        CheckpointNotFoundError: there is no such folder or repository, or it is not in the cache and may not be
            downloaded.
        UnsafeCheckpointError: it needs code of its own.
        MissingPackageError: a package is missing; the message names the extra or the package.
        CheckpointError: the folder is no checkpoint, of an unknown architecture, or its weights do not fit the model.
    """
    asked = asked_for(
        options,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        model_class=model_class,
        config=config,
        revision=revision,
        local_files_only=local_files_only,
    )
    from odewei.pretrained.build import load_pretrained

    with not_of_a_build():
        return load_pretrained(path, asked)


def stream_pipeline(
    path_or_pipeline: str | os.PathLike[str] | Pipeline,
    *,
    folder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    **options: Unpack[PipelineOptions],
) -> Pipeline:
    """A pipeline of diffusers all of whose models stream, under one ``memory_budget`` and with one history.

    ``path_or_pipeline`` is a folder with a ``model_index.json``, or the id of such a repository, or a pipeline that was
    built already: its models are then replaced by streamed ones, read from ``folder`` (default: the folder that it was
    loaded from). What is no model (tokenizers, schedulers) is loaded as usual. Parts that are given by their names
    (``vae=...``) are taken as they are, and parts given as None are left out. ``dtype`` may be one for each part by its
    name, and "default" for the others. Other keywords and errors are those of ``from_pretrained``. ``odewei.close`` the
    parts, or drop the pipeline.
    """
    asked = asked_for(
        options, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision, local_files_only=local_files_only
    )
    from odewei.pretrained.pipelines import stream_folder, stream_parts

    budget = asked.stream.get("memory_budget", "auto")
    if not isinstance(budget, MemoryBudget):
        readers, host = asked.stream.get("num_readers", 4), asked.stream.get("host_budget", "auto")
        budget = MemoryBudget(budget, num_readers=readers, host_budget=host)
    shared = asked.stream.copy()
    shared.pop("host_budget", None)
    shared["memory_budget"] = budget
    asked = replace(asked, stream=shared)
    if not isinstance(path_or_pipeline, str | os.PathLike):
        return stream_parts(path_or_pipeline, folder, asked)
    if folder is not None:
        raise OptionsError("folder= beside a path", cure="Give one of them; folder= is for a pipeline that was built")
    return stream_folder(path_or_pipeline, asked)
