"""silu_and_mul: one program gates BLOCK columns of one row.

row       [ gate 0 .. width )[ value 0 .. width )
program     ^^^^^^             ^^^^^^                row * blocks of a row + block

Programs go along a row first, so that those which run at a time read neighbouring memory: 4 % of the time.
"""

import torch
import triton
import triton.language as tl

from ._launch import INTERPRETED, blocks, computed, launch, power, readable, refuse_device, rounded, rows_of
from ._ptx import after_previous
from ._tuned import choose

TRAITS = {
    "deterministic": True,
    "batch_invariant": True,
    "graph_safe": True,
    "workspace_bytes": 0,
    "accumulate": "float32",
}


def refuse(x):
    yield from refuse_device(x)


def run(x):
    width = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], width), dtype=computed(x.dtype), device=x.device)
    rows = rows_of(readable(x))
    tiles = choose("silu_and_mul", x.device, _tiles(width, x.element_size()), dtype=x.dtype, width=power(width))
    grid = (rows.shape[0] * blocks(width, tiles["BLOCK"]),)
    launch(_gate, grid, x, rows, y, width, *rows.stride(), **tiles)
    return rounded(y, x.dtype)


def _tiles(width, itemsize):
    """Eight warps; of bfloat16 8 bytes a thread, from each half of the row."""
    block = power(width, most=8192 if INTERPRETED else 2048 // itemsize)
    return {"BLOCK": block, "num_warps": 8, "num_stages": 1}


@triton.jit
def _gate(x, y, width, x_row, x_column, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    """x [rows, 2 * width] -> y [rows, width], contiguous.  Strides in elements."""
    after_previous(CHAINED)
    in_row = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // in_row).to(tl.int64)
    column = tl.program_id(0) % in_row * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    start = x + row * x_row
    gate = tl.load(start + column * x_column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(start + (width + column) * x_column, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * value
    tl.store(y + row * width + column, out.to(y.dtype.element_ty), mask=inside)
