"""New keys and values into their slots, in jax.numpy.

jax arrays: new caches are returned; donate the old ones to have their memory reused.
torch tensors: the program rounds the rows, and torch puts them into the caller's memory, whatever its strides: XLA
writes no memory that it does not own (a donated DLPack tensor is copied).
"""

import jax
import jax.numpy as jnp
import torch

from . import emulated
from ._program import Program, refusals
from ._rounding import LARGEST, LOWEST, stored
from ._torch import bucket, filled, narrow, to_jax, to_torch

TRAITS = {"deterministic": True}


def refuse(k, v, k_cache, v_cache, slots, *, k_scale, v_scale):
    return refusals("write_kv", k, v, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)


def plain(k, v, k_cache, v_cache, slots, *, k_scale=None, v_scale=None):
    caches = [
        _scattered(quantized(rows, scale, dtype=str(cache.dtype)), cache, slots)
        for rows, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale))
        if cache is not None
    ]
    return caches[0] if len(caches) == 1 else tuple(caches)


def quantized(rows, scale=None, *, dtype):
    """rows [tokens kv_heads dim] / scale as a cache of `dtype` holds them."""
    if dtype not in LARGEST:
        return rows
    ratio = rows.astype("float32") if scale is None else rows.astype("float32") / scale.reshape(-1, 1)
    ratio = jnp.where(jnp.isnan(ratio), 0, ratio) if dtype == "int8" else ratio
    return stored(jnp.clip(ratio, LOWEST[dtype], LARGEST[dtype]), dtype)


def _scattered(rows, cache, slots):
    pages, page_size = cache.shape[:2]
    taken = (slots >= 0) & (slots < pages * page_size)
    page = jnp.where(taken, slots // page_size, pages)  # past the end: dropped
    return cache.at[page, slots % page_size].set(rows, mode="drop", unique_indices=True)


program = Program(plain)
rounding = jax.jit(quantized, static_argnames="dtype")


def run(k, v, k_cache, v_cache, slots, *, k_scale=None, v_scale=None):
    if isinstance(k, jax.Array):
        return program(k, v, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)
    if emulated():
        return _copied_back(k, v, k_cache, v_cache, slots, k_scale, v_scale)
    tokens, size = k.shape[0], bucket(k.shape[0])
    page_size, capacity = k_cache.shape[1], k_cache.shape[0] * k_cache.shape[1]
    kept = ((slots >= 0) & (slots < capacity)).nonzero().flatten()
    page, offset = slots[kept] // page_size, slots[kept] % page_size
    for rows, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if cache is None:
            continue
        dtype = str(cache.dtype).removeprefix("torch.")
        if dtype in LARGEST:
            rows = to_torch(rounding(to_jax(filled(rows, size)), to_jax(scale), dtype=dtype))[:tokens]
        _bytes(cache)[page, offset] = _bytes(rows[kept])
    return None


def _copied_back(k, v, k_cache, v_cache, slots, k_scale, v_scale):
    """The Pallas kernel, emulated: its caches are new arrays, and come back as a whole."""
    capacity = k_cache.shape[0] * k_cache.shape[1]
    slots = narrow(torch.where((slots >= 0) & (slots < capacity), slots, -1))
    scales = {"k_scale": to_jax(k_scale), "v_scale": to_jax(v_scale)}
    results = to_torch(program(*map(to_jax, (k, v, k_cache, v_cache, slots)), **scales))
    caches = [cache for cache in (k_cache, v_cache) if cache is not None]
    for cache, result in zip(caches, results if len(caches) > 1 else [results], strict=True):
        _bytes(cache).copy_(_bytes(result))


def _bytes(x):
    """FP8 as bytes, which torch can index."""
    return x.view(torch.uint8) if x.dtype.is_floating_point and x.dtype.itemsize == 1 else x
