"""The image transform that belongs to weights: its description, and open_clip's own code for it."""

from __future__ import annotations

import inspect
from typing import Any, Callable, Dict, Literal, Optional, Sequence, Tuple

import msgspec

from clipval.errors import InputError
from clipval.library import import_open_clip, open_clip_version

ROUNDED = 1e-4  # of a mean written with four digits, 0.4815: 0.03 grey levels


class PreprocessSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How images are prepared for the weights; described independently of the code, so that a gate can compare the two.

    Attributes:
        mean, std: per channel, RGB, of pixel values in [0, 1].
        interpolation: `bicubic`, `bilinear`, or `random` (in training; bicubic here).
        resize_mode: `shortest` edge to the size and crop, `longest` edge and pad, or `squash` to the size.
        fill_color: grey level of the padding.
        source: where these values are from.
    """

    mean: Tuple[float, float, float]
    std: Tuple[float, float, float]
    source: str
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0

    def describe(self) -> str:
        """In short, e.g. `squash, bicubic, mean 0.5 0.5 0.5, std 0.5 0.5 0.5`."""
        numbers = [f"{name} {' '.join(f'{one:g}' for one in getattr(self, name))}" for name in ("mean", "std")]
        return ", ".join([self.resize_mode, self.interpolation, *numbers])

    def differs(self, other: PreprocessSpec) -> str:
        """The first property in which two transforms differ, as `mean`; "" if they give the same pixels."""
        for name in ("mean", "std"):
            pairs = zip(getattr(self, name), getattr(other, name))
            if any(abs(one - two) > ROUNDED for one, two in pairs):
                return name
        kernels = {one.interpolation.replace("random", "bicubic") for one in (self, other)}
        if len(kernels) > 1:
            return "interpolation"
        if self.resize_mode != other.resize_mode:
            return "resize_mode"
        return "fill_color" if self.resize_mode == "longest" and self.fill_color != other.fill_color else ""


# open_clip's own default (its constants.py), which holds for 138 of the 196 tags of open_clip 3.3.0.
DEFAULT = PreprocessSpec(
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    source="open_clip's default, assumed",
)


def of_config(found: Dict[str, Any], source: str) -> PreprocessSpec:
    """The transform that a tag's or a folder's config states; missing keys take open_clip's default."""
    mean, std = (_three(found.get(name)) for name in ("mean", "std"))
    return PreprocessSpec(
        mean=mean or DEFAULT.mean,
        std=std or DEFAULT.std,
        interpolation=found.get("interpolation") or DEFAULT.interpolation,
        resize_mode=found.get("resize_mode") or DEFAULT.resize_mode,
        fill_color=found.get("fill_color") or 0,
        source=source,
    )


def _three(value: Optional[Sequence[float]]) -> Optional[Tuple[float, float, float]]:
    if isinstance(value, (int, float)):
        return (float(value),) * 3
    return (float(value[0]), float(value[1]), float(value[2])) if value else None


def build(stated: PreprocessSpec, size: Tuple[int, int]) -> Callable[[Any], Any]:
    """open_clip's evaluation transform: PIL image -> float32 tensor [3, height, width].

    Raises:
        InputError: this version of open_clip does not support it.
    """
    open_clip = import_open_clip()
    more = {"resize_mode": stated.resize_mode, "interpolation": stated.interpolation, "fill_color": stated.fill_color}
    known = inspect.signature(open_clip.image_transform).parameters
    lacking = [name for name in ("resize_mode", "interpolation") if name not in known]
    plain = stated.resize_mode == "shortest" and stated.interpolation != "bilinear" and size[0] == size[1]
    if lacking and not plain:
        raise InputError(
            f"open_clip {open_clip_version()} cannot resize {stated.describe()} to {size}; it supports only shortest, "
            f"bicubic, square. "
            f"pip install 'open_clip_torch>=2.24'"
        )
    side: Any = size[0] if size[0] == size[1] else size
    made: Callable[[Any], Any] = open_clip.image_transform(
        side,
        is_train=False,
        mean=stated.mean,
        std=stated.std,
        **{name: value for name, value in more.items() if name in known},
    )
    return made
