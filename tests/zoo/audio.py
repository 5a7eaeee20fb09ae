"""Audio: waves and spectrograms in, features, tokens or waves out."""

from __future__ import annotations

from typing import Any

from tests.zoo.architecture import VOCAB, Family, ids, normal, wave

AUDIO = Family("audio")
_add = AUDIO.hf

_WAV2VEC: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 32,
    "conv_dim": [16, 16, 16], "conv_stride": [5, 4, 2], "conv_kernel": [10, 4, 4], "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 3,
}  # fmt: skip
_WHISPER: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 16,
    "max_source_positions": 40, "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
_SPEECH_T5: dict[str, Any] = {
    **_WAV2VEC, "vocab_size": VOCAB, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "speaker_embedding_dim": 8,
    "speech_decoder_prenet_units": 16, "speech_decoder_postnet_units": 16, "num_mel_bins": 16,
    "speech_decoder_postnet_layers": 2,
}  # fmt: skip


def _mels(frames: int, decoder: bool) -> Any:
    def inputs(seed: int) -> dict[str, Any]:
        found = {"input_features": normal(seed, 2, 16, frames)}
        return found | ({"decoder_input_ids": ids(seed, 5)} if decoder else {})

    return inputs


def _frames(seed: int) -> dict[str, Any]:
    return {"input_features": normal(seed, 2, 24, 16)}


def _mono(seed: int) -> dict[str, Any]:
    return {"input_values": normal(seed, 2, 1, 1600)}


_add("wav2vec2", "Wav2Vec2ForCTC", wave(), **_WAV2VEC)
_add("wav2vec2, layer norm", "Wav2Vec2Model", wave(), **_WAV2VEC, do_stable_layer_norm=True, feat_extract_norm="layer")
_add("wav2vec2-conformer", "Wav2Vec2ConformerForCTC", wave(), **_WAV2VEC, conv_depthwise_kernel_size=3)
_add("wav2vec2-bert", "Wav2Vec2BertForCTC", _frames, vocab_size=32, hidden_size=32, intermediate_size=64,
     num_hidden_layers=3, num_attention_heads=4, feature_projection_input_dim=16,
     conv_depthwise_kernel_size=3)  # fmt: skip
_add("hubert", "HubertForCTC", wave(), **_WAV2VEC)
_add("data2vec-audio", "Data2VecAudioForCTC", wave(), **{k: v for k, v in _WAV2VEC.items() if k not in (
     "num_conv_pos_embeddings",)}, num_conv_pos_embeddings=2, conv_pos_kernel_size=5)  # fmt: skip
_add("wavlm", "WavLMForCTC", wave(), **_WAV2VEC)
_add("unispeech", "UniSpeechForCTC", wave(), **_WAV2VEC)
_add("unispeech-sat", "UniSpeechSatForCTC", wave(), **_WAV2VEC)
_add("sew", "SEWForCTC", wave(), **_WAV2VEC, squeeze_factor=2)
_add("sew-d", "SEWDForCTC", wave(), **_WAV2VEC, squeeze_factor=2, position_buckets=8)
_add("whisper", "WhisperForConditionalGeneration", _mels(80, True), **_WHISPER)
_add("speech_to_text", "Speech2TextForConditionalGeneration", lambda seed: {**_frames(seed),
     "decoder_input_ids": ids(seed, 5)}, vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2,
     encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
     input_feat_per_channel=16, input_channels=1, conv_channels=16, max_source_positions=40, max_target_positions=40,
     pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)  # fmt: skip
_add("moonshine", "MoonshineForConditionalGeneration", lambda seed: {**wave(4000)(seed),
     "decoder_input_ids": ids(seed, 5)}, vocab_size=VOCAB, hidden_size=32, intermediate_size=64,
     encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, encoder_num_attention_heads=4,
     decoder_num_attention_heads=4, max_position_embeddings=64, pad_token_id=0)  # fmt: skip
_add("speecht5, to text", "SpeechT5ForSpeechToText", lambda seed: {**wave()(seed), "decoder_input_ids": ids(seed, 5)},
     **_SPEECH_T5)  # fmt: skip
_add("speecht5, from text", "SpeechT5ForTextToSpeech", lambda seed: {
     "input_ids": ids(seed), "decoder_input_values": normal(seed, 2, 8, 16), "speaker_embeddings": normal(seed, 2, 8)},
     **_SPEECH_T5)  # fmt: skip
_add("speecht5, vocoder", "SpeechT5HifiGan", lambda seed: {"spectrogram": normal(seed, 10, 16)}, model_in_dim=16,
     upsample_initial_channel=32, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8])  # fmt: skip
_add("encodec", "EncodecModel", _mono, num_filters=4, hidden_size=16, codebook_size=16, codebook_dim=16,
     num_lstm_layers=2, upsampling_ratios=[8, 4], target_bandwidths=[12.0], sampling_rate=16000)  # fmt: skip
_add("dac", "DacModel", _mono, encoder_hidden_size=4, downsampling_ratios=[4, 4], decoder_hidden_size=16, n_codebooks=2,
     codebook_size=16, codebook_dim=4, hidden_size=16)  # fmt: skip
_add("mimi", "MimiModel", _mono, num_filters=4, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
     num_attention_heads=2, num_key_value_heads=2, head_dim=8, codebook_size=16, codebook_dim=16,
     vector_quantization_hidden_dimension=16, num_quantizers=4, upsampling_ratios=[8, 4],
     upsample_groups=16)  # fmt: skip
_add("audio-spectrogram-transformer", "ASTForAudioClassification", lambda seed: {"input_values": normal(
     seed, 2, 64, 16)}, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, patch_size=8,
     max_length=64, num_mel_bins=16)  # fmt: skip
_add("vits", "VitsModel", lambda seed: {"input_ids": ids(seed)}, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2,
     num_attention_heads=2, ffn_dim=64, flow_size=32, spectrogram_bins=9, upsample_initial_channel=32,
     upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8], depth_separable_channels=2, prior_encoder_num_flows=2,
     prior_encoder_num_wavenet_layers=2, posterior_encoder_num_wavenet_layers=2, wavenet_dilation_rate=1,
     partly="the posterior encoder is for training")  # fmt: skip
_add("musicgen, decoder", "MusicgenForCausalLM", lambda seed: {"input_ids": ids(seed).repeat(2, 1)}, vocab_size=VOCAB,
     hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, num_codebooks=2,
     max_position_embeddings=64)  # fmt: skip
