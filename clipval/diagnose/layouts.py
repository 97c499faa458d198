"""Convert an NPU's storage layouts to row-major order: FRACTAL_NZ, NC1HWC0 and NHWC.

Source: msaccucmp's format converters (Ascend msprobe 8ff00da, `format_manager/builtin_format_convert`), which do not
crop NC1HWC0's channels and do not support a FRACTAL_NZ vector; both are done here. Padding need not be zero.
"""

from __future__ import annotations

from typing import Sequence, Tuple

import numpy as np

from clipval.errors import InputError

# Format numbers in a dump: `format` of `toolkit.dump.OpOutput` (hicann runtime 681ef76, dump_task.proto).
FORMATS = {0: "NCHW", 1: "NHWC", 2: "ND", 3: "NC1HWC0", 4: "FRACTAL_Z", 12: "NC1HWC0_C04", 29: "FRACTAL_NZ"}


def plain(values: np.ndarray, form: str, original: Sequence[int]) -> np.ndarray:
    """A stored tensor in the order and shape that it has in the model.

    Args:
        values: of the stored shape.
        form: one of `FORMATS`.
        original: the model's shape; empty if unknown, then padding stays.

    Raises:
        InputError: the shapes are inconsistent, or the format is not one of activations.
    """
    wanted = tuple(original)
    if form == "FRACTAL_NZ":
        return _from_fractal_nz(values, wanted)
    if form in ("NC1HWC0", "NC1HWC0_C04"):
        return _from_nc1hwc0(values, wanted)
    if form == "NHWC" and len(wanted) == 4 and values.shape != wanted:
        values = values.transpose(0, 3, 1, 2)
    if form not in ("NCHW", "NHWC", "ND"):
        raise InputError(f"format {form}: a layout of weights, not of activations; shape {list(values.shape)}")
    if not wanted or values.shape == wanted:
        return values
    if values.size != int(np.prod(wanted, dtype=np.int64)):
        raise InputError(f"format {form}: stored as {list(values.shape)}, original shape is {list(wanted)}")
    return values.reshape(wanted)


def _from_fractal_nz(values: np.ndarray, wanted: Tuple[int, ...]) -> np.ndarray:
    """[..., C1, M1, M0, C0] -> [..., M, C]; a vector has one row."""
    if values.ndim < 4:
        raise InputError(f"format FRACTAL_NZ: stored as {list(values.shape)}, expected four axes or more")
    c1, m1, m0, c0 = values.shape[-4:]
    wide = values.reshape(-1, c1, m1, m0, c0).transpose(0, 2, 3, 1, 4).reshape(-1, m1 * m0, c1 * c0)
    if not wanted:
        return wide.reshape(*values.shape[:-4], m1 * m0, c1 * c0)
    rows, columns = (1, wanted[0]) if len(wanted) == 1 else (wanted[-2], wanted[-1])
    batch = int(np.prod(wanted[:-2], dtype=np.int64))
    if batch != len(wide) or rows > m1 * m0 or columns > c1 * c0:
        raise InputError(f"format FRACTAL_NZ: stored as {list(values.shape)}, original shape is {list(wanted)}")
    return np.ascontiguousarray(wide[:, :rows, :columns]).reshape(wanted)


def _from_nc1hwc0(values: np.ndarray, wanted: Tuple[int, ...]) -> np.ndarray:
    """[N, C1, H, W, C0] -> [N, C, H, W], the channels cut to the model's."""
    if values.ndim != 5:
        raise InputError(f"format NC1HWC0: stored as {list(values.shape)}, expected five axes")
    n, c1, h, w, c0 = values.shape
    whole = values.transpose(0, 1, 4, 2, 3).reshape(n, c1 * c0, h, w)
    if not wanted:
        return whole
    if len(wanted) != 4 or wanted[0] != n or wanted[2:] != (h, w) or wanted[1] > c1 * c0:
        raise InputError(f"format NC1HWC0: stored as {list(values.shape)}, original shape is {list(wanted)}")
    return np.ascontiguousarray(whole[:, : wanted[1]])
