"""What is in the folder of a checkpoint: its configuration as a dictionary, and its weights as a loader.

Knows the names of files, in the order in which transformers and diffusers look for them. Knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from odewei.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, UnsafeCheckpointError
from odewei.loaders import WeightsLoader, open_checkpoint
from odewei.loaders.sums import Verify

__all__ = ["DIFFUSERS_WEIGHTS", "TRANSFORMERS_WEIGHTS", "custom_code_refused", "open_weights", "read_json"]

TRANSFORMERS_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
DIFFUSERS_WEIGHTS = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises CheckpointNotFoundError, CorruptCheckpointError."""
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        others = sorted(entry.name for entry in path.parent.iterdir())
        raise CheckpointNotFoundError(
            f"the folder is no checkpoint in the layout of Hugging Face: it has no {path.name}, but {_brief(others)}",
            file=str(path.parent),
            cure=_cure(others),
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"the file is not readable as JSON: {error}", file=str(path), cure="Download it again"
        ) from error
    if not isinstance(found, dict):
        raise CorruptCheckpointError("the file holds no JSON object", file=str(path), cure="Download it again")
    return found


def open_weights(
    folder: Path, names: Sequence[str], explicit: object = None, *, verify: Verify = "size"
) -> WeightsLoader:
    """The loader of the first of ``names`` that is in the folder, or of the file that the configuration names.

    Raises CheckpointNotFoundError, UnsafeCheckpointError for a name outside of the folder.
    """
    if explicit is not None:
        if not isinstance(explicit, str) or Path(explicit).is_absolute() or ".." in Path(explicit).parts:
            raise UnsafeCheckpointError(
                f"the configuration names weights outside of its folder: {explicit!r}",
                file=str(folder),
                cure="Put the weights into the folder, and their name into config.json",
            )
        names = (explicit,)
    for name in names:
        if (folder / name).is_file():
            return open_checkpoint(folder / name, verify=verify)
    found = sorted(entry.name for entry in folder.iterdir())
    raise CheckpointNotFoundError(
        f"the folder has a configuration but no weights: looked for {', '.join(names)}; there are {_brief(found)}",
        file=str(folder),
        cure=_cure(found),
    )


def custom_code_refused(config: Mapping[str, object], folder: Path, what: str) -> CheckpointError:
    """The error for what only code that comes with the checkpoint can build."""
    return UnsafeCheckpointError(
        f"{what} is not part of the library: the checkpoint brings its own Python code ({config.get('auto_map')})",
        file=str(folder / "config.json"),
        cure="Read that code, and pass trust_remote_code=True if you want it to be run",
    )


def _cure(names: Sequence[str]) -> str:
    if "model_index.json" in names:
        return "It is a pipeline of diffusers: use odewei.stream_pipeline"
    if "adapter_config.json" in names:
        return "It is an adapter: stream the model it was made for, and add it with peft"
    if any(name.endswith(".gguf") for name in names):
        return "For a GGUF file use init_on_demand_weights_model(model_fn, GgufLoader(path))"
    variants = [name for name in names if ".fp16." in name or ".bf16." in name]
    if variants:
        return f"It has a variant only: copy {variants[0]} to the name without it"
    return "Name the folder of a checkpoint, or download it again"


def _brief(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6]) or "nothing"
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown
