"""A Llama in plain torch, with the names of the usual checkpoints: something to stream where nothing else is installed.

Knows torch only. Grouped-query attention over the whole input, no cache; weights have no values until they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from odewei.demo.synthetic import LlamaShape

__all__ = ["Output", "PlainLlama", "plain_model_fn"]

_ROTARY_BASE = 10000.0
_EPSILON = 1e-5


class Output(NamedTuple):
    """As in transformers: ``logits`` of every token."""

    logits: torch.Tensor


class PlainLlama(nn.Module):
    """Called with token ids, batch by length."""

    def __init__(self, shape: LlamaShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = _Embedding(shape.vocab, shape.hidden, dtype)
        self.model.layers = nn.ModuleList(_Layer(shape, dtype) for _ in range(shape.layers))
        self.model.norm = _Norm(shape.hidden, dtype)
        self.lm_head = _Linear(shape.hidden, shape.vocab, dtype)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Output:
        hidden = self.model.embed_tokens(input_ids)  # type: ignore[operator]
        for layer in self.model.layers:  # type: ignore[union-attr]
            hidden = layer(hidden)
        return Output(self.lm_head(self.model.norm(hidden)))  # type: ignore[operator]


class _Embedding(nn.Module):
    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(ids, self.weight)


class _Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, self.weight)


class _Norm(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, self.weight.shape, self.weight, _EPSILON)


class _Layer(nn.Module):
    def __init__(self, shape: LlamaShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = _Attention(shape, dtype)
        self.mlp = _Mlp(shape, dtype)
        self.input_layernorm = _Norm(shape.hidden, dtype)
        self.post_attention_layernorm = _Norm(shape.hidden, dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    def __init__(self, shape: LlamaShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = _Linear(shape.hidden, shape.intermediate, dtype)
        self.up_proj = _Linear(shape.hidden, shape.intermediate, dtype)
        self.down_proj = _Linear(shape.intermediate, shape.hidden, dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, shape: LlamaShape, dtype: torch.dtype) -> None:
        super().__init__()
        self._width = shape.hidden // shape.heads
        kept = self._width * shape.kv_heads
        self.q_proj = _Linear(shape.hidden, shape.hidden, dtype)
        self.k_proj = _Linear(shape.hidden, kept, dtype)
        self.v_proj = _Linear(shape.hidden, kept, dtype)
        self.o_proj = _Linear(shape.hidden, shape.hidden, dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = (self._heads(project(hidden)) for project in (self.q_proj, self.k_proj, self.v_proj))
        query, key = _rotated(query), _rotated(key)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.reshape(*projected.shape[:2], -1, self._width).transpose(1, 2)


def _rotated(heads: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al., 2021), in the order of halves that Llama's checkpoints have."""
    length, width = heads.shape[-2:]
    speeds = _ROTARY_BASE ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * speeds
    cosine, sine = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def plain_model_fn(shape: LlamaShape, dtype: torch.dtype = torch.bfloat16) -> Callable[[], nn.Module]:
    """A function that builds the model, as ``init_on_demand_weights_model`` takes it."""
    return lambda: PlainLlama(shape, dtype).eval()
