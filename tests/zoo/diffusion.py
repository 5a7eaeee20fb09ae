"""Models of diffusers: denoisers, transformers, autoencoders and what steers them."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.architecture import Family, Inputs, normal

DIFFUSION = Family("diffusion")
_add = DIFFUSION.diffusers

_UNET: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": 16, "attention_head_dim": 4, "in_channels": 4,
}  # fmt: skip
_CROSS: dict[str, Any] = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
_VAE: dict[str, Any] = {
    "block_out_channels": [16, 32], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16,
}  # fmt: skip
_SPATIAL: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8}


def _noisy(channels: int = 4, size: int = 16, **shapes: tuple[int, ...]) -> Inputs:
    """A noisy image, its time step, and more by shape."""

    def inputs(seed: int) -> dict[str, Any]:
        more = {key: normal(seed + 1, *shape) for key, shape in shapes.items()}
        return {"sample": normal(seed, 2, channels, size, size), "timestep": torch.tensor([7, 7]), **more}

    return inputs


def _hidden(*shape: int, **shapes: tuple[int, ...]) -> Inputs:
    def inputs(seed: int) -> dict[str, Any]:
        more = {key: normal(seed + 1, *one) for key, one in shapes.items()}
        return {"hidden_states": normal(seed, *shape), "timestep": torch.tensor([7, 7]), **more}

    return inputs


def _image(seed: int) -> dict[str, Any]:
    return {"sample": normal(seed, 2, 3, 16, 16)}


def _dit(seed: int) -> dict[str, Any]:
    return {**_hidden(2, 4, 8, 8)(seed), "class_labels": torch.tensor([1, 2])}


def _pixart(seed: int) -> dict[str, Any]:
    found = _hidden(2, 4, 8, 8, encoder_hidden_states=(2, 5, 16))(seed)
    return {**found, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _flux(seed: int) -> dict[str, Any]:
    found = _hidden(2, 16, 4, encoder_hidden_states=(2, 5, 16), pooled_projections=(2, 8))(seed)
    return {**found, "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3), "timestep": torch.tensor([0.5, 0.5])}


def _kandinsky(seed: int) -> dict[str, Any]:
    return {
        **_noisy(encoder_hidden_states=(2, 5, 16))(seed),
        "added_cond_kwargs": {"image_embeds": normal(seed, 2, 16)},
    }


def _xl(seed: int) -> dict[str, Any]:
    found = _noisy(encoder_hidden_states=(2, 5, 16))(seed)
    return {**found, "added_cond_kwargs": {"text_embeds": normal(seed, 2, 16), "time_ids": torch.ones(2, 6)}}


_add("UNet1DModel", "UNet1DModel", lambda seed: {"sample": normal(seed, 2, 14, 16), "timestep": 7},
     block_out_channels=[8, 16], in_channels=14, out_channels=14, time_embedding_type="positional",
     use_timestep_embedding=True,
     down_block_types=["DownResnetBlock1D"] * 2, up_block_types=["UpResnetBlock1D"],
     mid_block_type="MidResTemporalBlock1D",
     out_block_type="OutConv1DBlock", act_fn="mish", flip_sin_to_cos=False, freq_shift=1.0,
     layers_per_block=1)  # fmt: skip
_add("UNet2DModel", "UNet2DModel", _noisy(3), sample_size=16, block_out_channels=[16, 32], layers_per_block=1,
     norm_num_groups=4, attention_head_dim=4, in_channels=3, out_channels=3, down_block_types=["DownBlock2D",
     "AttnDownBlock2D"],
     up_block_types=["AttnUpBlock2D", "UpBlock2D"])  # fmt: skip
_add("UNet2DConditionModel", "UNet2DConditionModel", _noisy(encoder_hidden_states=(2, 5, 16)), **_UNET, **_CROSS)
_add("UNet2DConditionModel, XL", "UNet2DConditionModel", _xl, **_UNET, **_CROSS, addition_embed_type="text_time",
     addition_time_embed_dim=8, projection_class_embeddings_input_dim=64, use_linear_projection=True,
     transformer_layers_per_block=[2, 1])  # fmt: skip
_add("UNet2DConditionModel, Kandinsky", "UNet2DConditionModel", _kandinsky, **_UNET, addition_embed_type="image",
     encoder_hid_dim=16, encoder_hid_dim_type="image_proj", resnet_time_scale_shift="scale_shift",
     down_block_types=["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
     up_block_types=["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
     mid_block_type="UNetMidBlock2DSimpleCrossAttn",
     )  # fmt: skip
_add("UNet3DConditionModel", "UNet3DConditionModel", lambda seed: {"sample": normal(seed, 2, 4, 3, 16, 16),
     "timestep": torch.tensor([7, 7]), "encoder_hidden_states": normal(seed, 2, 5, 16)}, **_UNET,
     down_block_types=["CrossAttnDownBlock3D", "DownBlock3D"], up_block_types=["UpBlock3D",
     "CrossAttnUpBlock3D"])  # fmt: skip
_add("ControlNetModel", "ControlNetModel", _noisy(encoder_hidden_states=(2, 5, 16), controlnet_cond=(2, 3, 32, 32)),
     **{k: v for k, v in _UNET.items() if k != "sample_size"}, down_block_types=_CROSS["down_block_types"],
     conditioning_embedding_out_channels=[8, 16])  # fmt: skip
_add("AutoencoderKL", "AutoencoderKL", _image, **_VAE)
_add("AsymmetricAutoencoderKL", "AsymmetricAutoencoderKL", _image, down_block_out_channels=[16, 32], norm_num_groups=4,
     up_block_out_channels=[16, 32], down_block_types=["DownEncoderBlock2D"] * 2,
     up_block_types=["UpDecoderBlock2D"] * 2,
     latent_channels=4)  # fmt: skip
_add("AutoencoderTiny", "AutoencoderTiny", _image, encoder_block_out_channels=[16, 16],
     decoder_block_out_channels=[16, 16],
     num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1])  # fmt: skip
_add("VQModel", "VQModel", _image, block_out_channels=[16, 32], down_block_types=["DownEncoderBlock2D"] * 2,
     up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=3, norm_num_groups=4, num_vq_embeddings=16)  # fmt: skip
_add("ConsistencyDecoderVAE", "ConsistencyDecoderVAE", _image, encoder_block_out_channels=[16, 32], latent_channels=4,
     encoder_down_block_types=["DownEncoderBlock2D"] * 2, decoder_block_out_channels=[16, 32],
     encoder_layers_per_block=1, encoder_norm_num_groups=4, decoder_norm_num_groups=4, decoder_layers_per_block=1,
     decoder_down_block_types=["ResnetDownsampleBlock2D"] * 2, decoder_up_block_types=["ResnetUpsampleBlock2D"] * 2,
     decoder_in_channels=7)  # fmt: skip
_add("DiTTransformer2DModel", "DiTTransformer2DModel", _dit, **_SPATIAL, in_channels=4, out_channels=8, patch_size=2,
     num_embeds_ada_norm=10)  # fmt: skip
_add("PixArtTransformer2DModel", "PixArtTransformer2DModel", _pixart, **_SPATIAL, in_channels=4, out_channels=8,
     cross_attention_dim=16, caption_channels=16, use_additional_conditions=False)  # fmt: skip
_add("Transformer2DModel", "Transformer2DModel", lambda seed: {"hidden_states": normal(seed, 2, 16, 8, 8)},
     in_channels=16,
     num_attention_heads=2, attention_head_dim=8, num_layers=3, norm_num_groups=4)  # fmt: skip
_add("SD3Transformer2DModel", "SD3Transformer2DModel", _hidden(2, 4, 8, 8, encoder_hidden_states=(2, 5, 16),
     pooled_projections=(2, 16)), **_SPATIAL, patch_size=2, in_channels=4, out_channels=4, joint_attention_dim=16,
     caption_projection_dim=16, pooled_projection_dim=16)  # fmt: skip
_add("FluxTransformer2DModel", "FluxTransformer2DModel", _flux, patch_size=1, in_channels=4, num_layers=2,
     num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8,
     axes_dims_rope=[4, 4, 8])  # fmt: skip
_add("AuraFlowTransformer2DModel", "AuraFlowTransformer2DModel", _hidden(2, 4, 8, 8, encoder_hidden_states=(2, 5, 16)),
     sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=2,
     attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16,
     pos_embed_max_size=64)  # fmt: skip
_add("SanaTransformer2DModel", "SanaTransformer2DModel", _hidden(2, 4, 8, 8, encoder_hidden_states=(2, 5, 16)),
     sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
     num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
     caption_channels=16)  # fmt: skip
_add("UVit2DModel", "UVit2DModel", lambda seed: {"input_ids": torch.arange(64).view(1, 8, 8) % 16 + seed,
     "encoder_hidden_states": normal(seed, 1, 5, 16), "pooled_text_emb": normal(seed, 1, 16),
     "micro_conds": torch.ones(1, 5)}, hidden_size=16, cond_embed_dim=16, encoder_hidden_size=16,
     micro_cond_encode_dim=8,
     micro_cond_embed_dim=40, block_out_channels=16, block_num_heads=1, num_hidden_layers=2, num_attention_heads=2,
     intermediate_size=32, codebook_size=24, vocab_size=32, in_channels=16)  # fmt: skip
_add("PriorTransformer", "PriorTransformer", _hidden(2, 16, proj_embedding=(2, 16), encoder_hidden_states=(2, 5, 16)),
     num_attention_heads=2, attention_head_dim=8, num_layers=3, embedding_dim=16, num_embeddings=5,
     additional_embeddings=4)  # fmt: skip
_add("T2IAdapter", "T2IAdapter", lambda seed: {"x": normal(seed, 2, 3, 32, 32)}, channels=[16, 32], num_res_blocks=1,
     downscale_factor=2)  # fmt: skip
