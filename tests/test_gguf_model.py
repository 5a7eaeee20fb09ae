"""A model of transformers streamed from a GGUF file equals the same model from safetensors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from odewei.torch import GgufLoader, open_checkpoint
from tests import models as zoo

gguf = pytest.importorskip("gguf")

LLAMA = zoo.CASES["llama"]
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def name_of_transformers(name: str) -> str | None:
    """From llama.cpp's names."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    return WHOLE.get(name) if found is None else f"model.layers.{found[1]}.{PARTS[found[2]]}.{found[3]}"


def write(model: torch.nn.Module, path: Path) -> None:
    """As the conversion script of llama.cpp does: names by the package's own map, query and key rows interleaved."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        for projection, count in heads.items():
            if f"{projection}.weight" in name:
                size = array.shape[0] // count // 2
                array = array.reshape(count, 2, size, -1).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A Llama with fewer key heads than query heads, and its GGUF file."""
    model = zoo.resident(LLAMA.build)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(model, path)
    return model, path


@pytest.mark.parametrize("depth", [0, "auto"])
def test_a_llama_from_gguf_equals_the_same_from_safetensors(
    depth: int | str, checkpoint: tuple[torch.nn.Module, Path]
) -> None:
    """Rows are put back by default; the bits are those of the model that was converted."""
    model, path = checkpoint
    loader = open_checkpoint(path, rename=name_of_transformers)
    budget = zoo.weight_bytes(model) // 2
    with zoo.streamed(LLAMA.build, loader, memory_budget=budget, prefetch_depth=depth) as streamed:
        for seed in (1, 2):
            assert zoo.same_bits(zoo.outputs(streamed, LLAMA.inputs(seed)), zoo.outputs(model, LLAMA.inputs(seed)))


def test_rows_as_in_the_file_would_be_another_model(checkpoint: tuple[torch.nn.Module, Path]) -> None:
    """Which is why they are put back."""
    model, path = checkpoint
    with zoo.streamed(LLAMA.build, GgufLoader(path, turn_rows=False, rename=name_of_transformers)) as streamed:
        assert not zoo.same_bits(zoo.outputs(streamed, LLAMA.inputs(1)), zoo.outputs(model, LLAMA.inputs(1)))


def test_transformers_reads_the_same_weights(checkpoint: tuple[torch.nn.Module, Path]) -> None:
    """What transformers makes of queries and keys of the file is what odewei does."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    _, path = checkpoint
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    loader = GgufLoader(path)
    stored = GgufLoader(path, turn_rows=False)
    for name in ("blk.0.attn_q.weight", "blk.5.attn_k.weight"):
        (ours,) = loader("module", [name]).values()
        (raw,) = stored("module", [name]).values()
        theirs = LlamaTensorProcessor(config=config).process(raw.numpy(), name).weights
        assert torch.equal(ours, torch.from_numpy(np.ascontiguousarray(theirs)))
