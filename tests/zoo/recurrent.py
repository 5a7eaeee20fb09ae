"""State spaces, linear attention, recurrences, and what mixes them with attention."""

from __future__ import annotations

from typing import Any

from tests.zoo.architecture import VOCAB, Family, text

RECURRENT = Family("state-space and recurrent")

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 8, "pad_token_id": 0}


def _add(name: str, model: str, **config: Any) -> None:
    RECURRENT.hf(name, model, text, **config)


_add("mamba", "MambaForCausalLM", **_MAMBA)
_add("mamba2", "Mamba2ForCausalLM", **_MAMBA, num_heads=8, head_dim=8, n_groups=2, chunk_size=4)
_add("falcon_mamba", "FalconMambaForCausalLM", **_MAMBA)
_add("rwkv", "RwkvForCausalLM", vocab_size=VOCAB, hidden_size=32, attention_hidden_size=32, num_hidden_layers=4,
     context_length=64, rescale_every=0)  # fmt: skip
RECURRENT.hf("rwkv, rescaling its weights", "RwkvForCausalLM", text, vocab_size=VOCAB, hidden_size=32,
     attention_hidden_size=32, num_hidden_layers=4, context_length=64, rescale_every=2,
     overdraws="the forward changes weights in place, and changed weights stay in memory")  # fmt: skip
_add("jamba", "JambaForCausalLM", **_LLAMA, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
     expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=8, mamba_dt_rank=4)  # fmt: skip
_add("falcon_h1", "FalconH1ForCausalLM", **_LLAMA, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
     mamba_n_groups=1, mamba_chunk_size=4)  # fmt: skip
_add("bamba", "BambaForCausalLM", **_LLAMA, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
     mamba_n_groups=1, mamba_chunk_size=4)  # fmt: skip
_add("zamba", "ZambaForCausalLM", **(_LLAMA | {"num_key_value_heads": 4, "num_hidden_layers": 6}),
     attn_layer_period=2, attn_layer_offset=1,
     mamba_d_state=8, mamba_dt_rank=4, n_mamba_heads=2)  # fmt: skip
_add("zamba2", "Zamba2ForCausalLM", **(_LLAMA | {"num_key_value_heads": 4}), num_mem_blocks=1, mamba_d_state=8,
     mamba_ngroups=1, n_mamba_heads=8, mamba_headdim=8, chunk_size=4, hybrid_layer_ids=[1, 3],
     layers_block_type=["mamba", "hybrid", "mamba", "hybrid"])  # fmt: skip
_add("recurrent_gemma", "RecurrentGemmaForCausalLM", **_LLAMA, lru_width=32, head_dim=8, attention_window_size=8)
_add("granitemoehybrid", "GraniteMoeHybridForCausalLM", **_LLAMA, layer_types=["mamba", "attention"] * 2,
     num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32, mamba_n_heads=8, mamba_d_head=8,
     mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=4)  # fmt: skip
_add("nemotron_h", "NemotronHForCausalLM", **{k: v for k, v in _LLAMA.items() if k != "num_hidden_layers"},
     layers_block_type=["mamba", "attention", "mamba", "moe"], mamba_num_heads=4, mamba_head_dim=8, n_groups=1,
     ssm_state_size=8, chunk_size=4, head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
     moe_shared_expert_intermediate_size=16)  # fmt: skip
_add("lfm2", "Lfm2ForCausalLM", **_LLAMA, full_attn_idxs=[1, 3], block_multiple_of=8)
_add("qwen3_next", "Qwen3NextForCausalLM", **_LLAMA, head_dim=8, layer_types=["linear_attention", "full_attention"] * 2,
     linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, num_experts=4,
     num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)  # fmt: skip
_add("xlstm", "xLSTMForCausalLM", vocab_size=VOCAB, hidden_size=128, embedding_dim=128, num_hidden_layers=3,
     num_blocks=3,
     num_heads=2, chunk_size=8, pad_token_id=0)  # fmt: skip
