"""Detection and segmentation by queries."""

from __future__ import annotations

from typing import Any

from tests.zoo.architecture import Family, ids, image, normal

DETECTION = Family("detection")
_add = DETECTION.hf

_RESNET: dict[str, Any] = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}  # fmt: skip
_THREE = _RESNET | {"out_features": ["stage2", "stage3", "stage4"]}
_FOUR = _RESNET | {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
_DETR: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 10, "use_timm_backbone": False, "backbone": None,
    "use_pretrained_backbone": False,
}  # fmt: skip
_ONE = {"backbone_config": _RESNET}
_MANY = {"backbone_config": _THREE}

_add("detr", "DetrForObjectDetection", image(64), **_DETR, **_ONE)
_add("detr, segmentation", "DetrForSegmentation", image(64), **(
    _DETR | {"d_model": 128, "encoder_attention_heads": 8}
), backbone_config=_FOUR)  # fmt: skip
_add("conditional_detr", "ConditionalDetrForObjectDetection", image(64), **_DETR, **_ONE)
_add("table-transformer", "TableTransformerForObjectDetection", image(64), **_DETR, **_ONE)
_add("deformable_detr", "DeformableDetrForObjectDetection", image(64), **_DETR, **_MANY, disable_custom_kernels=True)
_add(
    "deformable_detr, two stages", "DeformableDetrForObjectDetection", image(64), **_DETR, **_MANY, two_stage=True,
    two_stage_num_proposals=10,
    with_box_refine=True, disable_custom_kernels=True,
)  # fmt: skip
_add("dab-detr", "DabDetrForObjectDetection", image(64), **(
    {key: value for key, value in _DETR.items() if key not in ("d_model",)} | {"hidden_size": 32}
), **_ONE)  # fmt: skip
_add("yolos", "YolosForObjectDetection", image(), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
     num_attention_heads=4, image_size=[32, 32], patch_size=8, num_detection_tokens=10)  # fmt: skip
_add(
    "rt_detr", "RTDetrForObjectDetection", image(64),
    backbone_config={"model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 32, 64],
                     "depths": [1, 1, 1, 1], "out_features": ["stage2", "stage3", "stage4"]},
    encoder_hidden_dim=32, encoder_in_channels=[16, 32, 64], encoder_ffn_dim=64, encoder_attention_heads=4, d_model=32,
    num_queries=10, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64, decoder_layers=2, decoder_attention_heads=4,
    num_denoising=0, anchor_image_size=None, disable_custom_kernels=True,
)  # fmt: skip
_add(
    "mask2former", "Mask2FormerForUniversalSegmentation", image(64), needs="scipy",
    backbone_config={"model_type": "swin", "image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1],
                     "num_heads": [1, 2, 4, 8], "window_size": 4, "out_features": ["stage1", "stage2", "stage3",
                     "stage4"]},
    hidden_dim=32, mask_feature_size=32, feature_size=32, encoder_layers=2, decoder_layers=3, num_attention_heads=4,
    dim_feedforward=64, encoder_feedforward_dim=64, num_queries=10,
)  # fmt: skip
_add(
    "maskformer", "MaskFormerForInstanceSegmentation", image(64), needs="scipy", mask_feature_size=32,
    fpn_feature_size=32,
    backbone_config={"model_type": "swin", "image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1],
                     "num_heads": [1, 2, 4, 8], "window_size": 4, "out_features": ["stage1", "stage2", "stage3",
                     "stage4"]},
    decoder_config={"model_type": "detr", "num_queries": 10, **{k: v for k, v in _DETR.items() if k.endswith(
        ("layers", "heads", "dim", "d_model"))}},
)  # fmt: skip
_add(
    "owlvit", "OwlViTForObjectDetection",
    lambda seed: {"pixel_values": normal(seed, 1, 3, 32, 32), "input_ids": ids(seed, 8)},
    text_config={"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "max_position_embeddings": 16},
    vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "image_size": 32, "patch_size": 8}, projection_dim=32,
)  # fmt: skip
