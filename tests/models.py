"""Small models of many kinds, with random weights, and how each is called. Shared by the tests of the whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import odewei
from odewei.torch import init_on_demand_weights_model

ModelFn = Callable[[], nn.Module]


@dataclass(frozen=True)
class Case:
    """``build`` makes a model with random weights; ``inputs(seed)`` are keyword arguments of its call."""

    build: ModelFn
    inputs: Callable[[int], dict[str, torch.Tensor]]


def _ids(seed: int, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(seed))


def _images(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=48,
            intermediate_size=112,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=99,
            pad_token_id=0,
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=99, n_positions=64))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=99, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=99,
            max_position_embeddings=64,
        )
    )  # fmt: skip


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4, vocab_size=99,
        )
    )  # fmt: skip


class ConvNet(nn.Module):
    """Convolutions with BatchNorm, whose statistics are buffers in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 8, 16, 16, 16]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )
        self.head = nn.Linear(16, 7)
        for block in self.blocks:
            block[1].running_mean.uniform_(-1, 1)
            block[1].running_var.uniform_(0.5, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            images = block(images)
        return self.head(images.mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM over embeddings; torch keeps a second list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(48, 16, batch_first=True)
        self.head = nn.Linear(16, 99)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.lstm(self.embed(input_ids))[0])[0])


class TiedHead(nn.Module):
    """A head that uses the embedding's weight without being its owner, and attention that bypasses a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, 16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True) for _ in range(3))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.scale = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.attention(hidden, hidden, hidden)[0] * self.scale
        return nn.functional.linear(hidden, self.embed.weight)


def _text(seed: int) -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(seed)}


def _pair(seed: int) -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(seed), "decoder_input_ids": _ids(seed + 1, 5)}


CASES: dict[str, Case] = {
    "llama": Case(llama, _text),
    "gpt2 (tied)": Case(gpt2, _text),
    "t5": Case(t5, _pair),
    "bert": Case(bert, _text),
    "mixtral": Case(mixtral, _text),
    "convnet": Case(ConvNet, lambda seed: {"images": _images(seed)}),
    "recurrent": Case(Recurrent, _text),
    "tied head": Case(TiedHead, _text),
}


def resident(build: ModelFn, seed: int = 0) -> nn.Module:
    """The model in memory, with reproducible weights."""
    torch.manual_seed(seed)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start as 0 and 1, which would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def save(model: nn.Module, path: Path) -> Path:
    """Write a model's state as one safetensors file, a tied weight once."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            state[name] = tensor.contiguous().clone()
        seen.add(tensor.data_ptr())
    save_file(state, path)
    return path


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All tensors that a call returns."""
    with torch.no_grad():
        found = model(**inputs)
    return list(_tensors(found))


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal byte for byte (NaNs included)."""
    return len(left) == len(right) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))
        for a, b in zip(left, right, strict=True)
    )


def passes(model: nn.Module, inputs: dict[str, torch.Tensor], count: int = 3) -> None:
    """So many passes, for what need not happen in the first."""
    for _ in range(count):
        outputs(model, inputs)


def weight_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def smallest_budget(build: ModelFn, path: Path, **options: object) -> int:
    """The smallest budget that works, found by asking for too little."""
    try:
        odewei.close(init_on_demand_weights_model(build, str(path), memory_budget=1, **options))
    except odewei.errors.BudgetTooSmallError as error:
        return int(str(error.cure).split("works is ")[1].split(" ")[0])
    raise AssertionError("a budget of one byte was accepted")


@contextmanager
def streamed(build: ModelFn, source: object, **options: object) -> Iterator[nn.Module]:
    """A streamed model in eval mode, closed afterwards; all invariants of its scheduler hold at the end."""
    model = init_on_demand_weights_model(build, source, **options).eval()
    try:
        yield model
        runtime = next(iter(odewei.runtime.runtimes_in(model)), None)
        if runtime is not None:
            runtime.driver.ledger.check_invariants()
            assert runtime.driver.ledger.leases() == 0
    finally:
        odewei.close(model)
