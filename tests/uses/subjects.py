"""The models that are used, tiny and of many kinds, and their checkpoints, made once in a process."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import odewei

__all__ = ["SUBJECTS", "Plan", "Subject", "draw_plan", "make_resident", "make_streamed"]

VOCABULARY = 61


class Stack(nn.Module):
    """Blocks one after another, each run again in the backward pass where that was asked for."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.checkpointed = False

    def through(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            # Compiled by the backend "eager", torch itself draws other dropout when it runs a block again.
            if self.checkpointed and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                hidden = checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        return hidden


class Perceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(self.drop(torch.tanh(self.up(self.norm(hidden)))))


class Perceptrons(Stack):
    def __init__(self) -> None:
        super().__init__([Perceptron(16) for _ in range(4)])
        self.head = nn.Linear(16, 7, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(self.through(hidden))


class Attending(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        return hidden + self.dense(self.attention(normed, normed, normed, need_weights=False)[0])


class Tied(Stack):
    """A head that has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__([Attending(16) for _ in range(3)])
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.through(self.embed(input_ids)) * self.scale)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.lstm = nn.LSTM(12, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(input_ids))[0])


class Convolutions(Stack):
    def __init__(self) -> None:
        super().__init__(
            [nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(4)]
        )
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.through(self.stem(images)).mean((2, 3)))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, pad_token_id=0, use_cache=False, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=3, vocab_size=VOCABULARY, use_cache=False, max_position_embeddings=32,
    )  # fmt: skip
    config._experts_implementation = "eager"
    return MixtralForCausalLM(config)


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, vocab_size=VOCABULARY, decoder_start_token_id=0,
        use_cache=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=VOCABULARY,
        max_position_embeddings=32, type_vocab_size=2,
    )  # fmt: skip
    return BertModel(config)


Inputs = dict[str, torch.Tensor]


def _ids(generator: torch.Generator, length: int = 5) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 3, (2, length), generator=generator)


def _text(generator: torch.Generator) -> Inputs:
    return {"input_ids": _ids(generator)}


def _images(generator: torch.Generator) -> Inputs:
    return {"images": torch.randn(2, 3, 6, 6, generator=generator)}


def _pair(generator: torch.Generator) -> Inputs:
    return {"input_ids": _ids(generator), "decoder_input_ids": _ids(generator, 3)}


@dataclass(frozen=True)
class Subject:
    """``build`` is the user's ``model_fn``; ``inputs`` draws keyword arguments of its call."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Inputs]
    of_transformers: bool = False
    weight: int = 1


SUBJECTS = {
    one.name: one
    for one in (
        Subject("mlp", Perceptrons, lambda generator: {"hidden": torch.randn(3, 16, generator=generator)}, weight=6),
        Subject("tied", Tied, _text, weight=4),
        Subject("lstm", Recurrent, _text, weight=3),
        Subject("conv", Convolutions, _images, weight=3),
        Subject("llama", _llama, _text, of_transformers=True, weight=3),
        Subject("mixtral", _mixtral, _text, of_transformers=True),
        Subject("t5", _t5, _pair, of_transformers=True),
        Subject("bert", _bert, _text, of_transformers=True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Which model, and how it is streamed. ``share`` of the weights is the budget, or the least that works."""

    subject: str
    by: str = "function"  # or "folder": from_pretrained
    format: str = "safetensors"  # or "bin"
    share: float = 0.5
    prefetch_depth: int | str = "auto"
    granularity: str = "auto"
    frozen: bool = False  # at once, both


_WAYS = {
    "llama": ("folder", "folder", "function"),
    "mixtral": ("folder",),  # the file has the names of the hub
    "t5": ("folder", "folder", "function"),
    "bert": ("folder", "folder", "function"),
}


def draw_plan(rng: random.Random, subject: str | None = None) -> Plan:
    """A model and options that it takes."""
    weights = [one.weight for one in SUBJECTS.values()]
    chosen = SUBJECTS[rng.choices(list(SUBJECTS), weights)[0] if subject is None else subject]
    of_transformers = chosen.of_transformers
    return Plan(
        subject=chosen.name,
        by=rng.choice(_WAYS[chosen.name]) if of_transformers else "function",
        format=rng.choice(("safetensors", "safetensors", "bin")) if chosen.name != "mixtral" else "safetensors",
        share=rng.choice((0.35, 0.45, 0.6, 1.0)),
        prefetch_depth=rng.choice((0, 0, "auto", 2)),
        granularity=rng.choice(("auto", "leaf")),
        frozen=rng.random() < 0.15,
    )


@dataclass(frozen=True)
class _Made:
    folder: Path
    model: nn.Module  # as built by ``build``, in the mode it comes in
    weight_bytes: int


def _file_name(format: str, of_transformers: bool) -> str:
    stem = ("model" if format == "safetensors" else "pytorch_model") if of_transformers else "weights"
    return f"{stem}.{format}"


@cache
def _made(name: str, root: Path) -> _Made:
    """A model with weights that are not the usual ones and zeros, and its checkpoints in each format."""
    subject = SUBJECTS[name]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = subject.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
            for key, buffer in model.named_buffers():
                if key.endswith(("running_mean", "running_var")):
                    buffer.add_(torch.rand_like(buffer))
    for format in ("safetensors", "bin"):
        folder = root / name / format
        folder.mkdir(parents=True, exist_ok=True)
        if format == "safetensors" and subject.of_transformers:
            model.save_pretrained(folder)
        elif format == "safetensors":
            save_file(_each_once(model), folder / _file_name(format, False))
        else:
            torch.save(_each_once(model), folder / _file_name(format, subject.of_transformers))
            for path in (root / name / "safetensors").glob("*.json"):
                shutil.copy(path, folder)
    if subject.of_transformers:
        model = type(model).from_pretrained(root / name / "safetensors")
    return _Made(root / name, model, sum(parameter.nbytes for parameter in model.parameters()))


def _each_once(model: nn.Module) -> dict[str, torch.Tensor]:
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name in names}


def make_resident(plan: Plan, root: Path) -> nn.Module:
    """The ordinary model, a new one each time; by a folder it is in eval mode, by a function as its class made it."""
    made = copy.deepcopy(_made(plan.subject, root).model)
    return made.train(plan.by == "function")


def copy_checkpoint(plan: Plan, root: Path, folder: Path) -> Path:
    """A checkpoint of its own in ``folder``; what to open is returned."""
    shutil.copytree(_made(plan.subject, root).folder / plan.format, folder, dirs_exist_ok=True)
    return folder if plan.by == "folder" else folder / _file_name(plan.format, SUBJECTS[plan.subject].of_transformers)


def budget_bytes(plan: Plan, root: Path) -> int:
    """A share of the weights."""
    return int(plan.share * _made(plan.subject, root).weight_bytes)


def make_streamed(plan: Plan, root: Path, source: Path) -> nn.Module:
    """The streamed model. Where the budget is too small, it is the smallest that works."""
    options = {
        "memory_budget": _least_budgets.get(plan, budget_bytes(plan, root)),
        "prefetch_depth": plan.prefetch_depth,
        "granularity": plan.granularity,
    }
    try:
        if plan.by == "folder":
            return odewei.from_pretrained(source, **options)  # type: ignore[arg-type]
        return odewei.init_on_demand_weights_model(SUBJECTS[plan.subject].build, source, **options)  # type: ignore[arg-type]
    except odewei.errors.BudgetTooSmallError as error:
        _least_budgets[plan] = int(str(error.cure).split("works is ")[1].split(" ")[0])
    return make_streamed(plan, root, source)


_least_budgets: dict[Plan, int] = {}
