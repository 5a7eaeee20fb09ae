"""The keywords of ``from_pretrained`` and ``stream_pipeline``, and packages that may be missing.

Every keyword that transformers or diffusers takes is one of three: *streamed* (of ``init_on_demand_weights_model``),
*honoured* here, or *refused* by its name with what to do instead. What is left overrides the configuration, and is
judged by whoever has read it. Knows names; what may be said for the streamed ones is ``odewei.options``'s to judge.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypedDict, cast

import torch

from odewei.errors import MissingPackageError, OptionsError
from odewei.loaders.sums import Verify, as_verify
from odewei.memory_budget import MemoryBudget
from odewei.options import Granularity, Options

__all__ = [
    "Asked",
    "FileOptions",
    "PipelineOptions",
    "PretrainedOptions",
    "StreamOptions",
    "asked_for",
    "check_options",
    "one_dtype",
    "required",
]

_SIMILAR = 0.84  # so alike is a name mistyped, not one of a configuration


class StreamOptions(TypedDict, total=False):
    """The keywords of ``init_on_demand_weights_model``, without ``dtype``, which is the model's here."""

    prefetch_depth: int | str
    memory_budget: int | str | MemoryBudget
    host_budget: int | str
    device: torch.device | str | None
    granularity: Granularity
    io: str
    num_readers: int
    enable_preloading: bool
    on_missing: str
    verify: Verify


class FileOptions(StreamOptions, total=False):
    """And which files are read. ``torch_dtype`` is another name for ``dtype``; the last three are for the hub."""

    torch_dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None
    variant: str | None
    use_safetensors: bool | None
    low_cpu_mem_usage: bool | None
    weights_only: bool
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    force_download: bool


class PretrainedOptions(FileOptions, total=False):
    """And what the model is made of. Others of the configuration's values may be given by their names too."""

    subfolder: str
    ignore_mismatched_sizes: bool
    key_mapping: Mapping[str, str] | None
    generation_config: object
    adapter_name: str
    attn_implementation: str | Mapping[str, str] | None
    experts_implementation: str | Mapping[str, str] | None
    num_labels: int
    id2label: Mapping[int, str]
    label2id: Mapping[str, int]
    problem_type: str | None
    output_hidden_states: bool
    output_attentions: bool
    return_dict: bool
    use_cache: bool


class PipelineOptions(FileOptions, total=False):
    """And parts of the pipeline, which take the place of the folder's; None leaves a part out."""

    scheduler: object
    safety_checker: object
    feature_extractor: object
    image_encoder: object
    tokenizer: object
    tokenizer_2: object
    tokenizer_3: object
    text_encoder: object
    text_encoder_2: object
    text_encoder_3: object
    transformer: object
    unet: object
    vae: object
    requires_safety_checker: bool


_HONOURED = (*FileOptions.__annotations__, "subfolder", "ignore_mismatched_sizes", "key_mapping", "generation_config",
             "adapter_name")  # fmt: skip
