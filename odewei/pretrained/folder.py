"""What is in the folder of a checkpoint: its configuration as a dictionary, and its weights as a loader.

Knows the names of files, in the order in which transformers and diffusers look for them, and what they do not look for:
shards whose index is lost. Knows nothing of models.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from odewei.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, UnsafeCheckpointError
from odewei.loaders import ShardedWeightsLoader, WeightsLoader, open_checkpoint
from odewei.loaders.sums import Verify
from odewei.pretrained.joined import JoinedLoader

__all__ = ["Weights", "custom_code_refused", "names_of", "open_weights", "read_json"]

_log = logging.getLogger("odewei")
_SAFE, _PICKLE = ".safetensors", ".bin"
_INDEX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>(\.[^.]+)?\.(safetensors|bin))")
_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a folder: how to read them, and the files they are in, in the order in which transformers takes
    them. ``metadata`` is that of an index, None where the weights are in one file.
    """

    loader: WeightsLoader
    files: tuple[Path, ...]
    metadata: Mapping[str, object] | None


def names_of(library: str, variant: str | None, use_safetensors: bool | None) -> tuple[str, ...]:
    """The names under which transformers or diffusers looks for weights, in its order.

    ``use_safetensors``: True: no pickles; False: nothing but pickles; None: pickles where there is nothing else.
    """
    if library == "transformers":
        safe = [f"model{_SAFE}", f"model{_SAFE}{_INDEX}"]
        pickles = [f"pytorch_model{_PICKLE}", f"pytorch_model{_PICKLE}{_INDEX}"]
    else:
        stem = "diffusion_pytorch_model"
        safe = [f"{stem}{_SAFE}{_INDEX}", f"{stem}{_SAFE}"]
        pickles = [f"{stem}{_PICKLE}{_INDEX}", f"{stem}{_PICKLE}"]
        if use_safetensors is None:
            pickles.reverse()  # diffusers itself takes the index only where pickles are asked for
        if variant is not None:
            safe.insert(1, f"{stem}{_SAFE}.{variant}{_INDEX}")  # as older versions wrote it: no variant is added
    names = [*(safe if use_safetensors is not False else ()), *(pickles if not use_safetensors else ())]
    if variant is None:
        return tuple(names)
    return tuple(name if f".{variant}." in name else _of_variant(name, variant) for name in names)


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises CheckpointNotFoundError, CorruptCheckpointError."""
    _check_is_there(path)
    try:
        text = path.read_text(encoding="utf-8")
        _check_is_no_pointer(path)
        if not text.strip() or text.lstrip().startswith("<"):
            what = "an HTML page, such as one that asks to log in" if text.strip() else "empty"
            raise CorruptCheckpointError(
                f"the file is {what}, and no JSON", file=str(path), cure="Download it again, from where the files are"
            )
        found: object = json.loads(text)
    except FileNotFoundError as error:
        others = _entries(path.parent)
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
    folder: Path, names: Sequence[str], explicit: object = None, *, verify: Verify = "size", variant: str | None = None
) -> Weights:
    """The weights in the first of ``names`` that is in the folder, or in the file that the configuration names, or in
    the only complete set of shards.

    Raises CheckpointNotFoundError, UnsafeCheckpointError for a name outside of the folder, CheckpointError.
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
        _check_is_there(folder / name)
        if (folder / name).is_file():
            return _opened(folder / name, verify)
    if explicit is None and (shards := _shards_without_index(folder, names, variant)):
        _log.warning("%s has no index: its %d shards are read as one checkpoint", folder, len(shards))
        for shard in shards:
            _check_is_no_pointer(shard)
        return Weights(JoinedLoader([open_checkpoint(shard, verify=verify) for shard in shards]), tuple(shards), {})
    found = _entries(folder)
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


def _opened(path: Path, verify: Verify) -> Weights:
    _check_is_no_pointer(path)
    if not path.name.endswith(".json"):
        return Weights(open_checkpoint(path, verify=verify), (path,), None)
    loader = ShardedWeightsLoader(path, path.parent, verify=verify)  # names of shards are checked there
    index = read_json(path)
    mapped, metadata = index["weight_map"], index.get("metadata")
    assert isinstance(mapped, dict)
    files = tuple(path.parent / name for name in sorted(set(mapped.values())))
    for file in files:
        _check_is_no_pointer(file)
    return Weights(loader, files, metadata if isinstance(metadata, dict) else {})


