"""Architectures of transformers that cannot be built where the zoo runs, and why. Shown at the end of ``make zoo``."""

from __future__ import annotations

CANNOT_RUN: dict[str, str] = {
    "dinat": "needs natten, which is not asked for here",
    "layoutlmv2": "needs detectron2, which is not asked for here",
    "timm_backbone, timm_wrapper, edgetam, fast_vlm, gemma3n with images": "need timm, which is not asked for here",
}
