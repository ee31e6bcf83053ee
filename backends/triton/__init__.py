"""Triton kernels, one source for NVIDIA and AMD GPUs.  Triton's interpreter runs them on a CPU, for tests.

A kernel is compiled on the first call of a kind.  With `TRITON_INTERPRET=1` in the environment the interpreter takes
CPU tensors; without it this backend refuses them.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util

ARRAYS = ("torch",)
NATIVE = True
EMULATION = "Triton's interpreter; bfloat16 computed in float32"

_SWITCH = "TRITON_INTERPRET"
_interpreted_once = False


def absent():
    if not util.find_spec("triton"):
        return "ABSENT", "triton is not installed", "pip install 'llmkernels[triton]'"
    try:
        import torch
    except ImportError:
        return "ABSENT", "torch is not installed", "pip install torch"
    if emulating():
        return None
    if not torch.cuda.is_available():
        return "ABSENT", "torch sees no GPU", f"use a machine that has one, or {_SWITCH}=1 to interpret the kernels"
    if _interpreted_once:
        return "ABSENT", "this process has loaded the interpreter for an emulation", "start another process"
    return None


@contextmanager
def emulation() -> Iterator[None]:
    """Interpret every kernel inside this block.

    Triton decides when it is imported whether its functions are compiled or interpreted, for the whole process.
    """
    global _interpreted_once
    if "triton" in sys.modules and not emulating() and not _interpreted_once:
        raise ValueError(f"triton is loaded to compile; to emulate it, start another process with {_SWITCH}=1")
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH], _interpreted_once = "1", True
    try:
        import triton  # noqa: F401  while the switch is on

        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before


def emulating():
    """Whether kernels are interpreted, by the environment or inside `emulation`."""
    return os.environ.get(_SWITCH, "").lower() in ("1", "true", "on", "yes", "y")
