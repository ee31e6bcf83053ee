"""y += scale_i * (x @ a_iT) @ b_iT, another adapter i in every row: two kernels, over tiles of rows as they come.

    shrink   hidden[rows, rank] = x @ aT      (tile of rows, share of the columns, share of the adapters)
    expand   y += scale * hidden @ bT         (tile of rows, tile of outputs, share of the adapters)

A tile of rows goes through the adapters its rows name, smallest first, and each product is for the rows of its own: one
pass where all name the same, as in a prompt; as many as there are adapters where every row names another, as in
decoding, when each adapter must be read anyhow.  ADAPTERS programs take those of a tile in turn; who finds none left
ends.  Each share of the columns has a sum of float32, and `expand` adds them in their order.  Nothing is sorted, and
nothing is read back to the host.
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
    tiles["ADAPTERS"] = min(tiles["ADAPTERS"], count, rows)
    hidden = torch.empty((split, rows, rank), dtype=torch.float32, device=x.device)
    tiles_m = blocks(rows, block_m)
    block_k, block_n = tiles.pop("BLOCK_K"), tiles.pop("BLOCK_N")
    launch(
        _shrink, (tiles_m, split, tiles["ADAPTERS"]), x,
        x, a, adapters, hidden, rows, columns, rank, count, *x.stride(), *a.stride(),
        SPLIT=split, BLOCK_R=block_r, BLOCK_K=block_k, **tiles,
    )  # fmt: skip
    launch(
        _expand, (tiles_m, blocks(outputs, block_n), tiles["ADAPTERS"]), x,
        hidden, b, adapters, scales, target, rows, outputs, rank, count, *b.stride(), *target.stride(),
        SPLIT=split, BLOCK_R=block_r, BLOCK_N=block_n, **tiles,
    )  # fmt: skip
    if target is not y:  # what no adapter touched keeps its bits
        y.copy_(torch.where((adapters >= 0)[:, None], target.to(y.dtype), y))


def _tiles(rows, columns, rank, itemsize, chip):
    if INTERPRETED:
        return {
            "BLOCK_M": power(rows, 16, 64), "BLOCK_K": 512, "BLOCK_N": 512, "SPLIT": 2, "ADAPTERS": 2,
            "num_warps": 4, "num_stages": 1,
        }  # fmt: skip
    block_k, warps, stages = 128 if rank <= 32 else 64, 4, 3
    if rank > 64:  # addresses take two registers each
        block_k, warps = 32, 8
    if itemsize == 4:  # multiplied and added one by one: a thread holds whole rows of a tile
        block_k, warps, stages = 32 if rank <= 128 else 16, 8, 1
    block_m = 16 if rows <= 256 or itemsize == 4 else 64
    shares = max(1, 2 * chip.processors // blocks(rows, block_m))
    return {
        "BLOCK_M": block_m, "BLOCK_K": block_k,
        "BLOCK_N": 16 if chip.rdna else 128 if chip.hopper and block_m == 64 else 64,  # RDNA multiplies b one by one
        "SPLIT": power(min(shares, blocks(columns, 2 * block_k)) + 1, most=32) // 2,
        "ADAPTERS": 8, "num_warps": 8 if chip.rdna else warps, "num_stages": stages,
    }  # fmt: skip


@triton.jit
def _shrink(
    x, a, adapters, hidden, rows, columns, rank, count, x_row, x_column, a_adapter, a_rank, a_column,
    SPLIT: tl.constexpr, ADAPTERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """x [rows, columns], a [count, rank, columns] -> hidden float32 [SPLIT, rows, rank], of rows with an adapter."""
    after_previous(CHAINED)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    share = tl.program_id(1)
    mine = tl.load(adapters + row, mask=row < rows, other=-1)
    r = tl.arange(0, BLOCK_R)
    length = tl.cdiv(tl.cdiv(columns, BLOCK_K), SPLIT) * BLOCK_K
    adapter = _next(mine, tl.full([], -1, tl.int32), count, tl.program_id(2) + 1)
    while adapter < count:
        own = (mine == adapter)[:, None]
        part = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for start in range(share * length, tl.minimum((share + 1) * length, columns), BLOCK_K):
            column = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            inside = (column < columns)[None, :]
            at = x + (row.to(tl.int64) * x_row)[:, None] + (column * x_column)[None, :]
            values = tl.load(at, mask=own & inside, other=0.0)
            from_ = a + adapter.to(tl.int64) * a_adapter + (r * a_rank)[:, None] + (column * a_column)[None, :]
            factors = tl.load(from_, mask=(r < rank)[:, None] & inside, other=0.0)
            part = tl.dot(values, tl.trans(factors), part, input_precision="ieee")
        at = hidden + ((share * rows + row).to(tl.int64) * rank)[:, None] + r[None, :]
        tl.store(at, part, mask=own & (r < rank)[None, :])
        adapter = _next(mine, adapter, count, ADAPTERS)


@triton.jit
def _expand(
    hidden, b, adapters, scales, y, rows, outputs, rank, count, b_adapter, b_output, b_rank, y_row, y_column,
    SPLIT: tl.constexpr, ADAPTERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """hidden float32 [SPLIT, rows, rank], b [count, outputs, rank] -> y [rows, outputs], in place.

    hidden is not rounded before its product with b, which is therefore one of float32; rank is small.  (By three
    products of TF32 instead, 16 rows of 8 adapters took an H100 10.0 us, and 7.9 so.)
    """
    after_previous(CHAINED)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mine = tl.load(adapters + row, mask=row < rows, other=-1)
    r = tl.arange(0, BLOCK_R)
    adapter = _next(mine, tl.full([], -1, tl.int32), count, tl.program_id(2) + 1)
    while adapter < count:
        own = (mine == adapter)[:, None]
        from_ = b + adapter.to(tl.int64) * b_adapter + (output.to(tl.int64) * b_output)[:, None] + (r * b_rank)[None, :]
        factors = tl.load(from_, mask=(output < outputs)[:, None] & (r < rank)[None, :], other=0.0).to(tl.float32)
        sums = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for share in tl.static_range(SPLIT):
            at = hidden + ((share * rows + row).to(tl.int64) * rank)[:, None] + r[None, :]
            sums += tl.load(at, mask=own & (r < rank)[None, :], other=0.0)
        part = tl.dot(sums, tl.trans(factors), input_precision="ieee")
        at = y + (row.to(tl.int64) * y_row)[:, None] + (output.to(tl.int64) * y_column)[None, :]
        inside = own & (output < outputs)[None, :]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32) + part * tl.load(scales + adapter)
        tl.store(at, value.to(y.dtype.element_ty), mask=inside)
        adapter = _next(mine, adapter, count, ADAPTERS)


@triton.jit
def _next(mine, adapter, count, steps):
    """Of the adapters above `adapter` that rows name the one in place `steps`, smallest first; `count` without one."""
    for _ in range(steps):
        adapter = tl.min(tl.where(mine > adapter, mine, count), 0)
    return adapter
