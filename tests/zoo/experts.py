"""Mixtures of experts: a router chooses at each token which weights are used."""

from __future__ import annotations

from typing import Any

from tests.zoo.architecture import VOCAB, Family, pair, text

EXPERTS = Family("mixtures of experts")

_ROUTED = "a pass uses the routed experts only"
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT: dict[str, Any] = {
    **(_LLAMA | {"num_key_value_heads": 4}),
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_SWITCH: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4,
    "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_experts": 4, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip


def _add(name: str, model: str, **config: Any) -> None:
    EXPERTS.hf(name, model, text, partly=_ROUTED, **config)


_add("mixtral", "MixtralForCausalLM", **_LLAMA, num_local_experts=4)
_add("qwen2_moe", "Qwen2MoeForCausalLM", **_LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
     shared_expert_intermediate_size=32)  # fmt: skip
_add("qwen3_moe", "Qwen3MoeForCausalLM", **_LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
     head_dim=8)  # fmt: skip
_add("deepseek_v2", "DeepseekV2ForCausalLM", **_LATENT, n_group=1, topk_group=1, n_shared_experts=1,
     topk_method="greedy")  # fmt: skip
_add("deepseek_v3", "DeepseekV3ForCausalLM", **_LATENT, n_group=2, topk_group=1, n_shared_experts=1)
_add("olmoe", "OlmoeForCausalLM", **_LLAMA, num_experts=4, num_experts_per_tok=2)
_add("flex_olmo", "FlexOlmoForCausalLM", **_LLAMA, num_experts=4, num_experts_per_tok=2)
_add("gpt_oss", "GptOssForCausalLM", **_LLAMA, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8)
_add("phimoe", "PhimoeForCausalLM", **_LLAMA, num_local_experts=4, num_experts_per_tok=2)
_add("granitemoe", "GraniteMoeForCausalLM", **_LLAMA, num_local_experts=4, num_experts_per_tok=2)
_add("granitemoeshared", "GraniteMoeSharedForCausalLM", **_LLAMA, num_local_experts=4, num_experts_per_tok=2,
     shared_intermediate_size=32)  # fmt: skip
_add("dbrx", "DbrxForCausalLM", vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=3, max_seq_len=64,
     attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}, ffn_config={"moe_num_experts": 4,
     "moe_top_k": 2, "ffn_hidden_size": 32})  # fmt: skip
_add("jetmoe", "JetMoeForCausalLM", **(_LLAMA | {"num_attention_heads": 4}), num_local_experts=4, num_experts_per_tok=2,
     kv_channels=8)  # fmt: skip
_add("glm4_moe", "Glm4MoeForCausalLM", **_LLAMA, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1,
     num_experts_per_tok=2, first_k_dense_replace=1, head_dim=8)  # fmt: skip
_add("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", **_LLAMA, moe_intermediate_size=16, moe_num_experts=4, moe_k=2,
     moe_num_shared_experts=1)  # fmt: skip
_add("dots1", "Dots1ForCausalLM", **_LLAMA, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1,
     num_experts_per_tok=2, first_k_dense_replace=1, n_group=1, topk_group=1)  # fmt: skip
_add("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", **_LLAMA, num_experts=4, moe_topk=2, head_dim=8)
_add("minimax", "MiniMaxForCausalLM", **_LLAMA, num_local_experts=4, num_experts_per_tok=2, head_dim=8, block_size=8,
     layer_types=["linear_attention", "full_attention", "linear_attention"])  # fmt: skip
_add("llama4", "Llama4ForCausalLM", **_LLAMA, intermediate_size_mlp=64, num_local_experts=4, head_dim=8)
EXPERTS.hf("switch_transformers", "SwitchTransformersForConditionalGeneration", pair, partly=_ROUTED, **_SWITCH)
EXPERTS.hf(
    "nllb-moe", "NllbMoeForConditionalGeneration", pair, partly=_ROUTED, vocab_size=VOCAB, d_model=32,
    encoder_layers=4, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
    decoder_ffn_dim=64, max_position_embeddings=64, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2,
    pad_token_id=0,
)  # fmt: skip
