"""Paged attention on a TPU: _attention.py is the kernel, _tiles.py cuts the call into its tiles."""

import jax.numpy as jnp

from .. import emulated
from ..write_kv import quantized
from ._attention import attend
from ._chips import current, interpreter, refuse_order, too_large
from ._numbers import SUBLANES, carried, multiplied_as, restored
from ._tiles import FIELDS, choose, count_tiles

MOST_WORDS = 4  # of a tree mask: each is a select for every score
SMEM = 768 << 10  # bytes of scalar memory for the block table and the tiles; 1 MiB is there


def takes(
    q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, *, scale, causal, window, soft_cap, sinks, alibi_slopes,
    k_scale, v_scale, tree_mask, return_lse, max_seqlen_q, max_seqlen_k,
):  # fmt: skip
    """Yield (code, reason, fix) for what the kernel does not take."""
    page_size = k_cache.shape[1]
    if page_size % SUBLANES:
        reason = f"page_size={page_size}; a copy moves whole tiles of {SUBLANES} rows"
        yield "SHAPE", reason, f"allocate pages of {-(-page_size // SUBLANES) * SUBLANES} slots, better of 128"
    if tree_mask is not None and tree_mask.shape[1] > MOST_WORDS:
        reason = f"tree_mask has {tree_mask.shape[1]} words; takes at most {MOST_WORDS}"
        yield "SHAPE", reason, f"verify at most {MOST_WORDS * 32} tokens of a sequence at once"
    if 0 in q.shape or 0 in k_cache.shape or 0 in block_table.shape:
        reason = f"q is {list(q.shape)}, block_table {list(block_table.shape)}; a grid needs a tile"
        yield "SHAPE", reason, "give at least one token and one page"
        return
    scalars = 4 * (block_table.shape[0] * block_table.shape[1] + FIELDS * count_tiles(q.shape[0], seq_lens.shape[0], 1))
    if scalars > SMEM:
        reason = f"block_table and tiles take {scalars} bytes of scalar memory; there are {SMEM}"
        yield "SHAPE", reason, "use larger pages, or fewer sequences a call"
    yield from refuse_order(k_cache=k_cache, v_cache=v_cache)
    if emulated():
        yield from too_large(k_cache, v_cache)


def run(
    q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, *, scale, causal, window, soft_cap, sinks, alibi_slopes,
    k_scale, v_scale, tree_mask, return_lse, max_seqlen_q, max_seqlen_k, new=None,
):  # fmt: skip
    """out, or (out, lse); with `new`, (k, v) [tokens kv_heads dim], one a sequence, the caches that have them, too."""
    # No copy where the cache lies as [pages kv_heads page_size dim], which is how this backend allocates it.
    k_pages, v_pages = (carried(jnp.swapaxes(cache, 1, 2)) for cache in (k_cache, v_cache))
    costly = bool(soft_cap) or alibi_slopes is not None or tree_mask is not None
    tiles = sizes(q, k_cache, v_cache, seq_lens, max_seqlen_q, costly, current())
    if new is not None:
        as_held = zip(new, (k_scale, v_scale), (k_cache, v_cache), strict=True)
        new = [carried(quantized(rows, scale, dtype=str(cache.dtype))) for rows, scale, cache in as_held]
    out, lse, *pages = attend(
        q.astype(multiplied_as(q.dtype)), k_pages, v_pages, block_table, seq_lens, cu_seqlens_q,
        scale=q.shape[2] ** -0.5 if scale is None else scale, causal=causal, window=window, soft_cap=soft_cap,
        sinks=sinks, alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale, tree_mask=tree_mask,
        return_lse=return_lse, new=new, tiles=tiles, interpret=interpreter() if emulated() else False,
    )  # fmt: skip
    answers = [out.astype(q.dtype), *[lse] * return_lse, *(jnp.swapaxes(restored(x, k_cache), 1, 2) for x in pages)]
    return tuple(answers) if len(answers) > 1 else answers[0]


def sizes(q, k_cache, v_cache, seq_lens, max_seqlen_q, costly, chip):
    """The tiles of this call on this chip."""
    kv_heads = k_cache.shape[2]
    stored = jnp.uint16 if k_cache.dtype == jnp.float16 else k_cache.dtype
    return choose(
        chip, tokens=q.shape[0], seqs=seq_lens.shape[0], kv_heads=kv_heads, group=q.shape[1] // kv_heads,
        dim=q.shape[2], v_dim=v_cache.shape[3], page_size=k_cache.shape[1], dtype=multiplied_as(q.dtype),
        stored=stored, costly=costly, longest=max_seqlen_q,
    )  # fmt: skip


def plan(
    q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, *, max_seqlen_q=None, soft_cap=0.0, alibi_slopes=None,
    tree_mask=None, **_options,
):  # fmt: skip
    """What the cost model chose, in words, for `explain`."""
    chip = current()
    costly = bool(soft_cap) or alibi_slopes is not None or tree_mask is not None
    t = sizes(q, k_cache, v_cache, seq_lens, max_seqlen_q, costly, chip)
    keys, kv_heads = t.pages * k_cache.shape[1], k_cache.shape[2]
    copied = keys * kv_heads * (k_cache.shape[3] + v_cache.shape[3]) * jnp.dtype(k_cache.dtype).itemsize
    return (
        f"tiles of {t.tokens} tokens ({t.rows} rows a KV head), blocks of {t.pages} pages ({copied >> 10} KiB copied), "
        f"{t.vmem >> 10} KiB of VMEM on {chip.name}"
    )
