"""New keys and values into the pages of a TPU's cache, where they lie: tiles are read, changed and written by copies.

    slots, sorted by XLA     [ 5  6  7 | 37 | 64 65 ]       runs: tokens whose slots lie in one tile of a page
    tile in HBM  --copy-->  VMEM: a row of 32-bit words for 1, 2 or 4 slots, those of the run put in  --copy-->  HBM

DEPTH tiles (_slots.py) are on their way at once.  Runs lie in tiles of their own, so none waits for another.  Numbers
are bits here: nothing is rounded or lost.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import emulated
from ..write_kv import quantized
from ._chips import current, interpreter, refuse_order, too_large
from ._numbers import SUBLANES, carried, restored
from ._slots import height_of, put, words_of
from ._tiles import lanes

DEPTH = 8  # tiles on their way: half of them read, half written
SMEM = 768 << 10  # bytes of scalar memory for slots and runs; 1 MiB is there


def takes(k, v, k_cache, v_cache, slots, *, k_scale, v_scale):
    """Yield (code, reason, fix) for what the kernel does not take."""
    page_size = k_cache.shape[1]
    if page_size % SUBLANES:
        reason = f"page_size={page_size}; a copy moves whole tiles of {SUBLANES} rows"
        yield "SHAPE", reason, f"allocate pages of {-(-page_size // SUBLANES) * SUBLANES} slots, better of 128"
        return
    if 0 in k.shape or 0 in k_cache.shape:
        yield "SHAPE", f"k is {list(k.shape)}; a grid needs a token", "give at least one token"
        return
    if 12 * k.shape[0] > SMEM:
        reason = f"{k.shape[0]} tokens; scalar memory has room for the slots of {SMEM // 12}"
        yield "SHAPE", reason, f"write at most {SMEM // 12} tokens a call"
    if (taken := vmem(k, k_cache, v_cache)) > current().vmem_limit:
        reason = f"{DEPTH} tiles of all heads take {taken} bytes of VMEM; {current().name} has {current().vmem_limit}"
        yield "SHAPE", reason, "give each device a part of the heads"
    yield from refuse_order(k_cache=k_cache, v_cache=v_cache)
    if emulated():
        yield from too_large(*(cache for cache in (k_cache, v_cache) if cache is not None))


def run(k, v, k_cache, v_cache, slots, *, k_scale, v_scale):
    caches = [cache for cache in (k_cache, v_cache) if cache is not None]
    new = [
        quantized(rows, scale, dtype=str(cache.dtype))
        for rows, cache, scale in zip((k, v), caches, (k_scale, v_scale), strict=False)
    ]
    held = [carried(jnp.swapaxes(cache, 1, 2)) for cache in caches]  # no copy where it lies so
    written = write(new, held, slots)
    back = [jnp.swapaxes(restored(*pair), 1, 2) for pair in zip(written, caches, strict=True)]
    return back[0] if len(back) == 1 else tuple(back)


def write(new, pages, slots):
    """The caches with new rows in their slots.

    Args:
        new: for each cache [tokens kv_heads dim], in its dtype.
        pages: caches [pages kv_heads page_size dim]; donated, they are written in place.
        slots: int32 or int64 [tokens]; what lies outside of the caches is skipped.
    """
    count, _, page_size, _ = pages[0].shape
    height, tokens = height_of(pages[0]), slots.shape[0]
    far = jnp.iinfo(slots.dtype).max
    slots = jnp.where((slots >= 0) & (slots < count * page_size), slots, far)
    order = jnp.argsort(slots)
    slots = slots[order]
    there = slots < far
    begins = there & jnp.concatenate([jnp.ones(1, bool), jnp.diff(slots // height) != 0])
    runs = begins.sum().astype(jnp.int32)
    start = jnp.nonzero(begins, size=tokens + 1, fill_value=tokens)[0].astype(jnp.int32)
    start = jnp.where(jnp.arange(tokens + 1) < runs, start, there.sum().astype(jnp.int32))
    of_run = slots[jnp.minimum(start[:-1], tokens - 1)] // height
    scalars = [runs[None], start, jnp.where(jnp.arange(tokens) < runs, of_run, 0), jnp.where(there, slots % height, 0)]
    rows = [words_of(x)[order] for x in new]
    given = len(scalars) + len(rows)
    return pl.pallas_call(
        functools.partial(_kernel, height, page_size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (len(rows) + len(pages)),
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(pages),
            scratch_shapes=[
                *(pltpu.VMEM((DEPTH, x.shape[1], height, x.shape[3]), x.dtype) for x in pages),
                *(pltpu.VMEM((DEPTH, height, x.shape[1], x.shape[3]), jnp.int32) for x in pages),
                pltpu.SemaphoreType.DMA((2, DEPTH)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pages],
        input_output_aliases={given + i: i for i in range(len(pages))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=current().vmem_limit, disable_bounds_checks=True
        ),
        name="write_kv",
        interpret=interpreter() if emulated() else False,
    )(*(x.astype(jnp.int32) for x in scalars), *rows, *pages)


def _kernel(height, page_size, runs, start, tiles, offsets, *refs):
    """In SMEM: runs [1], start [tokens + 1], tiles [tokens], offsets of each token in its tile [tokens]."""
    count = len(refs) // 5
    rows, _, caches, held, new = (refs[i * count : (i + 1) * count] for i in range(5))
    arrived = refs[-1]
    each = list(zip(rows, caches, held, new, strict=True))

    def place(run):
        tile = tiles[run]
        per_page = page_size // height
        return lax.div(tile, per_page), pl.multiple_of(lax.rem(tile, per_page) * height, height)

    def fetch(run, then):
        """Start, or wait for, the copies of a run: its tile and its tokens' rows."""
        buffer, (page, at) = lax.rem(run, DEPTH), place(run)
        for hbm, cache, tile, row in each:
            then(pltpu.make_async_copy(cache.at[page, :, pl.ds(at, height)], tile.at[buffer], arrived.at[0, buffer]))

            @pl.loop(start[run], start[run + 1])
            def _(token, hbm=hbm, row=row):
                then(pltpu.make_async_copy(hbm.at[token], row.at[buffer, token - start[run]], arrived.at[0, buffer]))

    def store(run, then):
        buffer, (page, at) = lax.rem(run, DEPTH), place(run)
        for _, cache, tile, _row in each:
            then(pltpu.make_async_copy(tile.at[buffer], cache.at[page, :, pl.ds(at, height)], arrived.at[1, buffer]))

    def begin(copy):
        copy.start()

    def end(copy):
        copy.wait()

    @pl.loop(0, jnp.minimum(runs[0], DEPTH // 2))
    def ask(run):
        fetch(run, begin)

    @pl.loop(0, runs[0])
    def change(run):
        buffer, ahead = lax.rem(run, DEPTH), run + DEPTH // 2
        fetch(run, end)

        @pl.loop(start[run], start[run + 1])
        def _(token):
            for _, _, tile, row in each:
                put(tile.at[buffer], row.at[buffer, token - start[run]], offsets[token])

        store(run, begin)

        @pl.when(ahead < runs[0])
        def _():
            @pl.when(ahead >= DEPTH)
            def _():
                store(ahead - DEPTH, end)

            fetch(ahead, begin)

    @pl.loop(jnp.maximum(runs[0] - DEPTH, 0), runs[0])
    def leave(run):
        store(run, end)


def vmem(k, k_cache, v_cache):
    """Bytes of the tiles and rows on their way."""
    total = 0
    for cache in (k_cache, v_cache):
        if cache is not None:
            height = height_of(jax.ShapeDtypeStruct((1, 1, cache.shape[1], 1), cache.dtype))
            total += DEPTH * height * cache.shape[2] * lanes(cache.shape[3]) * (jnp.dtype(cache.dtype).itemsize + 4)
    return total


def plan(k, v, k_cache, v_cache, slots, **options):
    """What the cost model chose, in words, for `explain`."""
    height = height_of(jax.ShapeDtypeStruct((1, 1, k_cache.shape[1], 1), k_cache.dtype))
    return f"{DEPTH} tiles of {height} slots on their way, {vmem(k, k_cache, v_cache) >> 10} KiB of VMEM"
