"""Paged attention in jax.numpy: _attention.py."""

import jax
import jax.numpy as jnp
import torch

from ._attention import attend, cut, width_of
from ._program import Program, refusals
from ._torch import bucket, dense, filled, to_jax, to_torch

TRAITS = {"deterministic": True, "accumulate": "float32"}
COLUMNS = 16  # the narrowest table; a wider one is filled up to the next power of four times as many


def refuse(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **options):
    return refusals("paged_attention", q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **options)


def plain(
    q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, *, scale=None, causal=True, window=(-1, -1),
    soft_cap=0.0, sinks=None, alibi_slopes=None, k_scale=None, v_scale=None, tree_mask=None, return_lse=False,
    max_seqlen_q=None, max_seqlen_k=None,
):  # fmt: skip
    tokens, heads, dim = q.shape
    kv_heads, v_dim, seqs = k_cache.shape[2], v_cache.shape[3], seq_lens.shape[0]
    group = heads // kv_heads
    if not tokens or not seqs or not k_cache.shape[0] or not block_table.shape[1]:
        out, lse = jnp.zeros((tokens, heads, v_dim), q.dtype), jnp.full((tokens, heads), -jnp.inf, "float32")
        lse = lse if sinks is None else jnp.broadcast_to(sinks, lse.shape)
        return (out, lse) if return_lse else out
    width = width_of(tokens, seqs)
    blocks, block, place = cut(cu_seqlens_q, seq_lens, tokens, width)
    rows = jnp.clip(blocks.first[:, None] + jnp.arange(width), 0, tokens - 1)  # [blocks width]
    factor = dim**-0.5 if scale is None else float(scale)
    factor = factor if k_scale is None else factor * k_scale.reshape(-1, 1, 1)
    queries = q.astype("float32").reshape(tokens, kv_heads, group, dim) * factor
    out, lse = attend(
        queries[rows].transpose(0, 2, 3, 1, 4), k_cache, v_cache, block_table, blocks, width,
        causal=causal and tree_mask is None, window=window, soft_cap=float(soft_cap), sinks=sinks, slopes=alibi_slopes,
        tree=None if tree_mask is None else tree_mask[rows],
    )  # fmt: skip
    out = out if v_scale is None else out * v_scale.reshape(-1, 1, 1, 1)
    out = out.transpose(0, 3, 1, 2, 4)[block, place].reshape(tokens, heads, v_dim).astype(q.dtype)
    return (out, lse.transpose(0, 3, 1, 2)[block, place].reshape(tokens, heads)) if return_lse else out


program = Program(plain)


def write_and_attend(*arrays, **options):
    """One new token a sequence written, then read: (out, lse where asked for, k_cache, v_cache); _decode.py."""
    from ._decode import program

    return program(*arrays, **options)


def run(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **options):
    if isinstance(q, jax.Array):
        return program(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **options)
    tokens, seqs = q.shape[0], seq_lens.shape[0]
    rows, batch = bucket(tokens), bucket(seqs)
    k_cache, v_cache, block_table = _addressable(k_cache, v_cache, block_table)
    columns = COLUMNS
    while columns < block_table.shape[1]:
        columns *= 4
    arrays = [
        filled(q, rows),
        k_cache,
        v_cache,
        filled(filled(block_table, batch), columns, axis=1),
        filled(seq_lens, batch),
        filled(cu_seqlens_q, batch + 1, tokens),
    ]
    options["tree_mask"] = filled(options["tree_mask"], rows)
    options |= {"max_seqlen_q": None, "max_seqlen_k": None}  # bounds, which the program does not need
    given = {name: to_jax(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    results = to_torch(program(*map(to_jax, arrays), **given))
    return tuple(x[:tokens] for x in results) if isinstance(results, tuple) else results[:tokens]


def _addressable(k_cache, v_cache, table):
    """Caches that jax can address, and the table into them: views with gaps (packed K|V, MLA) are gathered by page.

    Only pages that the table names are copied, their number filled up so that few programs are compiled.
    """
    if dense(k_cache) and dense(v_cache):
        return k_cache, v_cache, table
    ids = table.clamp(0, k_cache.shape[0] - 1)  # entries that no query needs may hold anything
    used, numbers = ids.unique(return_inverse=True)
    return *(_pages(cache, used) for cache in (k_cache, v_cache)), numbers.int()


def _pages(cache, used):
    eight_bits = cache.dtype.itemsize == 1
    pages = (cache.view(torch.uint8) if eight_bits else cache)[used]  # torch cannot index FP8
    return filled(pages, bucket(len(used))).view(cache.dtype)
