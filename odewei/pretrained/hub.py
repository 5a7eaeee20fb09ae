"""From a path or the id of a repository to a folder on this machine.

Knows huggingface_hub, and which files of a repository are worth having. Knows nothing of models.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from odewei.errors import CheckpointError, CheckpointNotFoundError, OptionsError
from odewei.pretrained.options import required

__all__ = ["locate", "wanted_files"]

_log = logging.getLogger("odewei")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_PICKLES = (".bin", ".pt", ".pth")
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")
_CONFIGURATIONS = frozenset(
    {
        "config.json",
        "model_index.json",
        "preprocessor_config.json",
        "scheduler_config.json",
        "tokenizer_config.json",
    }
)
_VARIANT = re.compile(r"\.(fp16|bf16|non_ema|ema)(-\d+-of-\d+)?\.")


def locate(path: str | os.PathLike[str], *, revision: str | None, local_files_only: bool, with_code: bool) -> Path:
    """The folder at ``path``, or that of a repository's files in the hub's cache, downloaded where they are missing.

    Raises CheckpointNotFoundError, CheckpointError, MissingPackageError, OptionsError.
    """
    if not isinstance(path, str | os.PathLike):
        raise OptionsError(
            f"a checkpoint is named by a path or the id of a repository, not by a {type(path).__name__}",
            cure="Give the path of its folder",
        )
    text = os.fspath(path)
    if os.path.isdir(text):
        return Path(text)
    if os.path.exists(text):
        raise CheckpointError(
            "a folder was expected here, with a config.json and weights; this is a file",
            file=text,
            cure="Give its folder; for weights alone use init_on_demand_weights_model(model_fn, path)",
        )
    if isinstance(path, os.PathLike) or not _ID.fullmatch(text) or ".." in text:
        raise CheckpointNotFoundError(
            "there is no such folder", file=text, cure="Check the path; the id of a repository looks like owner/name"
        )
    return _snapshot(text, revision, local_files_only=local_files_only, with_code=with_code)


def wanted_files(names: Sequence[str], *, with_code: bool) -> list[str]:
    """Which files of a repository a model or pipeline needs, in the order of ``names``: texts, and weights.

    Only folders with a configuration count, weights only beside a ``config.json``. There pickles are left out where
    there are safetensors files, variants (``.fp16.``) and other programs' files always, code unless ``with_code``.
    """
    split = [(name, *name.rpartition("/")[::2]) for name in names]
    configured = {"", *(folder for _, folder, file in split if file in _CONFIGURATIONS)}
    with_weights = {folder for _, folder, file in split if file == "config.json"}
    safe = {folder for _, folder, file in split if file.endswith(".safetensors") and not _VARIANT.search(file)}
    found = []
    for name, folder, file in split:
        if folder not in configured or _VARIANT.search(file):
            continue
        is_text = any(fnmatch.fnmatch(file, pattern) for pattern in _TEXTS) or (with_code and file.endswith(".py"))
        is_safe = file.endswith(".safetensors") and not file.startswith("consolidated")
        is_pickle = file.endswith(_PICKLES) and folder not in safe and not file.startswith(_NOT_WEIGHTS)
        if is_text or (folder in with_weights and (is_safe or is_pickle)):
            found.append(name)
    return found


def _snapshot(repository: str, revision: str | None, *, local_files_only: bool, with_code: bool) -> Path:
    hub = required("huggingface_hub", extra="hf", purpose=f"{repository!r} is no folder here; reading it from the hub")
    from huggingface_hub import constants

    offline = local_files_only or constants.HF_HUB_OFFLINE
    if not offline:
        try:
            names = hub.HfApi().list_repo_files(repository, revision=revision)
            wanted = wanted_files(names, with_code=with_code)
            if not wanted:
                raise CheckpointError(f"the repository {repository!r} has no configuration and no weights")
            for number, name in enumerate(wanted, 1):
                _log.info("%s: file %d of %d: %s", repository, number, len(wanted), name)
                hub.hf_hub_download(repository, name, revision=revision)
        except CheckpointError:
            raise
        except Exception as error:
            _refuse(repository, revision, error)
            _log.warning("the hub cannot be reached (%s); %s is looked for in its cache", _brief(error), repository)
            offline = True
    try:
        return Path(hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except Exception as error:
        why = "nothing is to be downloaded" if local_files_only else "the hub cannot be reached"
        at = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointNotFoundError(
            f"there is no folder {repository!r} here, the repository of that name{at} is not in the cache of "
            f"huggingface_hub, and {why}",
            cure="Check the name, download it where there is a network, or give the path of a folder",
        ) from error


def _refuse(repository: str, revision: str | None, error: Exception) -> None:
    """Raise what the hub said, in one line, unless it is that it cannot be reached."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        raise CheckpointNotFoundError(
            f"the repository {repository!r} is gated: its owner asks for consent first",
            cure="Agree on its page, then log in (hf auth login) or set HF_TOKEN",
        ) from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise CheckpointNotFoundError(
            f"there is neither a folder nor a repository {repository!r}, or it is private",
            cure="Check the name; for a private one log in (hf auth login) or set HF_TOKEN",
        ) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise CheckpointNotFoundError(
            f"the repository {repository!r} has no revision {revision!r}", cure="Give a branch, a tag or a commit"
        ) from error
    if isinstance(error, errors.HFValidationError):
        raise CheckpointNotFoundError(
            f"there is no folder {repository!r}, and it is no id of a repository", cure="Check the path"
        ) from error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        raise CheckpointNotFoundError(
            f"the hub does not let this user read {repository!r} (status {status})",
            cure="Log in (hf auth login) or set HF_TOKEN",
        ) from error


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
