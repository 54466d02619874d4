"""Runs one command that must not outlive the process that started it.

``python -m trueweight.simulation.child PARENT_PID COMMAND …`` asks the kernel to kill this process
when its parent dies, then becomes the command. A supervisor that is killed with -9 so leaves
nothing behind. Doing it here, and not between fork and exec in the supervisor, keeps the
supervisor free to have threads. Linux; elsewhere the command runs unbound.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
ORPHANED_EXIT_CODE = 71


def _bind_to_parent(parent_pid: int) -> None:
    """The kernel kills this process when ``parent_pid`` dies; exits if it is dead already."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(ORPHANED_EXIT_CODE)


if __name__ == "__main__":
    _bind_to_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606  (no shell on purpose)
