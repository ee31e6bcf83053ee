"""Ragged paged attention in one Pallas kernel: decode, chunked prefill and tree verification, mixed in one grid.

    q [tokens heads dim] -- XLA gathers --> tiles [tile kv_head row dim]     row = token in tile * group + head in it
                                             |
    grid step = one tile of one sequence     v       pages in HBM [page kv_head slot dim], ids from the block table
      +-----------------------------------------+      +------+------+------+------+------+
      | kv_head 0: rows q0 q0 q0 q0 q1 q1 ...    |      | p 9  | p 2  | p 40 | p 7  | p 31 | ...
      | kv_head 1: ...                           |      +------+------+------+------+------+
      +-----------------------------------------+       block 0: buffer 0 | block 1: buffer 1 | block 2: buffer 0 ...

A page is one contiguous copy for all of its heads.  While a block is multiplied, the next one is copied into the other
buffer; the last block of a tile fetches the first of the next tile.  Query heads that share a KV head are rows of one
matrix product (GQA packing).  Softmax is online, in float32.  A block that every row sees whole skips the masks; one at
an edge first clears the values that nobody may see, so that NaN there reaches no sum.

A decode step may write too: a tile's own key and value are put into its last block, where they are read, and from there
into their page.

Which tiles and blocks there are is computed by XLA in the same program (_tiles.py): no plan, no look at the host.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._numbers import LANES, SUBLANES, converted, multiplied_as, multiply, rows_of_pages, tile_rows
from ._slots import clear, height_of, put, words_of
from ._tiles import FIELDS, Tiles, cut, divisor

SCALARS = 3  # arrays in scalar memory
MASKED = -1e30  # finite, so that a row of nothing but masked scores gives no NaN
SEEN = -1e29  # a row whose largest score is below it saw no key
FINISHED = 32  # rows at a time, once their sums are whole
LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453


@dataclass(frozen=True)
class Options:
    """What is the same in every tile of a call."""

    scale: float
    causal: bool
    window: tuple[int, int]
    soft_cap: float
    group: int
    page_size: int
    sinks: bool
    slopes: bool
    words: int  # of the tree mask, 0 without one
    scaled: bool  # by k_scale or v_scale
    lse: bool
    writes: bool


def attend(
    q, k_pages, v_pages, block_table, seq_lens, cu_seqlens_q, *, scale, causal=True, window=(-1, -1), soft_cap=0.0,
    sinks=None, alibi_slopes=None, k_scale=None, v_scale=None, tree_mask=None, return_lse=False, new=None,
    tiles: Tiles, interpret=False,
):  # fmt: skip
    """out [tokens heads v_dim] in the dtype of q, lse [tokens heads] float32 or None; with `new` the caches after them.

    Args:
        q: [tokens heads dim], bfloat16 or float32.
        k_pages, v_pages: [pages kv_heads page_size dim] in the dtype of q, int8, FP8, or float16 as uint16.
        new: (k, v) [tokens kv_heads dim] as the caches hold them: the last key and value of each sequence, of which
            there is one token, written before they are read.  Its page must be its own.
        tiles: what _tiles.choose found for this chip.
    """
    tokens, heads, dim = q.shape
    _, kv_heads, page_size, v_dim = v_pages.shape
    group, seqs_pages = heads // kv_heads, block_table.shape[1]
    work = cut(
        seq_lens, cu_seqlens_q, tokens=tokens, max_pages=seqs_pages, page_size=page_size, group=group, tiles=tiles,
        causal=causal and tree_mask is None, window=window,
    )  # fmt: skip
    packed = work.pack(q.reshape(tokens, kv_heads, group, dim))
    count, rows = packed.shape[0], tiles.rows
    options = Options(
        scale, causal, tuple(window), soft_cap, group, page_size, sinks is not None, alibi_slopes is not None,
        0 if tree_mask is None else tree_mask.shape[1], k_scale is not None or v_scale is not None, return_lse,
        new is not None,
    )  # fmt: skip
    per_tile = functools.partial(pl.BlockSpec, index_map=lambda t, *_: (t, 0, 0, 0))
    operands, specs = [packed], [per_tile((1, kv_heads, rows, dim))]
    for values in (sinks, alibi_slopes):
        if values is not None:
            operands.append(work.spread(values))
            specs.append(pl.BlockSpec((kv_heads, rows, 1), lambda t, *_: (0, 0, 0)))
    if tree_mask is not None:
        operands.append(work.pack_words(lax.bitcast_convert_type(tree_mask, jnp.int32)))
        specs.append(pl.BlockSpec((1, rows, options.words), lambda t, *_: (t, 0, 0)))
    pages, scratch = (k_pages, v_pages), []
    if new is not None:
        for x, held in zip(new, pages, strict=True):
            operands.append(words_of(x)[work.token[:, 0]])
            specs.append(pl.BlockSpec((1, *x.shape[1:]), lambda t, *_: (t, 0, 0)))
            scratch.append(pltpu.VMEM((kv_heads, height_of(held), held.shape[3]), held.dtype))
        scratch.append(pltpu.SemaphoreType.DMA(()))
    results = [(v_dim, q.dtype)] + [(LANES, jnp.float32)] * return_lse  # lse on every lane: no transposition
    written = () if new is None else pages
    out = pl.pallas_call(
        functools.partial(_kernel, options, tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=SCALARS,
            grid=(count,),
            in_specs=[*specs, *[pl.BlockSpec(memory_space=pl.ANY)] * 2],
            out_specs=[
                *(per_tile((1, kv_heads, rows, width)) for width, _ in results),
                *[pl.BlockSpec(memory_space=pl.ANY)] * len(written),
            ],
            scratch_shapes=[
                *scratch,
                pltpu.VMEM((2, tiles.pages, *k_pages.shape[1:]), k_pages.dtype),
                pltpu.VMEM((2, tiles.pages, *v_pages.shape[1:]), v_pages.dtype),
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, v_dim), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=[
            *(jax.ShapeDtypeStruct((count, kv_heads, rows, width), dtype) for width, dtype in results),
            *(jax.ShapeDtypeStruct(held.shape, held.dtype) for held in written),
        ],
        input_output_aliases={SCALARS + len(operands) + i: len(results) + i for i in range(len(written))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=tiles.vmem_limit, disable_bounds_checks=True
        ),
        name="ragged_paged_attention",
        interpret=interpret,
    )(work.scalars, block_table.reshape(-1), _scales(k_scale, v_scale, kv_heads), *operands, k_pages, v_pages)
    lse = work.unpack(out[1][..., :1])[..., 0] if return_lse else None
    return work.unpack(out[0]), lse, *out[len(results) :]


def _scales(k_scale, v_scale, kv_heads):
    """[2 * kv_heads] float32: those of keys, then those of values."""
    both = [jnp.ones(1) if scale is None else scale.reshape(-1) for scale in (k_scale, v_scale)]
    return jnp.concatenate([jnp.broadcast_to(scale, kv_heads).astype(jnp.float32) for scale in both])


def _kernel(options, tiles, work, table, scales, q, *refs):
    """One tile.  In SMEM: work [FIELDS * tiles + 1], table [seqs * max_pages], both int32, scales [2 * kv_heads]."""
    given = list(refs)
    sinks, slopes, words = (given.pop(0) if there else q for there in (options.sinks, options.slopes, options.words))
    new = [given.pop(0) for _ in range(2 * options.writes)]
    k_hbm, v_hbm, out = given[:3]
    lse = given[3] if options.lse else None
    if options.writes:  # the same memory, as it is written
        k_hbm, v_hbm, *staged, stored = given[3 + options.lse : 8 + options.lse]
    k_buffer, v_buffer, top, total, acc, arrived = given[-6:]
    count, step, kv_heads = pl.num_programs(0), pl.program_id(0), q.shape[1]

    def tile(t):
        return [work[field * count + t] for field in range(FIELDS)]

    here = tile(step)
    row, first_page, end_page, number, position, first_key, end_key, live, following, base = here
    blocks = pl.cdiv(end_page - first_page, tiles.pages)

    def fetch(of, block):
        """Start to copy a block of the tile `of`: as many pages as there are."""
        begin, first, end, number = of[:4]
        buffer = lax.rem(number + block, 2)
        for i in range(tiles.pages):
            index = first + block * tiles.pages + i

            @pl.when(index < end)
            def _(i=i, index=index):
                page = table[begin + index]
                pltpu.make_async_copy(k_hbm.at[page], k_buffer.at[buffer, i], arrived.at[buffer, 0]).start()
                pltpu.make_async_copy(v_hbm.at[page], v_buffer.at[buffer, i], arrived.at[buffer, 1]).start()

    def await_pages(block, full):
        """Wait for this tile's block: once where all of its pages come, since a semaphore counts bytes."""
        buffer = lax.rem(number + block, 2)
        for which, held in enumerate((k_buffer, v_buffer)):
            if full:
                pltpu.make_async_copy(held.at[buffer], held.at[buffer], arrived.at[buffer, which]).wait()
                continue
            for i in range(tiles.pages):

                @pl.when(first_page + block * tiles.pages + i < end_page)
                def _(i=i, which=which, held=held):
                    page = held.at[buffer, i]
                    pltpu.make_async_copy(page, page, arrived.at[buffer, which]).wait()

    def write_token(buffer, block):
        """The tile's token into its slot of this block, and from there into its page, which nobody else reads."""
        slot = lax.rem(position, options.page_size)
        page = lax.div(position, options.page_size)
        for rows, held, stage, hbm in zip(new, (k_buffer, v_buffer), staged, (k_hbm, v_hbm), strict=True):
            height = stage.shape[1]
            at = pl.multiple_of(lax.div(slot, height) * height, height)
            around = held.at[buffer, page - first_page - block * tiles.pages, :, pl.ds(at, height)]
            put(around, rows.at[0], slot - at)
            stage[...] = around[...]
            pltpu.make_async_copy(stage, hbm.at[table[row + page], :, pl.ds(at, height)], stored).start()

    leading = work[FIELDS * count]

    @pl.when((step == 0) & (leading < count))
    def _():
        fetch(tile(leading), 0)

    top[...] = jnp.full_like(top, MASKED)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

    def scores(head, part, keys, begin, edge):
        """[rows keys] float32, in base 2, MASKED where a row may not look."""
        factor = options.scale if options.soft_cap or options.slopes else options.scale * LOG2E
        s = multiply(q[0, head, part], keys, transposed=True)
        s = s * (scales[head] * factor if options.scaled else factor)
        if options.soft_cap:
            s = jnp.tanh(s * (1 / options.soft_cap)) * options.soft_cap
        if options.slopes or edge:
            key = begin + lax.broadcasted_iota(jnp.int32, s.shape, 1)
            own = position + (_token(part, s.shape, options.group) if tiles.tokens > 1 else 0)
        if options.slopes:
            s += slopes[head, part] * (key - own).astype(jnp.float32)
        if options.soft_cap or options.slopes:
            s *= LOG2E
        return jnp.where(visible(part, key, own), s, MASKED) if edge else s

    def visible(part, key, own):
        first, end = first_key, end_key  # of each row; the cuts of a tile hold for all of its rows
        if options.causal and not options.words:
            end = jnp.minimum(end, own + 1)
        elif options.window[1] >= 0 and not options.words:
            end = jnp.minimum(end, own + options.window[1] + 1)
        if options.window[0] >= 0 and not options.words:
            first = jnp.maximum(first, own - options.window[0])
        seen = (key >= first) & (key < end)
        if options.words:
            new = key - base
            bit = jnp.zeros(key.shape, jnp.int32)
            for w in range(options.words):
                word = lax.shift_right_logical(jnp.broadcast_to(words[0, part, pl.ds(w, 1)], key.shape), new & 31)
                bit = jnp.where(new >> 5 == w, word, bit)
            seen &= (new < 0) | (bit & 1 == 1)
        return seen

    def update(first_head, part, buffer, begin, edge, at=None):
        """The rows `part` of some heads against a block, or its keys from `at` on: top, total and acc."""
        dtype = multiplied_as(q.dtype)
        held = pl.ds(first_head, tiles.heads_at_once)
        heads = [first_head + i for i in range(tiles.heads_at_once)]

        def of(pages, head):
            """[keys dim]: those of the block, or as many of a page as are multiplied at once."""
            if at is None:
                return rows_of_pages(pages[buffer, :, head], dtype)
            own = pl.ds(pl.multiple_of(lax.rem(at, options.page_size), tiles.keys_at_once), tiles.keys_at_once)
            return converted(pages[buffer, lax.div(at, options.page_size), head, own], dtype)

        s = jnp.stack([scores(h, part, of(k_buffer, h), begin, edge) for h in heads])
        before = top[held, part]
        after = jnp.maximum(before, jnp.max(s, axis=-1, keepdims=True))
        p = jnp.exp2(s - _across(after, s.shape[-1]))
        shrink = jnp.exp2(before - after)
        top[held, part] = after
        total[held, part] = shrink * total[held, part] + jnp.sum(p, axis=-1, keepdims=True)
        for i, h in enumerate(heads):
            acc[h, part] = acc[h, part] * _across(shrink[i], acc.shape[2]) + multiply(
                p[i].astype(dtype), of(v_buffer, h)
            )

    def multiply_block(block, edge):
        buffer, begin = lax.rem(number + block, 2), (first_page + block * tiles.pages) * options.page_size
        await_pages(block, not edge)
        if options.writes:
            pl.when(block + 1 == blocks)(lambda: write_token(buffer, block))
        if edge:
            clear(v_buffer, buffer, first_key - begin, end_key - begin)
        if tiles.unrolled:  # short updates: the schedule hides the latency of one behind others
            for h in range(0, kv_heads, tiles.heads_at_once):
                update(h, pl.ds(0, tiles.rows), buffer, begin, edge)
            return

        def update_part(head, part):
            if tiles.keys_at_once == tiles.pages * options.page_size:
                update(head, part, buffer, begin, edge)
            else:
                pl.loop(0, tiles.pages * options.page_size, step=tiles.keys_at_once)(
                    lambda at: update(head, part, buffer, begin + at, edge, at)
                )

        _for_parts(kv_heads, tiles.rows, tiles.rows_at_once, update_part)

    def whole(begin, end):
        """Whether every row of the tile sees every key of the block."""
        if options.words:
            return begin > end
        seen = (begin >= first_key) & (end <= end_key)
        if options.causal:
            seen &= end <= position + 1
        if options.window[0] >= 0:
            seen &= begin >= position + live - 1 - options.window[0]
        if options.window[1] >= 0 and not options.causal:
            seen &= end <= position + options.window[1] + 1
        return seen

    @pl.loop(0, blocks)
    def _(block):
        more = block + 1 < blocks
        fetched = jnp.where(more, step, following)

        @pl.when(fetched < count)
        def _():
            fetch(tile(fetched), jnp.where(more, block + 1, 0))

        begin = (first_page + block * tiles.pages) * options.page_size
        inside = whole(begin, begin + tiles.pages * options.page_size)
        pl.when(inside)(lambda: multiply_block(block, False))
        pl.when(jnp.logical_not(inside))(lambda: multiply_block(block, True))

    if options.writes:

        @pl.when(blocks > 0)
        def _():
            for stage in staged:
                pltpu.make_async_copy(stage, stage, stored).wait()

    def finish(head, part):
        scale = scales[kv_heads + head] if options.scaled else None
        _finish(head, part, scale, sinks if options.sinks else None, top, total, acc, out, lse)

    if tiles.unrolled:
        for h in range(kv_heads):
            finish(h, pl.ds(0, tiles.rows))
    else:
        height = divisor(tiles.rows, FINISHED, SUBLANES if tiles.rows <= SUBLANES else tile_rows(out.dtype))
        _for_parts(kv_heads, tiles.rows, height, finish)


