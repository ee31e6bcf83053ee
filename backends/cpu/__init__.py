"""Native kernels for the processor: csrc/cpu, one build for each instruction set, chosen when the module is loaded.

LLMKERNELS_CPU_ISA=avx512|avx2|portable asks for another one than the fastest that this processor runs.
"""

import json
from importlib import util
from pathlib import Path

ARRAYS = ("torch",)
DEVICES = ("cpu",)
NATIVE = True


def absent():
    try:
        import torch  # noqa: F401
    except ImportError:
        return "ABSENT", "torch is not installed", "pip install torch"
    if util.find_spec(f"{__name__}._native"):
        return None
    return "NOT_BUILT", f"the kernels in csrc/cpu are not compiled: {_why()}", "install a C++ compiler and reinstall"


def isa():
    """The instruction set whose kernels answer: avx512, avx2 or portable; ValueError where one is asked for in vain."""
    import torch  # noqa: F401  first, so that the kernels share its OpenMP runtime

    from . import _native

    return _native.isa()


def recording(tokens=1, sequences=1):
    """A context in which this thread's kernel calls run and are kept; its replay() makes them again, without Python.

    The caller keeps the arrays of those calls alive, and changes their values in place.  replay(tokens, sequences)
    makes them for other numbers than those recorded: each call has as many rows in proportion, and arrays of as many
    are read and written, with the strides that they had.
    """
    import torch  # noqa: F401  first, as in isa()

    from . import _native

    return _native.Recording(tokens, sequences)


def _why():
    """What the build reported, as setup.py wrote it."""
    for folder in Path(__file__).resolve().parents[1:3]:  # llmkernels/ where installed; beside it in a source tree
        for report in (folder / "_build.json", folder / "llmkernels" / "_build.json"):
            if report.exists():
                return json.loads(report.read_text())["backends"]["cpu"].get("why", "the build did not try")
    return "nothing was built here"
