"""Who uses an NPU: other processes, or this one, whose pid npu-smi may show as another number.

In a container npu-smi shows the host's pids, so our own row cannot be found by our pid, which may even be another
process's on the host. A process that appears on the NPU while we open a session is ours.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Dict, Iterator, Set

from clipval.ascend import npu_smi

_before: Dict[int, npu_smi.Npu] = {}  # state of each NPU before this process used it
_own_pids: Set[int] = set()


@contextmanager
def opening(device_id: int) -> Iterator[None]:
    """Wraps the opening of a session: processes that appear on the device are this one; see `npu_smi.appeared`.

    Raises:
        BackendUnavailable, ToolFailed: see `clipval.ascend.npu_smi.npu`.
    """
    before = npu_smi.npu(device_id)
    _before.setdefault(device_id, before)
    yield
    _own_pids.update(npu_smi.appeared(before, npu_smi.npu(device_id)))


def others(device_id: int) -> str:
    """What else uses a device; empty for nothing, and before we opened a session there."""
    if device_id not in _before:
        return ""
    return _before[device_id].why_busy(ignore_pids=_own_pids) or npu_smi.npu(device_id).why_busy(ignore_pids=_own_pids)