def _for_parts(kv_heads, rows, height, do):
    """do(head, rows) for `height` rows of a head at a time, in a loop: it keeps the registers of each apart."""

    @pl.loop(0, kv_heads * (rows // height))
    def _(i):
        do(lax.rem(i, kv_heads), pl.ds(pl.multiple_of(lax.div(i, kv_heads) * height, height), height))


def _across(x, width):
    """x [... LANES], the same on every lane, as [... width]: whole registers again, which moves nothing."""
    if width % LANES:
        return x[..., :width] if width < LANES else jnp.broadcast_to(x[..., :1], (*x.shape[:-1], width))
    return jnp.concatenate([x] * (width // LANES), -1)


def _token(part, shape, group):
    """Which token of its tile each row belongs to: the row divided by `group`, exactly, for rows below 2 ** 14."""
    row = part.start + lax.broadcasted_iota(jnp.int32, shape, 0)
    return row >> (group.bit_length() - 1) if group & (group - 1) == 0 else (row * (-(-(1 << 16) // group))) >> 16


def _finish(h, part, v_scale, sinks, top, total, acc, out, lse):
    """The answer of some rows of a KV head: acc / total, the sink counted, zeros where no key was seen."""
    largest, weight = top[h, part], total[h, part]
    seen = largest > SEEN
    weight = jnp.where(seen, weight, 0.0)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[h, part] * LOG2E, largest.shape)
        above = jnp.maximum(largest, sink)
        shrink = jnp.exp2(largest - above)
        weight = weight * shrink + jnp.exp2(sink - above)
        factor = jnp.where(seen, shrink, 0.0) / weight
        largest = above
    else:
        factor = jnp.where(seen, 1.0 / jnp.where(seen, weight, 1.0), 0.0)
    if v_scale is not None:
        factor = factor * v_scale
    out[0, h, part] = (acc[h, part] * _across(factor, acc.shape[2])).astype(out.dtype)
    if lse is not None:
        lse[0, h, part] = jnp.where(
            weight > 0, (largest + jnp.log2(jnp.where(weight > 0, weight, 1.0))) * LN2, -jnp.inf
        )
