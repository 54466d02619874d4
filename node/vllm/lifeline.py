"""Engine processes die with the node that started them, however it dies.

vLLM starts an engine core and one worker per device as child processes; a node killed with -9
would orphan them. vLLM loads the entry points of ``vllm.general_plugins`` in each of its
processes, and this one asks the kernel to kill the process when the thread that spawned it ends.
Linux only; elsewhere it does nothing and says so through ``supported()``.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

OWNER_VARIABLE = "TRUEWEIGHT_ENGINE_OWNER_PID"
"""Set by the node before it spawns an engine. Only processes below that one are bound."""

_PR_SET_PDEATHSIG = 1
_ORPHANED_EXIT_CODE = 71


def supported() -> bool:
    """Whether this platform can bind a child's life to its parent's."""
    return sys.platform == "linux"


def install() -> None:
    """Bind this process to its parent, if it is an engine process of a Trueweight node.

    vLLM calls it in the node's own process too, and in engines that have nothing to do with
    Trueweight: both are left alone. Exits at once if the parent died before the binding held.
    """
    parent = multiprocessing.parent_process()
    owner = os.environ.get(OWNER_VARIABLE)
    if not supported() or owner is None or owner == str(os.getpid()) or parent is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent.pid:
        os._exit(_ORPHANED_EXIT_CODE)
    _hide_llvmlite_from_vllm()


def _hide_llvmlite_from_vllm() -> None:
    """Keep vLLM's search for Triton kernels from tripping over numba.

    vLLM 0.32's CPU worker calls ``vars(x).get`` on every attribute of every module. llvmlite's
    library object answers ``__dict__`` with a foreign function, and the worker does not start.
    It matters only if numba was imported before the worker began, for instance by the program's
    main module, which spawned processes import again.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    table = getattr(getattr(ffi, "lib", None), "_fntab", None)
    if isinstance(table, dict):
        table["__dict__"] = {}
