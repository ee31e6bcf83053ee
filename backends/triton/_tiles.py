"""The tiles of _product.multiply for a kind of call, where no tuned table has better ones.

Measured on an H100 (CUDA graphs, weights larger than L2 in turn).  Few rows: what counts is bytes on their way, so tiles
are long in k, and programs share the columns of a tile until every multiprocessor has one.  Many rows: the largest tile
whose sums fit registers, and stages until shared memory is full.
"""

import functools
from typing import NamedTuple

import torch
import triton

from ._launch import INTERPRETED, power

PACKED = ("int4", "mxfp4")
LARGE_SHARED = 200 << 10  # Hopper's and Blackwell's
LARGEST_SPLIT = 16


class Gpu(NamedTuple):
    """What tiles depend on: multiprocessors, bytes of shared memory a program may have, whether there is a TMA."""

    processors: int
    shared: int
    tma: bool


@functools.cache
def gpu(index):
    """The Gpu of this number."""
    if INTERPRETED:
        return Gpu(4, 0, False)
    properties = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    shared = 64 << 10 if hip else properties.shared_memory_per_block_optin
    return Gpu(properties.multi_processor_count, shared, not hip and properties.major >= 9)


def tiles(rows, features, columns, kind, dot, group, gpu):
    """Tile sizes and launch options.  `dot` is the dtype that is multiplied, `kind` how the weight is stored."""
    if INTERPRETED:
        # Small enough for two bands of tiles in 64 rows, and an uneven split of 320 columns: or no test would see them.
        shape, wanted = (power(rows, 16, 32), power(features, 32, 256), 64, 1, 4, 2), 2
    elif dot == torch.float32:  # multiplied and added one by one: small tiles, or registers spill
        shape, wanted = (16, 64, 32, 8, 4, 2), gpu.processors
    elif rows <= 255:
        shape, wanted = _some(rows, kind, gpu), 2 * gpu.processors
    else:
        shape, wanted = _many(rows, features, dot, group, gpu), gpu.processors
    block_m, block_n, block_k, band, warps, stages = shape
    count = triton.cdiv(rows, block_m) * triton.cdiv(features, block_n)
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "BAND": band,
        "SPLIT": _split(count, wanted, columns, block_k), "TMA": gpu.tma and rows > 255,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def tiles_few(features, columns, kind, group, gpu):
    """Tile sizes and launch options of _few.multiply_few.  SLICES is num_warps, so that each warp has its own."""
    wide = 128 if kind in PACKED else 64
    if not INTERPRETED and gpu.shared < LARGE_SHARED:
        wide //= 2
    wide = min(wide, group or wide)
    warps = 8 if wide < 64 else 4
    narrow = gpu.shared < LARGE_SHARED or features < 64 * gpu.processors
    block_n = 128 if INTERPRETED else 32 if narrow else 64
    return {
        "BLOCK_N": block_n, "WIDE": wide, "SLICES": warps,
        "SPLIT": _split(triton.cdiv(features, block_n), gpu.processors, columns, warps * wide),
        "num_warps": warps, "num_stages": 3 if gpu.shared >= LARGE_SHARED else 2,
    }  # fmt: skip


def _split(count, wanted, columns, block_k):
    """How many programs share the columns of a tile, where there are `count` tiles and `wanted` programs at least."""
    split = 1
    while 2 * split * count <= wanted and 4 * split * block_k <= columns and split < LARGEST_SPLIT:
        split *= 2
    return split


def _some(rows, kind, gpu):
    """(BLOCK_M, BLOCK_N, BLOCK_K, BAND, num_warps, num_stages)"""
    stages = 3 if gpu.shared >= LARGE_SHARED else 2
    if kind in PACKED:
        return 32 if rows <= 64 else 64, 128, 128, 8, 4, stages + 1
    return power(rows, 32, 64), 64, 128, 8, 4, stages


def _many(rows, features, dot, group, gpu):
    eight_bits = dot.itemsize == 1
    if gpu.shared < LARGE_SHARED:
        return 128, 128, 128 if eight_bits else 64, 8, 8, 2
    if triton.cdiv(rows, 128) * triton.cdiv(features, 256) < gpu.processors:
        return 128, 128, 128 if eight_bits else 64, 8, 4, 4
    if group:  # scales within the loop take registers
        return 128, 128, 128, 8, 8, 5 if eight_bits else 3
    return (128, 256, 128, 16, 8, 4) if eight_bits else (256, 128, 64, 8, 8, 4)
