"""Who uses an NPU: others, or this process, whose pid npu-smi may show as another one.

In a container npu-smi shows the host's pids, so that our own row is not known by its pid, which can even be another
process's there. What appears on the NPU while we open a session there is ours.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Dict, Iterator, Set

from clipval.ascend import npu_smi

_before: Dict[int, npu_smi.Npu] = {}  # each NPU as it was before this process used it
_own_pids: Set[int] = set()


@contextmanager
def opening(device_id: int) -> Iterator[None]:
    """While a session is opened on a device: what appears there meanwhile is this process; see `npu_smi.appeared`.

    Raises:
        BackendUnavailable, ToolFailed: see `clipval.ascend.npu_smi.npu`.
    """
    before = npu_smi.npu(device_id)
    _before.setdefault(device_id, before)
    yield
    _own_pids.update(npu_smi.appeared(before, npu_smi.npu(device_id)))


def others(device_id: int) -> str:
    """What else uses a device, in words; empty for nothing, and before a session of ours was opened there."""
    if device_id not in _before:
        return ""
    return _before[device_id].why_busy(ignore_pids=_own_pids) or npu_smi.npu(device_id).why_busy(ignore_pids=_own_pids)
