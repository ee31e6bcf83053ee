"""XLA: Pallas kernels for TPUs, and jax.numpy for every other device that XLA compiles for.

Which of the two answers (_program.py has the rule, in a few lines):

    tpu/<op>.py     the Pallas kernel, where arrays lie on a TPU and it takes the call; takes(...) and run(...) have the
                    op's own signature over jax arrays, a quantized weight is a _weight.Weight, and what the contract
                    writes is returned, as llmkernels.jax_api has it
    <op>.py         plain(...), the same signature in jax.numpy, everywhere else.  It takes every call

Under an emulation (`--emulated`) only the Pallas kernels answer, interpreted on CPU arrays: what they do not take is
refused.  torch tensors on the CPU come and go through DLPack without a copy (_torch.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util

ARRAYS = ("torch", "jax")
DEVICES = ("cpu",)  # of torch tensors; jax arrays are where their program runs
NATIVE = False  # XLA compiles for the chip at hand: what a first-use check would compile is compiled by no caller
EMULATION = "Pallas's TPU interpreter"
FORKS = False  # jax keeps threads, which a forked process does not have
CACHE_AXES = (0, 2, 1, 3)  # of [pages page_size kv_heads dim], outermost first: tpu/paged_attention copies whole pages

_emulated = False


def absent():
    for name, install in (("jax", "pip install 'llmkernels[jax]'"), ("torch", "pip install torch")):
        if not util.find_spec(name):
            return "ABSENT", f"{name} is not installed", install
    return None


@contextmanager
def emulation() -> Iterator[None]:
    """Answer with the Pallas kernels inside this block, interpreted."""
    global _emulated
    before, _emulated = _emulated, True
    try:
        yield
    finally:
        _emulated = before


def emulated():
    """Whether an emulation is on."""
    return _emulated


def notes(op, call):
    """Lines for `explain` about a call that is taken: which program answers it, here and on a TPU."""
    from ._program import notes

    return [*notes(op, call)]