_NAMED = ("model_class", "config", "dtype", "revision", "local_files_only", "trust_remote_code")
_PLACES = "leave it out: odewei places the weights; say device= for the device and memory_budget= for its memory"
_ONE_PROCESS = "leave it out: a streamed model runs in one process, on one device"
_KERNELS = "leave it out: the model computes with the kernels of torch"
_NO_EFFECT = "leave it out: it has no effect in transformers 5 either"
_REFUSED: Mapping[str, str] = {
    "device_map": _PLACES,
    "max_memory": _PLACES,
    "offload_folder": _PLACES,
    "offload_buffers": _PLACES,
    "offload_state_dict": _PLACES,
    "state_dict": "use init_on_demand_weights_model(model_fn, state_dict)",
    "gguf_file": "use init_on_demand_weights_model(model_fn, GgufLoader(path))",
    "quantization_config": "leave it out, and name a checkpoint that is quantised already: weights are streamed as "
    "they are stored",
    "output_loading_info": "leave it out: what is missing is an error, and what is left over is in the log 'odewei'",
    "proxies": "set the environment's HTTPS_PROXY",
    "tqdm_class": "leave it out: progress is in the log 'odewei'",
    "adapter_kwargs": "call model.load_adapter(path, adapter_kwargs=...) on the streamed model",
    "disable_mmap": "leave it out: weights are read, not mapped; say io='direct' to read past the page cache",
    "code_revision": "give revision=: code and weights are of one revision",
    "use_auth_token": "give token=",
    "resume_download": "leave it out: downloads are always resumed",
    "original_config": "give config=, in the form of diffusers",
    "from_tf": "convert the checkpoint to safetensors first",
    "from_flax": "convert the checkpoint to safetensors first",
    "use_flashpack": "use the safetensors files",
    "flashpack_kwargs": "use the safetensors files",
    "use_onnx": "leave it out: ONNX programs are not streamed",
    "provider": "leave it out: ONNX programs are not streamed",
    "provider_options": "leave it out: ONNX programs are not streamed",
    "sess_options": "leave it out: ONNX programs are not streamed",
    "custom_pipeline": "build that pipeline with its class from the parts of a streamed one",
    "custom_revision": "build that pipeline with its class from the parts of a streamed one",
    "load_connected_pipeline": "stream each of the pipelines by its own path",
    "distributed_config": _ONE_PROCESS,
    "parallel_config": _ONE_PROCESS,
    "device_mesh": _ONE_PROCESS,
    "tp_plan": _ONE_PROCESS,
    "tp_size": _ONE_PROCESS,
    "use_kernels": _KERNELS,
    "kernel_config": _KERNELS,
    "allow_all_kernels": _KERNELS,
    "fusion_config": "leave it out: fused modules are not built",
    "mirror": _NO_EFFECT,
    "_fast_init": _NO_EFFECT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be loaded, checked as far as that can be without reading anything. ``dtype`` None stands for "auto".

    ``overrides`` are values of the configuration, or parts of a pipeline, by name.
    """

    model_class: type | None = None
    config: object = None
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None
    revision: str | None = None
    local_files_only: bool = False
    trusts_code: bool = False
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    force_download: bool = False
    subfolder: str = ""
    variant: str | None = None
    use_safetensors: bool | None = None
    ignore_mismatched_sizes: bool = False
    key_mapping: Mapping[str, str] | None = None
    generation_config: Any = None
    adapter_name: str = "default"
    overrides: Mapping[str, object] = field(default_factory=dict)
    stream: StreamOptions = field(default_factory=lambda: StreamOptions())


def asked_for(options: Mapping[str, object], *, dtype: object, trust_remote_code: bool, **named: Any) -> Asked:
    """The keywords, sorted. Raises OptionsError for what is refused and what cannot work."""
    _refuse_what_is_not_done(options)
    stream = {name: value for name, value in options.items() if name in StreamOptions.__annotations__}
    check_options(stream)
    honoured = {name: options[name] for name in _HONOURED if name in options and name not in stream}
    for name in ("low_cpu_mem_usage", "weights_only"):
        honoured.pop(name, None)  # what they ask for is always so
    overrides = {name: value for name, value in options.items() if name not in stream and name not in _HONOURED}
    _refuse_what_is_mistyped(overrides)
    other = honoured.pop("torch_dtype", None)
    if other is not None:
        if dtype not in (None, "auto", other):
            raise OptionsError(
                f"dtype={dtype!r} and torch_dtype={other!r} are two names of one thing", cure="Give dtype= only"
            )
        dtype = other
    subfolder, variant = honoured.get("subfolder") or "", honoured.get("variant")
    for name, value in (("subfolder", subfolder), ("variant", variant or "")):
        if not isinstance(value, str) or os.path.isabs(value) or ".." in value.replace("\\", "/").split("/"):
            raise OptionsError(f"{name}={value!r} is no name within the checkpoint's folder")
    honoured["subfolder"] = subfolder
    return Asked(
        dtype=_dtype(dtype),
        trusts_code=trust_remote_code,
        overrides=overrides,
        stream=cast("StreamOptions", stream),
        **named,
        **cast("dict[str, Any]", honoured),
    )


def _refuse_what_is_not_done(options: Mapping[str, object]) -> None:
    """Raise OptionsError for a keyword of transformers or diffusers that asks for what is not done here. One that asks
    for nothing (None, False) may stay.
    """
    for name, value in options.items():
        if name in _REFUSED and value is not None and value is not False:
            raise OptionsError(f"{name}={value!r} is not done for a streamed model", cure=_capital(_REFUSED[name]))
    if options.get("weights_only", True) is not True:
        raise OptionsError(
            "weights_only=False asks to run what is in a pickle, which odewei never does",
            cure="Leave it out; load such a file where you trust it, and save its weights as safetensors",
        )
    if options.get("low_cpu_mem_usage") is False:
        raise OptionsError(
            "low_cpu_mem_usage=False asks for all weights in memory", cure="Leave it out, or odewei.materialize(model)"
        )


def _refuse_what_is_mistyped(overrides: dict[str, object]) -> None:
    for name in list(overrides):
        if name in _REFUSED:
            del overrides[name]  # it asked for nothing
            continue
        known = (*StreamOptions.__annotations__, *_NAMED, *_HONOURED)
        similar = difflib.get_close_matches(name, known, 1, _SIMILAR)
        if similar or name.startswith("_"):
            raise OptionsError(
                f"there is no option {name!r}",
                cure=f"Did you mean {similar[0]!r}? The options are {', '.join(known)}" if similar else "Leave it out",
            )


def _dtype(dtype: object) -> torch.dtype | Mapping[str, torch.dtype] | None:
    """The dtype that was asked for, or several by name; None: what the library does by itself."""
    if isinstance(dtype, Mapping):
        return {str(name): found for name, one in dtype.items() if (found := one_dtype(one)) is not None}
    return one_dtype(dtype)


def one_dtype(dtype: object) -> torch.dtype | None:
    """The dtype of that name; None for "auto". Raises OptionsError."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise OptionsError(
            f"dtype={dtype!r} is no floating dtype of at least 16 bits", cure='Use "auto", or torch.bfloat16, say'
        )
    return found


def check_options(options: Mapping[str, object]) -> None:
    """Raise what ``init_on_demand_weights_model`` would raise for these keywords, before anything is downloaded or
    read; OptionsError for a keyword that there is not.
    """
    known = (*StreamOptions.__annotations__, *_NAMED)
    for name in options:
        if name not in StreamOptions.__annotations__:
            similar = difflib.get_close_matches(name, known, 1)
            meant = f"Did you mean {similar[0]!r}? The" if similar else "The"
            raise OptionsError(f"there is no option {name!r}", cure=f"{meant} options are {', '.join(known)}")
    from odewei.torch import init_on_demand_weights_model

    defaults = inspect.signature(init_on_demand_weights_model).parameters
    values: dict[str, Any] = {name: defaults[name].default for name in (*StreamOptions.__annotations__, "dtype")}
    as_verify({**values, **options}["verify"])
    Options.check(**{name: value for name, value in {**values, **options}.items() if name != "verify"})


def required(package: str, *, extra: str | None, purpose: str) -> ModuleType:
    """The package, imported. Raises MissingPackageError, which names ``extra`` if one of odewei's extras has it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        install = f'"odewei[{extra}]"' if extra else package
        raise MissingPackageError(
            f"{purpose} needs the package {package!r}, which is not installed", cure=f"pip install {install}"
        ) from error


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
