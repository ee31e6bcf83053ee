"""What every op of this backend needs around its kernels.

A kernel's file is laid out like backends/triton/silu_and_mul.py: refuse, run, the choice of tiles, the kernel.

bfloat16 in the interpreter: Triton 3.9 keeps it as uint16 there and computes with the bits, silently.  So `readable`
hands float32 copies to an interpreted kernel, `computed` says in which dtype it writes, and `rounded` is the one
rounding afterwards.  On a GPU all three leave things as they are.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether kernels are interpreted: 5 to 10 ms for each pass through a loop, so tiles are chosen for few passes."""


def refuse_device(x):
    """The refusal of arrays that no kernel reaches."""
    if not INTERPRETED and not x.is_cuda:
        yield "DEVICE", f"arrays are on {x.device.type}; Triton compiles for GPUs", "move them to cuda"


def readable(x):
    """x as a kernel may read it: itself, or a float32 copy of bfloat16 in the interpreter."""
    return x.float() if INTERPRETED and x is not None and x.dtype == torch.bfloat16 else x


def computed(dtype):
    """The dtype of the outputs that a kernel writes for a result in `dtype`."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def rounded(out, dtype):
    """The result in `dtype`: `out` itself, or its one rounding."""
    return out if out.dtype == dtype else out.to(dtype)


def rows_of(x):
    """x as [rows, width], a copy only where strides allow no such view."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def power(n, least=1, most=2**31):
    """The smallest power of two that is at least n, within bounds."""
    return min(max(1 << (n - 1).bit_length() if n > 1 else 1, least), most)


def blocks(n, size):
    """How many blocks of `size` cover n."""
    return -(-n // size)


@functools.cache
def chains(device):
    """Whether kernels may start while the one before still runs, and wait for it: _ptx.after_previous."""
    return not INTERPRETED and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(kernel, grid, x, *args, **options):
    """Start `kernel` on the device of x, on its current stream, unless the grid is empty.

    args are the kernel's arguments up to its constants, which are among the options.  Products and sums are fused:
    Triton 3.10 does so only where asked.  Triton starts kernels on torch's current device, whatever the arrays' own is.
    """
    if 0 in grid:
        return
    options["enable_fp_fusion"], options["CHAINED"] = True, chains(x.device.index)
    if INTERPRETED:
        with np.errstate(all="ignore"):  # a GPU says nothing of overflows either
            kernel[grid](*args, **options)
    elif x.device.index == torch.cuda.current_device():
        _start(kernel, grid, x.device.index, args, options)
    else:
        with torch.cuda.device(x.device):
            _start(kernel, grid, x.device.index, args, options)


_COMPILED: dict[tuple, Any] = {}


def _start(kernel, grid, device, args, options):
    """Launch by a key of our own: the strings that Triton makes of all arguments take longer than a short kernel."""
    if torch.version.hip:  # there it also looks at how much memory lies behind a pointer
        kernel[grid](*args, **options)
        return
    if options["CHAINED"]:
        options["launch_pdl"] = True
    kind = (kernel, device, *options.values(), *_specialized(args))
    compiled = _COMPILED.get(kind)
    if compiled is None:
        _COMPILED[kind] = kernel[grid](*args, **options)
    else:
        constants = [options[name] for name in kernel.arg_names[len(args) :]]
        compiled[(*grid, 1, 1)[:3]](*args, *constants)


def _specialized(args):
    """What Triton compiles a kernel anew for: dtype and 16-byte alignment, an integer that is 1 or a multiple of 16."""
    found = []  # in one pass, without a call for each of some 40 arguments
    for value in args:
        kind = type(value)
        if kind is int:
            found.append(value if value == 1 else (value % 16 == 0, -(2**31) <= value < 2**31))
        elif value is None or kind is float or not isinstance(value, torch.Tensor):
            found.append(kind)
        else:
            found.append((value.dtype, value.data_ptr() % 16 == 0))
    return found
