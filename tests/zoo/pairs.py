"""Encoder-decoders of text."""

from __future__ import annotations

from typing import Any

from tests.zoo.architecture import VOCAB, Family, ids, pair

PAIRS = Family("encoder-decoders")
_add = PAIRS.hf

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_BART: dict[str, Any] = {
    **_TOKENS,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "forced_eos_token_id": 2,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}


def _long_pair(seed: int) -> dict[str, Any]:
    return {"input_ids": ids(seed, 32), "decoder_input_ids": ids(seed + 1, 5)}


_LED = {key: value for key, value in _BART.items() if key != "max_position_embeddings"}
_PROPHET = {
    key: value for key, value in _BART.items() if key not in ("d_model", "encoder_layers", "decoder_layers")
} | {
    "hidden_size": 32, "num_encoder_layers": 3, "num_decoder_layers": 3, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
}  # fmt: skip

_add("t5", "T5ForConditionalGeneration", pair, **_T5)
_add("t5, gated", "T5ForConditionalGeneration", pair, **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
_add("t5, encoder only", "T5EncoderModel", lambda seed: {"input_ids": ids(seed)}, **_T5)
_add("mt5", "MT5ForConditionalGeneration", pair, **_T5)
_add("umt5", "UMT5ForConditionalGeneration", pair, **_T5)
_add(
    "longt5", "LongT5ForConditionalGeneration", _long_pair, **_T5, local_radius=4, global_block_size=4,
    encoder_attention_type="transient-global",
)  # fmt: skip
_add("bart", "BartForConditionalGeneration", pair, **_BART)
_add("mbart", "MBartForConditionalGeneration", pair, **_BART)
_add("plbart", "PLBartForConditionalGeneration", pair, **_BART)
_add("pegasus", "PegasusForConditionalGeneration", pair, **_BART)
_add("pegasus_x", "PegasusXForConditionalGeneration", _long_pair, **_BART, num_global_tokens=4, block_size=8)
_add("marian", "MarianMTModel", pair, **_BART)
_add("m2m_100", "M2M100ForConditionalGeneration", pair, **_BART)
_add("blenderbot", "BlenderbotForConditionalGeneration", pair, **_BART)
_add("blenderbot-small", "BlenderbotSmallForConditionalGeneration", pair, **_BART)
_add("mvp", "MvpForConditionalGeneration", pair, **_BART)
_add(
    "led", "LEDForConditionalGeneration", _long_pair, **_LED, attention_window=8, max_encoder_position_embeddings=64,
    max_decoder_position_embeddings=64,
)  # fmt: skip
_add("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", _long_pair, **_BART, attention_type="original_full")
_add("prophetnet", "ProphetNetForConditionalGeneration", pair, **_PROPHET, ngram=2, num_buckets=8)
_add("fsmt", "FSMTForConditionalGeneration", pair, **(
    {key: value for key, value in _BART.items() if key != "vocab_size"}
    | {"langs": ["en", "de"], "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB}
))  # fmt: skip
