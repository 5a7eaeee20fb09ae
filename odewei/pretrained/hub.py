"""From a path or the id of a repository to a folder on this machine.

Knows huggingface_hub, and which files of a repository are worth having. Knows nothing of models.
"""

from __future__ import annotations

import fnmatch
import functools
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odewei.errors import CheckpointError, CheckpointNotFoundError, OptionsError
from odewei.pretrained.nested import settle
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


def locate(
    path: str | os.PathLike[str],
    *,
    revision: str | None,
    local_files_only: bool,
    with_code: bool,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    subfolder: str = "",
    variant: str | None = None,
    marks: Sequence[str] = ("config.json", "adapter_config.json"),
) -> Path:
    """The folder at ``path``, or that of a repository's files in the hub's cache, downloaded where they are missing.

    A folder around the checkpoint's is as good, if it holds one only: the hub's cache of a repository, or any. The
    checkpoint's has one of the files ``marks`` in its ``subfolder``. Raises CheckpointNotFoundError, CheckpointError,
    MissingPackageError, OptionsError.
    """
    if not isinstance(path, str | os.PathLike):
        raise OptionsError(
            f"a checkpoint is named by a path or the id of a repository, not by a {type(path).__name__}",
            cure="Give the path of its folder",
        )
    text = os.fspath(path)
    if os.path.isdir(text):
        return settle(Path(text), revision, subfolder, marks)
    if os.path.exists(text):
        raise CheckpointError(
            "a folder was expected here, with a config.json and weights; this is a file",
            file=text,
            cure="Give its folder, or config= beside the file; for weights alone use "
            "init_on_demand_weights_model(model_fn, path)",
        )
    if isinstance(path, os.PathLike) or not _ID.fullmatch(text) or ".." in text:
        raise CheckpointNotFoundError(
            "there is no such folder", file=text, cure="Check the path; the id of a repository looks like owner/name"
        )
    hub = _Hub(text, revision, token, None if cache_dir is None else os.fspath(cache_dir), force_download)
    wanted = functools.partial(wanted_files, with_code=with_code, subfolder=subfolder, variant=variant)
    return hub.snapshot(wanted, local_files_only=local_files_only)


def wanted_files(
    names: Sequence[str], *, with_code: bool, subfolder: str = "", variant: str | None = None
) -> list[str]:
    """Which files of a repository a model or pipeline needs, in the order of ``names``: texts, and weights.

    Only folders with a configuration count, weights only beside a ``config.json`` or ``adapter_config.json``. There
    pickles are left out where there are safetensors files, variants (``.fp16.``) but the one asked for, files without a
    variant where there are files with it, other programs' files always, code unless ``with_code``. With a ``subfolder``
    only what is in it counts.
    """
    split = [(name, *name.rpartition("/")[::2]) for name in names]
    if subfolder:
        inside = subfolder.strip("/")
        split = [one for one in split if one[1] == inside or one[1].startswith(f"{inside}/")]
    configured = {"", *(folder for _, folder, file in split if file in _CONFIGURATIONS)}
    with_weights = {folder for _, folder, file in split if file in ("config.json", "adapter_config.json")}
    marked = None if variant is None else re.compile(rf"\.{re.escape(variant)}(-\d+-of-\d+)?\.")
    having = {folder for _, folder, file in split if marked is not None and marked.search(file)}

    def is_other(folder: str, file: str) -> bool:
        """Whether these are weights, or an index, of another variant."""
        if marked is not None and marked.search(file):
            return False
        is_weights = file.endswith((".safetensors", ".index.json", *_PICKLES))
        return bool(_VARIANT.search(file)) or (folder in having and is_weights and not file.startswith("adapter_"))

    safe = {folder for _, folder, file in split if file.endswith(".safetensors") and not is_other(folder, file)}
    found = []
    for name, folder, file in split:
        if folder not in configured or is_other(folder, file):
            continue
        is_text = any(fnmatch.fnmatch(file, pattern) for pattern in _TEXTS) or (with_code and file.endswith(".py"))
        is_safe = file.endswith(".safetensors") and not file.startswith("consolidated")
        is_pickle = file.endswith(_PICKLES) and folder not in safe and not file.startswith(_NOT_WEIGHTS)
        if is_text or (folder in with_weights and (is_safe or is_pickle)):
            found.append(name)
    return found


@dataclass(frozen=True, slots=True)
class _Hub:
    """A repository of the hub, and how it is asked for."""

    repository: str
    revision: str | None
    token: str | bool | None
    cache_dir: str | None
    force_download: bool

    def snapshot(self, wanted: Callable[[Sequence[str]], list[str]], *, local_files_only: bool) -> Path:
        """The folder of the repository's files in the cache, after those that are ``wanted`` were downloaded."""
        purpose = f"{self.repository!r} is no folder here; reading it from the hub"
        hub = required("huggingface_hub", extra="hf", purpose=purpose)
        from huggingface_hub import constants

        if not (local_files_only or constants.HF_HUB_OFFLINE):
            try:
                self._download(hub, wanted)
            except CheckpointError:
                raise
            except Exception as error:
                _refuse(self.repository, self.revision, error)
                told = "the hub cannot be reached (%s); %s is looked for in its cache"
                _log.warning(told, _brief(error), self.repository)
        where = {} if self.cache_dir is None else {"cache_dir": self.cache_dir}
        try:
            return Path(hub.snapshot_download(self.repository, revision=self.revision, local_files_only=True, **where))
        except Exception as error:
            why = "nothing is to be downloaded" if local_files_only else "the hub cannot be reached"
            at = "" if self.revision is None else f" at revision {self.revision!r}"
            raise CheckpointNotFoundError(
                f"there is no folder {self.repository!r} here, the repository of that name{at} is not in the cache of "
                f"huggingface_hub, and {why}",
                cure="Check the name, download it where there is a network, or give the path of a folder",
            ) from error

    def _download(self, hub: Any, wanted: Callable[[Sequence[str]], list[str]]) -> None:
        asked = {} if self.token is None else {"token": self.token}
        names = wanted(hub.HfApi().list_repo_files(self.repository, revision=self.revision, **asked))
        if not names:
            raise CheckpointError(f"the repository {self.repository!r} has no configuration and no weights")
        if self.cache_dir is not None:
            asked["cache_dir"] = self.cache_dir
        if self.force_download:
            asked["force_download"] = True
        for number, name in enumerate(names, 1):
            _log.info("%s: file %d of %d: %s", self.repository, number, len(names), name)
            hub.hf_hub_download(self.repository, name, revision=self.revision, **asked)


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
