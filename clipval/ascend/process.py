"""The one user of ACL in this process: aclruntime and ONNX Runtime's CANN provider both call aclInit."""

from __future__ import annotations

import os
import sys
from typing import Optional

from clipval.errors import BackendUnavailable

MODULES = ("torch_npu", "acl", "aclruntime")  # each initialises ACL on first use

_user: Optional[str] = None


def claim(user: str, *own: str) -> None:
    """Claim ACL for a user until the process ends; the same user may claim it again.

    Args:
        user: name for the error message of the next claim.
        own: modules of `MODULES` that belong to the user.

    Raises:
        BackendUnavailable: another user has it, or a loaded module would initialise ACL a second time.
    """
    global _user
    loaded = next((name for name in MODULES if name in sys.modules and name not in own), None)
    other = loaded or (_user if _user != user else None)
    if other is not None:
        raise BackendUnavailable(
            f"{user}: {other} is in this process, and ACL allows one user per process; use them in separate runs"
        )
    _user = user


def keep_torch_npu_out() -> None:
    """Keep torch 2.5 and later from importing an installed torch_npu on its own: it would take ACL from the backends.

    PyTorch is the reference and runs on the CPU. The variable is torch's own; a value that is set already stays.
    """
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
