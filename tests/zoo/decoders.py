"""Decoders: one stack of blocks that predicts the next token."""

from __future__ import annotations

from typing import Any

from tests.zoo.architecture import VOCAB, Family, masked_text, text

DECODERS = Family("decoders")
_add = DECODERS.hf

_TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT2: dict[str, Any] = {**_TOKENS, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}

_add("llama", "LlamaForCausalLM", masked_text, **_LLAMA)
_add("llama, tied, biases", "LlamaForCausalLM", text, **_LLAMA, tie_word_embeddings=True, attention_bias=True)
_add("mistral", "MistralForCausalLM", text, **_LLAMA, sliding_window=8)
_add("ministral", "MinistralForCausalLM", text, **_LLAMA, head_dim=8)
_add("qwen2", "Qwen2ForCausalLM", text, **_LLAMA)
_add("qwen3", "Qwen3ForCausalLM", text, **_LLAMA, head_dim=8)
_add("gemma", "GemmaForCausalLM", text, **_LLAMA, head_dim=8)
_add("gemma2", "Gemma2ForCausalLM", text, **_LLAMA, head_dim=8, sliding_window=8)
_add("gemma3", "Gemma3ForCausalLM", text, **_LLAMA, head_dim=8, sliding_window=8)
_add(
    "gemma3n", "Gemma3nForCausalLM", text, **_LLAMA, head_dim=8, sliding_window=8, vocab_size_per_layer_input=VOCAB,
    hidden_size_per_layer_input=8, laurel_rank=4, num_kv_shared_layers=0, altup_num_inputs=2,
    activation_sparsity_pattern=[0.0] * 4, layer_types=["sliding_attention", "full_attention"] * 2,
)  # fmt: skip
_add("phi", "PhiForCausalLM", text, **_LLAMA)
_add("phi3", "Phi3ForCausalLM", text, **_LLAMA)
_add("gpt2", "GPT2LMHeadModel", masked_text, **_GPT2)
_add("gpt_bigcode", "GPTBigCodeForCausalLM", text, **_GPT2)
_add("gptj", "GPTJForCausalLM", text, **_GPT2, rotary_dim=4)
_add("codegen", "CodeGenForCausalLM", text, **_GPT2, n_ctx=64, rotary_dim=4)
_add("openai-gpt", "OpenAIGPTLMHeadModel", text, **_GPT2)
_add(
    "gpt_neo", "GPTNeoForCausalLM", text, **_TOKENS, hidden_size=32, num_layers=4, num_heads=4, window_size=8,
    attention_types=[[["global", "local"], 2]], max_position_embeddings=64,
)  # fmt: skip
_add("gpt_neox", "GPTNeoXForCausalLM", text, **_LLAMA)
_add("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", text, **_LLAMA)
_add(
    "opt", "OPTForCausalLM", text, **_TOKENS, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=4,
    num_attention_heads=4, max_position_embeddings=64,
)  # fmt: skip
_add("bloom", "BloomForCausalLM", text, **_TOKENS, hidden_size=32, n_layer=4, n_head=4)
_add("falcon", "FalconForCausalLM", text, **_TOKENS, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
_add(
    "falcon, new decoder", "FalconForCausalLM", text, **_TOKENS, hidden_size=32, num_hidden_layers=4,
    num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True,
)  # fmt: skip
_add("mpt", "MptForCausalLM", text, **_TOKENS, d_model=32, n_heads=4, n_layers=4, max_seq_len=64)
_add("olmo", "OlmoForCausalLM", text, **_LLAMA)
_add("olmo2", "Olmo2ForCausalLM", text, **_LLAMA)
_add("olmo3", "Olmo3ForCausalLM", text, **_LLAMA, sliding_window=8)
_add("stablelm", "StableLmForCausalLM", text, **_LLAMA)
_add("starcoder2", "Starcoder2ForCausalLM", text, **_LLAMA)
_add("cohere", "CohereForCausalLM", text, **_LLAMA)
_add("cohere2", "Cohere2ForCausalLM", text, **_LLAMA, sliding_window=8)
_add("granite", "GraniteForCausalLM", text, **_LLAMA)
_add("glm", "GlmForCausalLM", text, **_LLAMA, head_dim=8)
_add("glm4", "Glm4ForCausalLM", text, **_LLAMA, head_dim=8)
_add("nemotron", "NemotronForCausalLM", text, **_LLAMA)
_add("persimmon", "PersimmonForCausalLM", text, **_LLAMA)
_add("smollm3", "SmolLM3ForCausalLM", text, **_LLAMA)
_add("ernie4_5", "Ernie4_5ForCausalLM", text, **_LLAMA)
_add("exaone4", "Exaone4ForCausalLM", text, **_LLAMA, sliding_window=8)
_add("seed_oss", "SeedOssForCausalLM", text, **_LLAMA, head_dim=8)
_add("apertus", "ApertusForCausalLM", text, **_LLAMA)
_add("arcee", "ArceeForCausalLM", text, **_LLAMA)
_add("helium", "HeliumForCausalLM", text, **_LLAMA, head_dim=8)
_add("diffllama", "DiffLlamaForCausalLM", text, **_LLAMA)
_add("bitnet", "BitNetForCausalLM", text, **_LLAMA)
_add("ctrl", "CTRLLMHeadModel", text, **_TOKENS, n_positions=64, n_embd=32, dff=64, n_layer=4, n_head=4)
_add(
    "xglm", "XGLMForCausalLM", text, **_TOKENS, d_model=32, ffn_dim=64, num_layers=4, attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
_add(
    "biogpt", "BioGptForCausalLM", text, **_TOKENS, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=4, max_position_embeddings=64,
)  # fmt: skip
_add(
    "modernbert-decoder", "ModernBertDecoderForCausalLM", text, **_TOKENS, hidden_size=32, intermediate_size=64,
    num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=64, cls_token_id=3, sep_token_id=4,
)  # fmt: skip
