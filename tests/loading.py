"""Models that do more than copying when they are loaded, and how a streamed one is compared with an ordinary one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from odewei.matched_loader import MatchedLoader
from odewei.runtime import runtime_of
from odewei.torch import init_on_demand_weights_model

State = dict[str, Any]
X = torch.linspace(-1, 1, 16).view(2, 8)


def resident(model_fn: Callable[[], nn.Module], state: Mapping[str, Any], *, strict: bool = False) -> nn.Module:
    """The ordinary model."""
    model = model_fn()
    model.load_state_dict(copy.deepcopy(state), strict=strict)
    return model.eval()


def streamed(model_fn: Callable[[], nn.Module], source: Any, **options: Any) -> nn.Module:
    """The model under test."""
    return init_on_demand_weights_model(model_fn, source, **options).eval()


def sources(state: State, folder: Path) -> list[object]:
    """The same weights in memory and in a file."""
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    return [state, str(folder / "model.safetensors")]


def assert_same(model: nn.Module, ordinary: nn.Module) -> None:
    """Both compute the same bits, twice, and have the same weights and buffers."""
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(X), ordinary(X))
        found, expected = model.state_dict(), ordinary.state_dict()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert found[name].dtype == value.dtype, name
                assert torch.equal(found[name] + 0, value + 0), name


def computed(model: nn.Module) -> tuple[str, ...]:
    """The weights that are computed when they are read."""
    source = runtime_of(model)._source
    return source.computed if isinstance(source, MatchedLoader) else ()


def linear(name: str = "", inside: int = 8, outside: int = 8) -> State:
    """A checkpoint of one linear layer."""
    return {f"{name}weight": torch.randn(outside, inside), f"{name}bias": torch.randn(outside)}


# -- modules that do more than copying -----------------------------------------------------------------------------


def weight_norm() -> nn.Module:
    """Two layers, one of them in the new weight norm, which renames the keys of the old one."""
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4))


def old_weight_norm_state() -> State:
    return {
        "0.weight_g": torch.rand(8, 1),
        "0.weight_v": torch.randn(8, 8),
        "0.bias": torch.randn(8),
        **linear("1.", 8, 4),
    }


class Fused(nn.Module):
    """A hook joins three layers to one, as timm and many others do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(24, 4)
        self._register_load_state_dict_pre_hook(self.join)

    def join(self, state: State, prefix: str, *_: object) -> None:
        for part in ("weight", "bias"):
            if f"{prefix}q.{part}" in state:
                state[f"{prefix}qkv.{part}"] = torch.cat([state.pop(f"{prefix}{one}.{part}") for one in "qkv"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.qkv(x))
        return result


class Split(nn.Module):
    """An override cuts one weight into several."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def _load_from_state_dict(self, state: State, prefix: str, *rest: Any) -> None:
        if f"{prefix}qk" in state:
            state[f"{prefix}q.weight"], state[f"{prefix}k.weight"] = state.pop(f"{prefix}qk").chunk(2)
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.k(self.q(x))
        return result


class Computed(Split):
    """The same, from another layout, by arithmetic and by looking at values."""

    def _load_from_state_dict(self, state: State, prefix: str, *rest: Any) -> None:
        joined = state.pop(f"{prefix}qk")
        if joined.abs().max() > 100 or torch.equal(joined, joined * 2):
            raise ValueError("no weights")
        q, k = joined.t().chunk(2, dim=0)
        state[f"{prefix}q.weight"] = q * joined.mean().item()
        state[f"{prefix}k.weight"] = k.float() + torch.arange(8.0)
        state[f"{prefix}q.bias"].mul_(2)
        self.total = float(joined.numpy().sum())
        self.largest = joined.amax(dim=1)[:8]
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.total + self.largest


class Copying(nn.Linear):
    """An override that copies by itself and calls nothing else."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))
        self.offset: torch.Tensor

    def _load_from_state_dict(self, state: State, prefix: str, *_: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(state[f"{prefix}w"].t())
            self.bias.data.copy_(state[f"{prefix}b"])
            self.scale.copy_(state[f"{prefix}s"][0])
            self.offset.fill_(state[f"{prefix}s"].item())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale + self.offset


class Drawing(nn.Linear):
    """An override that draws what an older checkpoint lacks."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.extra = nn.Parameter(torch.zeros(8))
        self.noise = nn.Parameter(torch.zeros(8))

    def _load_from_state_dict(self, state: State, prefix: str, *rest: Any) -> None:
        torch.manual_seed(3)
        with torch.no_grad():
            self.extra.normal_().mul_(2)
        state[f"{prefix}noise"] = torch.empty_like(state[f"{prefix}bias"]).uniform_() + torch.rand(8)
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.extra + self.noise


class Renaming(nn.Module):
    """A model whose ``load_state_dict`` is its own, without the newer keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:  # type: ignore[override]
        renamed = {name.replace("old_name.", "inner."): value for name, value in state.items()}
        return super().load_state_dict(renamed, strict=strict)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result


class Defaults(nn.Linear):
    """A hook gives what older checkpoints lack, and resizes what has another length."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.scale = nn.Parameter(torch.full((8,), 2.0))
        self.positions = nn.Parameter(torch.zeros(4, 8))

    def _load_from_state_dict(self, state: State, prefix: str, *rest: Any) -> None:
        state.setdefault(f"{prefix}scale", torch.full((8,), 3.0))
        found = state[f"{prefix}positions"]
        if found.shape != self.positions.shape:
            resized = nn.functional.interpolate(found.t()[None], size=4, mode="linear")[0].t()
            state[f"{prefix}positions"] = resized
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale + self.positions.mean(dim=0)


def norms() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False))


def norms_without_counts() -> State:
    state = {name: torch.rand_like(value) for name, value in norms().state_dict().items() if value.is_floating_point()}
    return {**state, "1.running_var": torch.rand(8) + 1}


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 4))


def old_spectral_state() -> State:
    """As torch 0.4 saved it: without ``weight_v``, with the normalised weight."""
    state = dict(spectral().state_dict())
    del state["0.weight_v"]
    return {**state, "0.weight": state["0.weight_orig"] * 0.5}


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(4))


def not_lazy_state() -> State:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).state_dict()


def wrapped() -> nn.Module:
    """torch's checkpointing wrapper adds its name to keys that lack it."""
    return nn.Sequential(checkpoint_wrapper(nn.Linear(8, 8)), checkpoint_wrapper(nn.Linear(8, 4)))


def fused_state() -> State:
    return {**linear("q."), **linear("k."), **linear("v."), **linear("out.", 24, 4)}


SPECIAL = {
    "weight_norm": (weight_norm, old_weight_norm_state, ()),
    "fused": (Fused, fused_state, None),
    "split": (Split, lambda: {"qk": torch.randn(16, 8), "q.bias": torch.randn(8)}, None),
    "computed": (Computed, lambda: {"qk": torch.randn(8, 16), "q.bias": torch.randn(8)}, None),
    "copying": (Copying, lambda: {"w": torch.randn(8, 8), "b": torch.randn(8), "s": torch.ones(1)}, None),
    "renaming": (Renaming, lambda: linear("old_name."), ()),
    "defaults": (Defaults, lambda: {**linear(), "positions": torch.randn(6, 8)}, ("positions",)),
    "drawing": (Drawing, linear, ("extra", "noise")),
    "norms": (norms, norms_without_counts, ()),
    "spectral": (spectral, lambda: dict(spectral().state_dict()), ()),
    "old spectral": (spectral, old_spectral_state, ("0.weight_v",)),
    "lazy": (lazy, not_lazy_state, ()),
    "checkpointed": (wrapped, lambda: {**linear("0."), **linear("1.", 8, 4)}, ()),
    "lstm": (lambda: Recurrent(), lambda: Recurrent().state_dict(), ()),
    "attention": (lambda: Attending(), lambda: Attending().state_dict(), ()),
}


class Recurrent(nn.Module):
    """An LSTM in a model with a hook: it keeps a second list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(8, 8)
        self._register_load_state_dict_pre_hook(lambda *_: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x[None])[0]
        return result


class Attending(nn.Module):
    """Attention, beside a module with an extra look at versions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(8, track_running_stats=True)
        self.inner = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x.t()[None])[0].t().contiguous()
        result: torch.Tensor = self.inner(x, x, x)[0]
        return result
