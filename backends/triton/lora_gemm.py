"""y += scale_i * (x @ a_iT) @ b_iT, another adapter i in every row: two kernels, over tiles of rows as they come.

    shrink   hidden[rows, rank] = x @ aT      (tile of rows, share of the columns); a sum of float32 for each share
    expand   y += scale * hidden @ bT         (tile of rows, tile of outputs); adds the shares in their order

A tile of rows goes through the adapters its rows name, smallest first, and each product counts for the rows of its own:
one pass where all name the same, as in a prompt; as many as there are adapters where every row names another, as in
decoding, when each adapter must be read anyhow.  Nothing is sorted, and nothing is read back to the host.
"""

import torch
import triton
import triton.language as tl

from ._chip import chip_of
from ._launch import INTERPRETED, blocks, computed, launch, power, readable, refuse_device
from ._ptx import after_previous
from ._tuned import choose

TRAITS = {"deterministic": True, "graph_safe": True, "accumulate": "float32"}
LARGEST_RANK = 256


def refuse(y, x, a, b, adapters, scales):
    yield from refuse_device(x)
    if a.shape[1] > LARGEST_RANK:
        yield "SHAPE", f"rank={a.shape[1]}; takes at most {LARGEST_RANK}", "split the adapter in two calls"


def run(y, x, a, b, adapters, scales):
    (rows, columns), (count, rank, _), outputs = x.shape, a.shape, y.shape[1]
    if 0 in (rows, count, rank, columns, outputs):
        return
    x, a, b = readable(x), readable(a), readable(b)
    adapters, scales = adapters.contiguous(), scales.contiguous()
    target = y if computed(y.dtype) == y.dtype else y.to(computed(y.dtype))
    kind = {"dtype": x.dtype, "rank": power(rank), "rows": power(rows)}
    tiles = dict(choose("lora_gemm", x.device, _tiles(rows, columns, rank, x.element_size(), chip_of(x)), **kind))
    split, block_m, block_r = tiles.pop("SPLIT"), tiles["BLOCK_M"], power(rank, 16)
    hidden = torch.empty((split, rows, rank), dtype=torch.float32, device=x.device)
    tiles_m = blocks(rows, block_m)
    block_k, block_n = tiles.pop("BLOCK_K"), tiles.pop("BLOCK_N")
    launch(
        _shrink, (tiles_m, split), x,
        x, a, adapters, hidden, rows, columns, rank, count, *x.stride(), *a.stride(),
        SPLIT=split, BLOCK_R=block_r, BLOCK_K=block_k, **tiles,
    )  # fmt: skip
    launch(
        _expand, (tiles_m, blocks(outputs, block_n)), x,
        hidden, b, adapters, scales, target, rows, outputs, rank, count, *b.stride(), *target.stride(),
        SPLIT=split, BLOCK_R=block_r, BLOCK_N=block_n, **tiles,
    )  # fmt: skip
    if target is not y:  # what no adapter touched keeps its bits
        y.copy_(torch.where((adapters >= 0)[:, None], target.to(y.dtype), y))


def _tiles(rows, columns, rank, itemsize, chip):
    if INTERPRETED:
        return {
            "BLOCK_M": power(rows, 16, 64), "BLOCK_K": 512, "BLOCK_N": 512, "SPLIT": 2, "num_warps": 4, "num_stages": 1,
        }  # fmt: skip
    block_k, warps, stages = (128, 4, 3) if rank <= 64 else (32, 8, 3)  # addresses take two registers each
    if itemsize == 4:  # multiplied and added one by one: a thread holds whole rows of a tile
        block_k, warps, stages = 32 if rank <= 128 else 16, 8, 1
    block_m = 16 if rows <= 256 or itemsize == 4 else 64
    return {
        "BLOCK_M": block_m, "BLOCK_K": block_k,
        "BLOCK_N": 16 if chip.rdna else 64,  # there the product with b is one by one as well
        "SPLIT": power(blocks(columns, 4 * block_k), most=16 if rows <= 256 else 2),
        "num_warps": 8 if chip.rdna else warps, "num_stages": stages,
    }  # fmt: skip


@triton.jit
def _shrink(
    x, a, adapters, hidden, rows, columns, rank, count, x_row, x_column, a_adapter, a_rank, a_column,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """x [rows, columns], a [count, rank, columns] -> hidden float32 [SPLIT, rows, rank]."""
    after_previous(CHAINED)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    share = tl.program_id(1)
    mine = tl.load(adapters + row, mask=row < rows, other=-1)
    r = tl.arange(0, BLOCK_R)
    length = tl.cdiv(tl.cdiv(columns, BLOCK_K), SPLIT) * BLOCK_K
    sums = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    adapter = _next(mine, -1, count)
    while adapter < count:
        own = mine == adapter
        part = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for start in range(share * length, tl.minimum((share + 1) * length, columns), BLOCK_K):
            column = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            inside = (column < columns)[None, :]
            at = x + (row.to(tl.int64) * x_row)[:, None] + (column * x_column)[None, :]
            values = tl.load(at, mask=own[:, None] & inside, other=0.0)
            from_ = a + adapter.to(tl.int64) * a_adapter + (r * a_rank)[:, None] + (column * a_column)[None, :]
            factors = tl.load(from_, mask=(r < rank)[:, None] & inside, other=0.0)
            part = tl.dot(values, tl.trans(factors), part, input_precision="ieee")
        sums = tl.where(own[:, None], part, sums)
        adapter = _next(mine, adapter, count)
    at = hidden + ((share * rows + row).to(tl.int64) * rank)[:, None] + r[None, :]
    tl.store(at, sums, mask=(mine >= 0)[:, None] & (r < rank)[None, :])


@triton.jit
def _expand(
    hidden, b, adapters, scales, y, rows, outputs, rank, count, b_adapter, b_output, b_rank, y_row, y_column,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """hidden float32 [SPLIT, rows, rank], b [count, outputs, rank] -> y [rows, outputs], in place.

    hidden is not rounded before its product with b, which is therefore one of float32; rank is small.
    """
    after_previous(CHAINED)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mine = tl.load(adapters + row, mask=row < rows, other=-1)
    r = tl.arange(0, BLOCK_R)
    sums = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for share in tl.static_range(SPLIT):
        at = hidden + ((share * rows + row).to(tl.int64) * rank)[:, None] + r[None, :]
        sums += tl.load(at, mask=(mine >= 0)[:, None] & (r < rank)[None, :], other=0.0)
    added = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    adapter = _next(mine, -1, count)
    while adapter < count:
        own = (mine == adapter)[:, None]
        from_ = b + adapter.to(tl.int64) * b_adapter + (output.to(tl.int64) * b_output)[:, None] + (r * b_rank)[None, :]
        factors = tl.load(from_, mask=(output < outputs)[:, None] & (r < rank)[None, :], other=0.0).to(tl.float32)
        part = tl.dot(tl.where(own, sums, 0.0), tl.trans(factors), input_precision="ieee")
        added = tl.where(own, part * tl.load(scales + adapter), added)
        adapter = _next(mine, adapter, count)
    at = y + (row.to(tl.int64) * y_row)[:, None] + (output.to(tl.int64) * y_column)[None, :]
    inside = (mine >= 0)[:, None] & (output < outputs)[None, :]
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32) + added
    tl.store(at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _next(mine, adapter, count):
    """The smallest adapter above `adapter` that a row names; `count` where there is none."""
    return tl.min(tl.where(mine > adapter, mine, count), 0)
