"""ACL serves one user a process: who that is. aclruntime and ONNX Runtime's CANN provider both call aclInit."""

from __future__ import annotations

import sys
from typing import Optional

from clipval.errors import BackendUnavailable

MODULES = ("torch_npu", "acl", "aclruntime")  # each initialises ACL once it is used

_user: Optional[str] = None


def claim(user: str, *own: str) -> None:
    """Make ACL this user's until the process ends; the same user may claim it again.

    Args:
        user: in words, for the message of the next one who asks.
        own: modules of `MODULES` that are the user itself.

    Raises:
        BackendUnavailable: another user has it, or a module is loaded that would initialise ACL a second time.
    """
    global _user
    loaded = next((name for name in MODULES if name in sys.modules and name not in own), None)
    other = loaded or (_user if _user != user else None)
    if other is not None:
        raise BackendUnavailable(
            f"{user}: {other} is in this process, and ACL serves one user a process; use them in runs of their own"
        )
    _user = user
