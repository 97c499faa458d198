"""Floating-point operations of a model, to convert samples/s to FLOP/s."""

from __future__ import annotations

from typing import Any, Dict, Optional


def flops_per_sample(config: Dict[str, Any], tower: str) -> Optional[float]:
    """Floating-point operations of one sample, a multiply-add counted as two; None if it is not a plain CLIP ViT.

    8.82e9 and 5.96e9 for ViT-B-32, as in open_clip's docs/model_profile.csv; within 0.25 % of that table for every
    plain ViT in it. None for CoCa, whose attention poolers are not counted.

    Args:
        config: open_clip's config of the model; tower: `vision` or `text`.
    """
    part = config["vision_cfg"] if tower == "vision" else config["text_cfg"]
    known = isinstance(part.get("layers"), int) and isinstance(part.get("image_size", 0), int)
    if not known or "multimodal_cfg" in config or "timm_model_name" in part or "hf_model_name" in part:
        return None
    width, ratio = part["width"], part.get("mlp_ratio", 4.0)
    stem = 0.0
    if tower == "vision":
        patches = (part["image_size"] // part["patch_size"]) ** 2
        tokens, stem = patches + 1, patches * width * 3 * part["patch_size"] ** 2
    else:
        tokens = part.get("context_length", 77)
    layer = (4 + 2 * ratio) * width**2 * tokens + 2 * tokens**2 * width
    return float(2 * (stem + part["layers"] * layer + width * config["embed_dim"]))
