"""The tiles of _product.multiply for a kind of call, where no tuned table has better ones.

Measured on an H100 (CUDA graphs, weights larger than L2 in turn).  Few rows: what counts is bytes on their way, so
tiles are long in k, and programs share the columns of a tile until every multiprocessor has one.  Many rows: the
largest tile whose sums fit registers, and stages until shared memory is full.
"""

import functools

import torch

from ._launch import INTERPRETED, blocks, power

PACKED = ("int4", "mxfp4")
LARGE_SHARED = 200 << 10  # Hopper's and Blackwell's
LARGEST_SPLIT = 16
DEEP = 8192  # columns: long shares hide what it costs to add them
LARGE_ROWS = 256  # from here on it pays that tensor descriptors are made for every call, some 20 us of the host's time


@functools.lru_cache(4096)
def tiles(rows, features, columns, kind, dot, group, y, chip):
    """Tile sizes and launch options.

    `dot` is the dtype that is multiplied, `y` that of the answer, `kind` how the weight is stored.
    """
    if INTERPRETED:
        # Small enough for two bands of tiles in 64 rows, and an uneven split of 320 columns: or no test would see them.
        shape, wanted = (power(rows, 16, 32), power(features, 32, 256), 64, 1, 4, 2), 8
    elif dot == torch.float32:  # multiplied and added one by one: small tiles, or registers spill
        shape, wanted = (16, 64, 32, 8, 4, 2), chip.processors
    elif rows <= 255:
        shape, wanted = _some(rows, kind, chip), 2 * chip.processors
    else:
        shape, wanted = _many(rows, features, dot, group, y, chip), chip.processors
    block_m, block_n, block_k, band, warps, stages = shape
    count = blocks(rows, block_m) * blocks(features, block_n)
    described = chip.hopper and rows >= LARGE_ROWS and dot != torch.float32  # float32 waits for its multiply-adds
    flat = not group and block_m * block_n >= 128 * 128 and (block_n == 256 or count > chip.processors)
    if INTERPRETED:
        described = flat = rows > 32
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "BAND": band,
        "SPLIT": _split(count, wanted, columns, block_k),
        "TMA": described, "FLAT": int(described and flat),
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