def _shards_without_index(folder: Path, names: Sequence[str], variant: str | None) -> list[Path]:
    """The shards of the folder's only checkpoint in several files, in their order; nothing if there is none.

    Raises CheckpointError where one is incomplete, or several could be meant.
    """
    kinds = {kind for kind in (_SAFE, _PICKLE) if any(kind in name for name in names)}
    sets: dict[tuple[str, str, str], dict[int, Path]] = {}
    for name in _entries(folder):
        match = _SHARD.fullmatch(name)
        if (
            match is None
            or Path(name).suffix not in kinds
            or match["stem"].startswith(("adapter_model", "consolidated"))
        ):
            continue
        marks = f"{match['stem']}{match['rest']}".split(".")
        if (variant is None and len(marks) == 2) or (variant is not None and variant in marks[1:-1]):
            sets.setdefault((match["stem"], match["count"], match["rest"]), {})[int(match["number"])] = folder / name
    if _SAFE in kinds and any(Path(rest).suffix == _SAFE for _, _, rest in sets):
        sets = {key: one for key, one in sets.items() if Path(key[2]).suffix == _SAFE}
    if len(sets) > 1:
        told = ", ".join(sorted(f"{stem}-*-of-{count}{rest}" for stem, count, rest in sets))
        raise CheckpointError(
            f"the folder has no index, and shards of {len(sets)} checkpoints: {told}",
            file=str(folder),
            cure="Keep those of one of them in the folder, or add the index of the right one",
        )
    for (stem, count, rest), shards in sets.items():
        lacking = [number for number in range(1, int(count) + 1) if number not in shards]
        if lacking:
            raise CheckpointNotFoundError(
                f"the folder has no index, and of {int(count)} shards it lacks {len(lacking)}: "
                f"{stem}-{lacking[0]:05d}-of-{count}{rest}" + ", ..." * (len(lacking) > 1),
                file=str(folder),
                cure="Download the missing shards",
            )
        return [shards[number] for number in sorted(shards)]
    return []


def _check_is_there(path: Path) -> None:
    """Raise CheckpointNotFoundError for a link to a file that is not there, as an interrupted download or a part of a
    copied cache leaves it.
    """
    if path.is_symlink() and not path.exists():
        raise CheckpointNotFoundError(
            f"the file is a link to {str(path.readlink())!r}, which is not there",
            file=str(path),
            cure="Download the file again; of the hub's cache copy the folder blobs too",
        )


def _check_is_no_pointer(path: Path) -> None:
    """Raise CheckpointError for the small text that git puts in the place of a large file."""
    try:
        with path.open("rb") as file:
            begins = file.read(len(_POINTER))
    except OSError:
        return  # whoever opens it for its contents says so better
    if begins == _POINTER:
        raise CheckpointError(
            "this is no file of weights but a pointer of Git LFS, which stands for one that was not downloaded",
            file=str(path),
            cure="Run git lfs install and git lfs pull in its folder, or download the file itself",
        )


def _of_variant(name: str, variant: str) -> str:
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}"


def _entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _cure(names: Sequence[str]) -> str:
    if "model_index.json" in names:
        return (
            'It is a pipeline of diffusers: use odewei.stream_pipeline, or subfolder="unet", say, for one of its models'
        )
    if "adapter_config.json" in names:
        return "It is an adapter without its model: put the model's config.json and weights beside it"
    if any(name.endswith(".gguf") for name in names):
        return "For a GGUF file use init_on_demand_weights_model(model_fn, GgufLoader(path))"
    variants = [match[1] for name in names if (match := re.search(r"\.(fp16|bf16|fp32|non_ema|ema)[.-]", name))]
    if variants:
        return f"It has a variant only: say variant={variants[0]!r}"
    single = [name for name in names if name.endswith((_SAFE, _PICKLE)) and not name.startswith("adapter_model")]
    if len(single) == 1 and "config.json" in names:
        return f"If {single[0]} holds the weights, name that file, and say config= with this folder"
    return "Name the folder of a checkpoint, or download it again"


def _brief(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6]) or "nothing"
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown
