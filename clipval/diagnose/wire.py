"""Protobuf's wire format, read without protobuf and without a schema: enough for the header of a dump file.

Source: the encoding guide of Protocol Buffers. Unknown fields are skipped, since newer CANN versions have more of them.
"""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """Bytes that are not a protobuf message."""


def fields(data: bytes) -> Dict[int, List[Any]]:
    """Field number -> values in order: int for varints and fixed ones, bytes for strings, messages and packed lists.

    Raises:
        WireError: the message is truncated or malformed.
    """
    found: Dict[int, List[Any]] = {}
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise WireError(f"field number 0 at byte {at}")
        if kind == VARINT:
            value, at = varint(data, at)
        elif kind in (FIXED64, FIXED32, BYTES):
            size, at = (8, at) if kind == FIXED64 else (4, at) if kind == FIXED32 else varint(data, at)
            if at + size > len(data):
                raise WireError(f"field {number} takes {size} bytes at byte {at} of {len(data)}")
            raw, at = data[at : at + size], at + size
            found.setdefault(number, []).append(raw if kind == BYTES else int.from_bytes(raw, "little"))
            continue
        else:
            raise WireError(f"field {number} has wire type {kind}")
        found.setdefault(number, []).append(value)
    return found


def varint(data: bytes, at: int) -> Tuple[int, int]:
    """The number at a position, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise WireError("ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
    raise WireError("a number of more than ten bytes")


def integers(values: List[Any]) -> List[int]:
    """A repeated integer field, packed (bytes) or not."""
    found: List[int] = []
    for value in values:
        at = 0
        if isinstance(value, int):
            found.append(value)
            continue
        while at < len(value):
            number, at = varint(value, at)
            found.append(number)
    return found


def text(values: List[Any]) -> str:
    """The last of a string field's values; empty for none."""
    return values[-1].decode("utf-8", "replace") if values and isinstance(values[-1], bytes) else ""


def number(values: List[Any], default: int = 0) -> int:
    """The last of an integer field's values."""
    return int(values[-1]) if values and isinstance(values[-1], int) else default