@functools.lru_cache(4096)
def tiles_few(block_m, features, columns, kind, dot, group, zeros, chip):
    """Tile sizes and launch options of _few.multiply_few.  SLICES is a multiple of num_warps: each warp has its own."""
    large = chip.shared >= LARGE_SHARED
    packed = kind in PACKED
    wide = (128 if packed or INTERPRETED else 64) // (1 if large or INTERPRETED else 2)
    wide = min(wide, group or wide)
    deep = columns >= DEEP
    short = wide < 64 and packed  # slices of a small group: as many bytes shall be on their way
    if INTERPRETED:
        block_n, slices, warps, stages = 128, 4, 4, 3
    elif large:
        block_n, slices, warps, stages = (
            (32, 8, 8, 3) if short else _few(block_m, features, columns, kind, dot, zeros, chip)
        )
    else:
        block_n = 16 if kind == "dense" and not deep and features < 64 * chip.processors else 32
        slices, warps, stages = 4, 4, 2
    # Memory is kept busy by what all programs have asked for: two a processor where shared memory holds few passes.
    twice = short or chip.amd or (deep and not large)
    wanted = 2 * chip.processors if twice else chip.processors // (2 if large else 1)
    return {
        "BLOCK_N": block_n, "WIDE": wide, "SLICES": slices,
        "SPLIT": _split(blocks(features, block_n), wanted, columns, slices * wide),
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def _few(block_m, features, columns, kind, dot, zeros, chip):
    """(BLOCK_N, SLICES, num_warps, num_stages) where shared memory holds what is on its way, as an H100's does."""
    many = features >= 64 * chip.processors  # several tiles a processor, whatever their size
    if kind == "dense":
        return 16, 4, 4, 4
    widest = 64 if many and _busy(features, 64, chip) >= _busy(features, 32, chip) else 32
    if kind == "int4" and dot != torch.int8:
        if block_m == 8:
            return _few_words(features, columns, zeros, chip)
        if features <= 16 * chip.processors:
            return 16, 8, 4, 3
        if features <= 32 * chip.processors:
            return 32, 8, 8, 3
        if blocks(features, 64) <= chip.processors and _busy(features, 64, chip) > 0.9:  # one program for each
            return 64, 8, 8, 4 if columns >= DEEP else 3
        return widest, 4, 4, 3
    if kind == "int4":
        return (widest, 4, 4, 3) if many else (16, 4, 4, 6)
    if block_m == 8 or (dot.itemsize == 1 and not many):
        return 16, 4, 4, 4 if many else 6
    return widest, 4, 4, 5


def _few_words(features, columns, zeros, chip):
    """The same, of int4 by up to 8 rows."""
    count = blocks(features, 32)
    if count < 1.875 * chip.processors:
        return (16, 8, 4, 3) if zeros else (16, 8, 4, 4) if columns >= DEEP else (16, 4, 4, 4)
    if count <= 2 * chip.processors:
        return 32, 4, 4, 4
    # Three stages leave room for five programs a processor, four for four: the last round should not be nearly empty.
    fuller = count > 4 * chip.processors and _busy(features, 32, chip, 4) > _busy(features, 32, chip, 5)
    return 32, 4, 4, 4 if fuller else 3


def _busy(features, block_n, chip, each=1):
    """The share of places for programs, `each` a processor, that are taken when the last round of them begins."""
    count, places = blocks(features, block_n), each * chip.processors
    return count / (blocks(count, places) * places)


def _split(count, wanted, columns, block_k):
    """How many programs share the columns of a tile, where there are `count` tiles and `wanted` programs at least."""
    split = 1
    while 2 * split * count <= wanted and 4 * split * block_k <= columns and split < LARGEST_SPLIT:
        split *= 2
    return split


def _some(rows, kind, chip):
    """(BLOCK_M, BLOCK_N, BLOCK_K, BAND, num_warps, num_stages)"""
    stages = 3 if chip.shared >= LARGE_SHARED else 2
    if kind in PACKED:
        block_n, block_k = (64, 64) if chip.rdna else (128, 128)
        return 32 if rows <= 64 else 64, block_n, block_k, 8, 4, stages + 1
    return power(rows, 32, 64), 64, 128, 8, 4, stages


def _many(rows, features, dot, group, y, chip):
    eight_bits = dot.itemsize == 1
    if chip.shared < LARGE_SHARED:
        return 64 if chip.rdna and group else 128, 128, 128 if eight_bits else 64, 8, 8, 2
    if group and dot == torch.int8:  # a scale for each feature, and the next: registers
        return 64, 256, 128, 8, 8, 3
    if group and eight_bits and rows < LARGE_ROWS << 2:
        return 64, 128, 128, 8, 4, 4
    if group:  # scales within the loop, and a second set of sums, take registers
        return 128, 128, 128, 8, 8, 4 if eight_bits else 3
    larger = y.itemsize == 4 or (eight_bits and chip.arch.startswith("sm_10"))  # what lies beside the stages
    large = 128, 256, 128 if eight_bits else 64, 16 if eight_bits else 8, 8, 3 if larger else 4
    middle = 128, 128, *large[2:4], 4, 5 if eight_bits else 6
    small = 64, 128, *large[2:4], 4, 4
    rates = {large: 1.0, middle: 0.95, small: 0.97 if dot == torch.int8 else 0.45}  # as measured where all are busy
    return min(rates, key=lambda tile: _most(rows, features, tile[0], tile[1], chip) / rates[tile])


def _most(rows, features, block_m, block_n, chip):
    """Products of a row and a feature that the processor with most tiles has."""
    return blocks(blocks(rows, block_m) * blocks(features, block_n), chip.processors) * block_m * block_n
