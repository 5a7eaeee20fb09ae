"""Text from a streamed model of transformers: what ``odewei run`` does.

Knows tokenizers, generate() and the report. Knows nothing of terminals: text and progress go to functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from odewei.errors import CheckpointError, ModelError, OptionsError
from odewei.pretrained.build import build_pretrained, placed
from odewei.pretrained.options import StreamOptions, asked_for, required
from odewei.runtime import Runtime, runtime_of

__all__ = ["Progress", "Prompt", "generate_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """``chat``: format it as the user's message, by the tokenizer's template. ``sample``: draw tokens, from ``seed``;
    None leaves that to the folder's generation settings.
    """

    text: str
    max_new_tokens: int = 128
    chat: bool = False
    sample: bool | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where generating is. Seconds are of the clock, from the prompt on; bytes are of weights."""

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float | None
    seconds: float
    resident_bytes: int
    peak_bytes: int
    budget_bytes: int
    weight_bytes: int
    bytes_read: int

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first, which comes with reading the prompt; None before there are two."""
        if self.first_token_seconds is None or self.new_tokens < 2:
            return None
        return (self.new_tokens - 1) / max(self.seconds - self.first_token_seconds, 1e-9)


def generate_text(
    folder: Path,
    prompt: Prompt,
    *,
    on_text: Callable[[str], None],
    on_progress: Callable[[Progress], None],
    dtype: torch.dtype | str = "auto",
    trusts_code: bool = False,
    options: StreamOptions,
) -> tuple[str, Progress]:
    """Stream the model in the folder and have it continue the prompt. Returns the text and the last progress.

    ``on_text`` gets pieces of the text as soon as they are sure, ``on_progress`` is called after each token; both in
    this thread. Raises OptionsError for a prompt that cannot work, CheckpointError for a folder that cannot generate,
    ModelError for what transformers refuses, and what ``from_pretrained`` raises.
    """
    transformers = required("transformers", extra="hf", purpose="generating text")
    asked = asked_for(dict(options), dtype=dtype, trust_remote_code=trusts_code)
    model: Any = build_pretrained(placed(folder, str(folder), asked), asked)
    with closing(runtime_of(model)) as runtime:
        if not (hasattr(model, "generate") and model.can_generate()):
            raise CheckpointError(
                f"a {type(model).__name__} generates no text",
                file=str(folder / "config.json"),
                cure="Give the folder of a model with a language modelling head",
            )
        tokenizer = _tokenizer(transformers, folder, trusts_code)
        inputs = _encoded(tokenizer, prompt)
        watch = _Watch(runtime, inputs["input_ids"].shape[1], on_progress)
        streamer = _streamer(transformers, tokenizer, on_text, watch)
        settings: dict[str, Any] = {"max_new_tokens": prompt.max_new_tokens, "num_beams": 1}
        if prompt.sample is not None:
            settings["do_sample"] = prompt.sample
        torch.manual_seed(prompt.seed)
        _generate(model, {**inputs, **settings, "streamer": streamer})
        return "".join(streamer.pieces), watch.progress()


class _Watch:
    """Counts tokens and reads the clock."""

    def __init__(self, runtime: Runtime, prompt_tokens: int, on_progress: Callable[[Progress], None]) -> None:
        self._runtime = runtime
        self._prompt_tokens = prompt_tokens
        self._on_progress = on_progress
        self._new_tokens = 0
        self._started = time.perf_counter()
        self._first: float | None = None
        self._last = 0.0

    def count(self, tokens: int) -> None:
        """So many new ones have come."""
        self._new_tokens += tokens
        self._last = time.perf_counter() - self._started
        self._first = self._last if self._first is None else self._first
        self._on_progress(self.progress())

    def progress(self) -> Progress:
        """What is known now."""
        report = self._runtime.report()
        return Progress(
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            first_token_seconds=self._first,
            seconds=self._last,
            resident_bytes=report.resident_bytes,
            peak_bytes=report.peak_bytes,
            budget_bytes=report.budget_bytes,
            weight_bytes=report.weight_bytes,
            bytes_read=report.bytes_read,
        )


def _streamer(transformers: Any, tokenizer: Any, on_text: Callable[[str], None], watch: _Watch) -> Any:
    class Streamer(transformers.TextStreamer):  # type: ignore[misc]
        """Hands text on as transformers' own streamer would print it: whole words."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.pieces: list[str] = []
            self._had_prompt = False

        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if self._had_prompt:
                watch.count(value.numel())
            self._had_prompt = True

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                self.pieces.append(text)
                on_text(text)

    return Streamer()


def _tokenizer(transformers: Any, folder: Path, trusts_code: bool) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trusts_code
        )
    except Exception as error:
        raise CheckpointError(
            f"the folder has no tokenizer that can be used: {_first_line(error)}",
            file=str(folder),
            cure="Copy the tokenizer's files (tokenizer.json, tokenizer_config.json) beside config.json",
        ) from error


def _encoded(tokenizer: Any, prompt: Prompt) -> dict[str, torch.Tensor]:
    text, adds_special = prompt.text, True
    if prompt.chat:
        if not getattr(tokenizer, "chat_template", None):
            raise OptionsError("the tokenizer has no template for chats", cure="Leave out --chat")
        messages = [{"role": "user", "content": prompt.text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        adds_special = False
    found = tokenizer(text, return_tensors="pt", add_special_tokens=adds_special)
    if not found["input_ids"].numel():
        raise OptionsError("the prompt has no tokens", cure="Give some text")
    return {name: found[name].long() for name in ("input_ids", "attention_mask") if name in found}


def _generate(model: Any, arguments: dict[str, Any]) -> None:
    device = next(model.parameters()).device
    moved = {name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in arguments.items()}
    try:
        with torch.no_grad():
            model.generate(**moved)
    except IndexError as error:
        positions = getattr(model.config, "max_position_embeddings", "its")
        raise ModelError(
            f"the model cannot go on: prompt and answer are more than {positions} positions, or a token is unknown to "
            "it",
            module=type(model).__name__,
            cure="Give a shorter prompt or a smaller --max-new-tokens",
        ) from error
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"transformers cannot generate with it: {_first_line(error)}",
            module=type(model).__name__,
            cure="Check the folder's generation_config.json",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
