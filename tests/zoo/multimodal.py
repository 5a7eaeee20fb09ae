"""Text with images, video or sound."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.architecture import VOCAB, Family, Inputs, ids, normal

MULTIMODAL = Family("multimodal")
_add = MULTIMODAL.hf

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_TWO: dict[str, Any] = {"text_config": _TEXT, "vision_config": _VIT, "projection_dim": 32}
_LLAMA: dict[str, Any] = {**_TEXT, "model_type": "llama", "num_key_value_heads": 2}
_CLIP: dict[str, Any] = {**_VIT, "model_type": "clip_vision_model", "projection_dim": 32}

_IMAGE = 98  # the token that stands for a patch


def _both(seed: int) -> dict[str, Any]:
    return {"input_ids": ids(seed, 8), "pixel_values": normal(seed, 2, 3, 32, 32)}


def _places(count: int, **more: Any) -> Inputs:
    """A sentence with so many places for patches, and an image."""

    def inputs(seed: int) -> dict[str, Any]:
        row = ids(seed, count + 6)
        row[:, 2 : 2 + count] = _IMAGE
        return {"input_ids": row, "pixel_values": normal(seed, 2, 3, 32, 32), **more}

    return inputs


def _qwen(seed: int) -> dict[str, Any]:
    """One image of 4 x 4 patches, which the model merges to 2 x 2."""
    row = ids(seed, 10)[:1]
    row[:, 2], row[:, 3:7], row[:, 7] = 95, _IMAGE, 96
    kinds = (row == _IMAGE).long()
    return {
        "input_ids": row,
        "pixel_values": normal(seed, 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": kinds,
    }


_QWEN_TEXT = {**_TEXT, "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}  # fmt: skip
_QWEN_IDS = {"image_token_id": _IMAGE, "video_token_id": 97, "vision_start_token_id": 95, "vision_end_token_id": 96}

_add("clip", "CLIPModel", _both, **_TWO)
_add("clip, text", "CLIPTextModelWithProjection", lambda seed: {"input_ids": ids(seed)}, **_TEXT, projection_dim=32)
_add("clip, vision", "CLIPVisionModelWithProjection", lambda seed: {"pixel_values": normal(seed, 2, 3, 32, 32)}, **_VIT,
     projection_dim=32)  # fmt: skip
_add("siglip", "SiglipModel", _both, **{k: v for k, v in _TWO.items() if k != "projection_dim"})
_add("chinese_clip", "ChineseCLIPModel", _both, **_TWO)
_add("altclip", "AltCLIPModel", _both, text_config={**_TEXT, "project_dim": 32}, vision_config=_VIT, projection_dim=32)
_add("metaclip_2", "MetaClip2Model", _both, **_TWO)
_add("align", "AlignModel", _both, text_config=_TEXT, projection_dim=80, vision_config={
    "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 32})  # fmt: skip
_add("groupvit", "GroupViTModel", _both, text_config=_TEXT, projection_dim=32, projection_intermediate_dim=32,
     vision_config={**_VIT, "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4,
     0]})  # fmt: skip
_add("clipseg", "CLIPSegForImageSegmentation", _both, text_config=_TEXT, vision_config=_VIT, projection_dim=32,
     extract_layers=[0, 1, 2], reduce_dim=16, decoder_num_attention_heads=4, decoder_intermediate_size=32)  # fmt: skip
_add("flava", "FlavaModel", _both, text_config=_TEXT, image_config=_VIT, multimodal_config={
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}, hidden_size=32,
    projection_dim=32, image_codebook_config={"hidden_size": 8, "num_groups": 2, "vocab_size": 32})  # fmt: skip
_add("clap", "ClapTextModelWithProjection", lambda seed: {"input_ids": ids(seed)}, **_TEXT, projection_dim=32)
_add("vilt", "ViltForQuestionAnswering", _both, **_TEXT, image_size=32, patch_size=8)
_add("bridgetower", "BridgeTowerModel", _both, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
     text_config={**_TEXT, "hidden_size": 64}, vision_config={"hidden_size": 64, "num_hidden_layers": 3,
     "image_size": 32, "patch_size": 8})  # fmt: skip
_add("blip", "BlipForConditionalGeneration", _both, text_config={**_TEXT, "encoder_hidden_size": 32},
     vision_config=_VIT, projection_dim=32)  # fmt: skip
_add("blip, retrieval", "BlipForImageTextRetrieval", _both, text_config={**_TEXT, "encoder_hidden_size": 32},
     vision_config=_VIT, projection_dim=32, image_text_hidden_size=16)  # fmt: skip
_add("blip-2", "Blip2ForConditionalGeneration", _places(4), num_query_tokens=4, image_token_index=_IMAGE,
     vision_config=_VIT, text_config={"model_type": "opt", "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 64,
     "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
     qformer_config={"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
     "num_attention_heads": 4, "encoder_hidden_size": 32})  # fmt: skip
_add("git", "GitForCausalLM", _both, **_TEXT, vision_config=_VIT)
_add("llava", "LlavaForConditionalGeneration", _places(16), vision_config=_CLIP, text_config=_LLAMA,
     image_token_index=_IMAGE)  # fmt: skip
_add("vipllava", "VipLlavaForConditionalGeneration", _places(16), vision_config=_CLIP, text_config=_LLAMA,
     image_token_index=_IMAGE, vision_feature_layers=[-1, -2])  # fmt: skip
_add("paligemma", "PaliGemmaForConditionalGeneration", _places(16), image_token_index=_IMAGE, projection_dim=32,
     vision_config={**_VIT, "model_type": "siglip_vision_model", "projection_dim": 32},
     text_config={**_LLAMA, "model_type": "gemma", "head_dim": 8})  # fmt: skip
_add("gemma3, with images", "Gemma3ForConditionalGeneration", _places(4, token_type_ids=torch.zeros(2, 10).long()),
     image_token_index=_IMAGE, mm_tokens_per_image=4, vision_config={**_VIT, "model_type": "siglip_vision_model"},
     text_config={**_LLAMA, "model_type": "gemma3_text", "head_dim": 8})  # fmt: skip
_add("idefics", "IdeficsForVisionText2Text", lambda seed: {**_both(seed), "pixel_values": normal(seed, 2, 1, 3, 32, 32),
     "image_attention_mask": torch.ones(2, 8, 1).long()}, **(_TEXT | {"num_hidden_layers": 4}),
     additional_vocab_size=1, cross_layer_interval=2,
     vision_config={"embed_dim": 32, "image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "intermediate_size": 64,
     "num_attention_heads": 4})  # fmt: skip
_add("idefics2", "Idefics2ForConditionalGeneration", lambda seed: {**_places(4)(seed), "pixel_values": normal(
     seed, 2, 1, 3, 32, 32)}, image_token_id=_IMAGE, vision_config=_VIT, text_config={**_LLAMA,
     "model_type": "mistral"},
     perceiver_config={"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
     "resampler_head_dim": 8, "num_key_value_heads": 2})  # fmt: skip
_add("idefics3", "Idefics3ForConditionalGeneration", lambda seed: {**_places(4)(seed), "pixel_values": normal(
     seed, 2, 1, 3, 32, 32)}, image_token_id=_IMAGE, scale_factor=2, vision_config=_VIT,
     text_config=_LLAMA)  # fmt: skip
_add("smolvlm", "SmolVLMForConditionalGeneration", lambda seed: {**_places(4)(seed), "pixel_values": normal(
     seed, 2, 1, 3, 32, 32)}, image_token_id=_IMAGE, scale_factor=2, vision_config=_VIT,
     text_config=_LLAMA)  # fmt: skip
_add("qwen2_vl", "Qwen2VLForConditionalGeneration", _qwen, text_config=_QWEN_TEXT, **_QWEN_IDS, vision_config={
     "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2})  # fmt: skip
_add("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", _qwen, text_config=_QWEN_TEXT, **_QWEN_IDS, vision_config={
     "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4,
     "window_size": 16, "fullatt_block_indexes": [1]})  # fmt: skip
_add("qwen3_vl", "Qwen3VLForConditionalGeneration", _qwen, text_config={**_QWEN_TEXT, "head_dim": 8}, **_QWEN_IDS,
     vision_config={"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4,
     "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]})  # fmt: skip
_add("aya_vision", "AyaVisionForConditionalGeneration", _places(4), image_token_index=_IMAGE, downsample_factor=2,
     alignment_intermediate_size=64, vision_feature_select_strategy="full",
     vision_config={**_VIT, "model_type": "siglip_vision_model"},
     text_config={**_LLAMA, "model_type": "cohere2"})  # fmt: skip
_add("pix2struct", "Pix2StructForConditionalGeneration", lambda seed: {"flattened_patches": normal(seed, 2, 9,
     50).abs(),
     "decoder_input_ids": ids(seed, 5)}, vision_config={"hidden_size": 32, "patch_embed_hidden_size": 48, "d_ff": 64,
     "d_kv": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "seq_len": 64}, text_config={"vocab_size": VOCAB,
     "hidden_size": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4})  # fmt: skip
_add("trocr", "TrOCRForCausalLM", lambda seed: {"input_ids": ids(seed)}, vocab_size=VOCAB, d_model=32, decoder_layers=3,
     decoder_attention_heads=4, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=0)  # fmt: skip
_add("x-clip, text", "XCLIPTextModel", lambda seed: {"input_ids": ids(seed)}, **_TEXT)
_add("perceiver", "PerceiverForMaskedLM", lambda seed: {"inputs": ids(seed)}, vocab_size=VOCAB, d_model=32,
     d_latents=32,
     num_latents=8, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4, num_cross_attention_heads=4,
     max_position_embeddings=16, qk_channels=32, v_channels=32)  # fmt: skip
_add("lxmert", "LxmertModel", lambda seed: {"input_ids": ids(seed), "visual_feats": normal(seed, 2, 4, 16),
     "visual_pos": normal(seed, 2, 4, 4).abs()}, **_TEXT, l_layers=2, r_layers=2, x_layers=2,
     visual_feat_dim=16)  # fmt: skip
_add("visual_bert", "VisualBertModel", lambda seed: {"input_ids": ids(seed), "visual_embeds": normal(seed, 2, 4, 16)},
     **_TEXT, visual_embedding_dim=16)  # fmt: skip
_add("layoutlmv3", "LayoutLMv3Model", lambda seed: {**_both(seed), "bbox": torch.arange(4).expand(2, 8, 4) * 10},
     **_TEXT,
     input_size=32, patch_size=8, coordinate_size=4, shape_size=8, num_channels=3)  # fmt: skip
