"""Vision: images in, features, classes or maps out."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.architecture import Family, image, normal

VISION = Family("vision")
_add = VISION.hf

_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2, 1], "num_heads": [2, 2, 4], "window_size": 4,
}  # fmt: skip
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1]}


def _masked_patches(seed: int) -> dict[str, Any]:
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, ::3] = True
    return {"pixel_values": normal(seed, 2, 3, 32, 32), "bool_masked_pos": mask}


def _video(seed: int) -> dict[str, Any]:
    return {"pixel_values": normal(seed, 2, 4, 3, 32, 32)}


_add("vit", "ViTForImageClassification", image(), **_VIT)
_add("vit, masked", "ViTForMaskedImageModeling", _masked_patches, **_VIT, encoder_stride=8)
_add("vit_mae", "ViTMAEModel", image(), **_VIT)
_add("vit_msn", "ViTMSNModel", image(), **_VIT)
_add("vitdet", "VitDetModel", image(), hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=32,
     patch_size=8, pretrain_image_size=32, window_size=2, window_block_indices=[0, 2])  # fmt: skip
_add("deit", "DeiTForImageClassificationWithTeacher", image(), **_VIT)
_add("beit", "BeitForImageClassification", image(), **_VIT, use_relative_position_bias=True, layer_scale_init_value=0.1)
_add("data2vec-vision", "Data2VecVisionForImageClassification", image(), **_VIT, use_relative_position_bias=True)
_add("dinov2", "Dinov2ForImageClassification", image(), **_VIT)
_add("dinov2, swiglu", "Dinov2Model", image(), **_VIT, use_swiglu_ffn=True)
_add("dinov2_with_registers", "Dinov2WithRegistersModel", image(), **_VIT)
_add("dinov3_vit", "DINOv3ViTModel", image(), **_VIT)
_add("dinov3_convnext", "DINOv3ConvNextModel", image(64), **_STAGES)
_add("ijepa", "IJepaModel", image(), **_VIT)
_add("swin", "SwinForImageClassification", image(), **_SWIN)
_add("swinv2", "Swinv2ForImageClassification", image(), **_SWIN)
_add("swin2sr", "Swin2SRForImageSuperResolution", image(), image_size=32, patch_size=1, embed_dim=16, depths=[1, 1],
     num_heads=[2, 2], window_size=4, upscale=2)  # fmt: skip
_add("donut-swin", "DonutSwinModel", image(), **_SWIN)
_add("maskformer-swin", "MaskFormerSwinModel", image(), **_SWIN)
_add("convnext", "ConvNextForImageClassification", image(64), **_STAGES)
_add("convnextv2", "ConvNextV2ForImageClassification", image(64), **_STAGES)
_add("resnet", "ResNetForImageClassification", image(), embedding_size=8, **_STAGES)
_add("regnet", "RegNetForImageClassification", image(), embedding_size=8, groups_width=8, **_STAGES)
_add("bit", "BitForImageClassification", image(), embedding_size=8, num_groups=4, **_STAGES)
_add("mobilenet_v1", "MobileNetV1ForImageClassification", image(), depth_multiplier=0.25, min_depth=4)
_add("mobilenet_v2", "MobileNetV2ForImageClassification", image(), depth_multiplier=0.25, min_depth=4)
_add("mobilevit", "MobileViTForImageClassification", image(64), hidden_sizes=[16, 24, 32], image_size=64,
     neck_hidden_sizes=[8, 8, 16, 24, 32, 32, 64])  # fmt: skip
_add("mobilevitv2", "MobileViTV2ForImageClassification", image(64), width_multiplier=0.25, image_size=64)
_add("efficientnet", "EfficientNetForImageClassification", image(), width_coefficient=0.25, depth_coefficient=0.3,
     hidden_dim=320)  # fmt: skip
_add("levit", "LevitForImageClassification", image(64), image_size=64, hidden_sizes=[16, 24, 32], key_dim=[8, 8, 8],
     num_attention_heads=[2, 3, 4], depths=[1, 1, 1])  # fmt: skip
_add("poolformer", "PoolFormerForImageClassification", image(), **_STAGES)
_add("pvt", "PvtForImageClassification", image(64), image_size=64, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1],
     num_attention_heads=[1, 2, 4, 8])  # fmt: skip
_add("pvt_v2", "PvtV2ForImageClassification", image(64), hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1],
     num_attention_heads=[1, 2, 4, 8])  # fmt: skip
_add("cvt", "CvtForImageClassification", image(64), embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3])
_add("focalnet", "FocalNetForImageClassification", image(), image_size=32, patch_size=2, embed_dim=16, depths=[1, 2, 1],
     focal_levels=[2, 2, 2], focal_windows=[3, 3, 3])  # fmt: skip
_add("hiera", "HieraModel", image(64), image_size=[64, 64], embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
_add("segformer", "SegformerForSemanticSegmentation", image(64), hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1],
     num_attention_heads=[1, 2, 4, 8], decoder_hidden_size=16)  # fmt: skip
_add("glpn", "GLPNForDepthEstimation", image(64), hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1],
     num_attention_heads=[1, 2, 4, 8], decoder_hidden_size=16)  # fmt: skip
_add("dpt", "DPTForDepthEstimation", image(), **_VIT, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16,
     16],
     fusion_hidden_size=16, is_hybrid=False)  # fmt: skip
_add("videomae", "VideoMAEForVideoClassification", _video, **_VIT, num_frames=4)
_add("vivit", "VivitForVideoClassification", _video, **{k: v for k, v in _VIT.items() if k != "patch_size"},
     num_frames=4,
     tubelet_size=[2, 8, 8])  # fmt: skip
_add("timesformer", "TimesformerForVideoClassification", _video, **_VIT, num_frames=4)
_add("imagegpt", "ImageGPTForCausalImageModeling", lambda seed: {"input_ids": torch.randint(
     0, 60, (2, 12), generator=torch.Generator().manual_seed(seed))}, vocab_size=65, n_positions=64, n_embd=32,
     n_layer=4,
     n_head=4)  # fmt: skip
_add("superpoint", "SuperPointForKeypointDetection", image(64), encoder_hidden_sizes=[8, 8, 16, 16],
     decoder_hidden_size=32, keypoint_decoder_dim=65, descriptor_decoder_dim=32)  # fmt: skip
