"""torch tensors on the CPU as jax arrays and back, through DLPack: the same memory, where jax can address it.

jax copies by itself what does not begin at a multiple of 16 bytes.  What it would get wrong is put right here:

- int64 would silently become 32 bits: callers bring indices into range, then narrow() is exact.
- strides with gaps fail: such a tensor is copied.  Permuted ones (HND caches) pass.
- a tensor that requires a gradient fails: it is detached; whoever needs gradients was refused before.

A program is compiled for each combination of shapes.  So that few occur, callers fill rows up to bucket(rows).
"""

import jax
import torch
from torch.nn.functional import pad

from ._weight import Weight

STEP = 256


def bucket(size):
    """The next power of two, and beyond 256 the next multiple of 256: 1, 2, 4 ... 256, 512, 768 ...; 0 stays."""
    return size if size < 2 else 1 << (size - 1).bit_length() if size <= STEP else -(-size // STEP) * STEP


def filled(x, size, value=0, axis=0):
    """x with an axis filled up to `size`; itself where it has that size."""
    if x is None or x.shape[axis] == size:
        return x
    return pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, size - x.shape[axis]), value=value)


def narrow(x):
    """int64 whose values fit 32 bits, as int32."""
    return x.to(torch.int32)


def to_jax(x):
    """The same memory as a jax array; a copy where jax could not address it.  A weight's parts are kept on it."""
    if x is None:
        return None
    if hasattr(x, "scheme"):
        if "xla" not in x.packed:
            x.packed["xla"] = Weight.of(x).map(to_jax)
        return x.packed["xla"]
    if x.dtype == torch.int64:
        raise TypeError("int64 tensors are narrowed before: jax would cut them off")
    x = x.detach()
    return jax.dlpack.from_dlpack(x if dense(x) else x.contiguous())


def dense(x):
    """Whether x fills its memory without gaps, in any order of axes."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def to_torch(results):
    """Finished results as tensors: nothing the program reads may change before it has ended."""
    jax.block_until_ready(results)
    return jax.tree.map(torch.from_dlpack, results)


def over_rows(program, x, *arrays, beside=(), **options):
    """program(x, *arrays, **options) over torch tensors, its rows filled up; `beside` names options that have rows too.

    x is [*rows, width], and so is every result.
    """
    leading, rows = x.shape[:-1], x.shape[:-1].numel()

    def row_array(t):
        return None if t is None else to_jax(filled(t.reshape(rows, t.shape[-1]), bucket(rows)))

    options = {name: row_array(value) if name in beside else convert(value) for name, value in options.items()}
    results = to_torch(program(row_array(x), *map(convert, arrays), **options))
    back = [y[:rows].view(*leading, y.shape[-1]) for y in jax.tree.leaves(results)]
    return tuple(back) if isinstance(results, tuple) else back[0]


def convert(value):
    """Arrays as jax has them, anything else as it is."""
    return to_jax(value) if hasattr(value, "dtype") else value
