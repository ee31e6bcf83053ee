"""Scatters new keys and values into the slots of a paged cache, in place."""

import numpy as np
import torch

from llmkernels.contract import FLOATS, Case, Cost, Sparse, View
from llmkernels.ops.numerics import FP8_MAX, itemsize, wide
from llmkernels.registry import op
from llmkernels.shapes import dtype_name


def inputs(
    rng,
    tokens,
    kv_heads=2,
    dim=64,
    v_dim=None,
    page_size=16,
    pages=6,
    values=True,
    layout="NHD",
    C=None,
    scales=None,
    size=1.0,
    skipped=0,
    fused=False,
    break_it=None,
):
    """Scattered slots, the last `skipped` tokens without one; every slot of the cache holds something to preserve."""
    v_dim, unit = v_dim or dim, 40 if C == "int8" else 1
    slots = rng.permutation(pages * page_size)[:tokens].astype(np.int64)
    slots[tokens - skipped :] = -1
    arrays = {
        "k": size * rng.standard_normal((tokens, kv_heads, dim)),
        "v": size * rng.standard_normal((tokens, kv_heads, v_dim)) if values else None,
        "k_cache": unit * rng.standard_normal((pages, page_size, kv_heads, dim)),
        "v_cache": unit * rng.standard_normal((pages, page_size, kv_heads, v_dim)) if values else None,
        "slots": slots,
    }
    if scales:
        count = {"tensor": (), "one": (1,), "head": (kv_heads,)}[scales]
        arrays["k_scale"] = np.array(rng.uniform(0.5, 2, count) / unit)
        arrays["v_scale"] = np.array(rng.uniform(0.5, 2, count) / unit) if values else None
    if fused:  # k and v as slices of one QKV projection
        arrays["_qkv"] = np.concatenate([rng.standard_normal(arrays["k"].shape), arrays["k"], arrays["v"]], 1)
        arrays["k"] = View("_qkv", (slice(None), slice(kv_heads, 2 * kv_heads)))
        arrays["v"] = View("_qkv", (slice(None), slice(2 * kv_heads, None)))
    arrays = LAYOUTS[layout](arrays)
    if break_it:
        BREAKS[break_it](arrays)
    return arrays


def _hnd(arrays):
    both = {f"_{n}": arrays[n].transpose(0, 2, 1, 3) for n in ("k_cache", "v_cache")}
    return arrays | both | {n: View(f"_{n}", axes=(0, 2, 1, 3)) for n in ("k_cache", "v_cache")}


def _packed(arrays):
    both = np.stack([arrays["k_cache"], arrays["v_cache"]], 1)
    return arrays | {"_kv": both, **{f"{n}_cache": View("_kv", (slice(None), i)) for i, n in enumerate("kv")}}


def _packed_last(arrays):
    """[pages kv_heads page_size 2*dim], as vLLM's CPU platform keeps it."""
    dim = arrays["k_cache"].shape[-1]
    both = np.concatenate([arrays["k_cache"], arrays["v_cache"]], -1).transpose(0, 2, 1, 3)
    k, v = (..., slice(0, dim)), (..., slice(dim, None))
    return arrays | {"_kv": both, "k_cache": View("_kv", k, (0, 2, 1, 3)), "v_cache": View("_kv", v, (0, 2, 1, 3))}


def _huge(arrays):
    """The same slots at the far end of a cache of more than 2^31 elements; what lies at both ends must stay."""
    cache = arrays["k_cache"]
    pages, page_size = cache.shape[:2]
    shape = (2**31 // cache[0].size + 128, *cache.shape[1:])
    rows = {page: cache[page % pages] for page in (*range(64), *range(shape[0] - 64, shape[0]))}
    slots = np.where(arrays["slots"] < 0, -1, arrays["slots"] + (shape[0] - pages) * page_size)
    return arrays | {"k_cache": Sparse(shape, rows), "slots": slots}


LAYOUTS = {"NHD": dict, "HND": _hnd, "packed": _packed, "packed_last": _packed_last, "huge": _huge}


def _set(name, index, value):
    def change(arrays):
        arrays[name][index] = value

    return change


def _drop(name):
    def change(arrays):
        arrays[name] = None

    return change


def _same_slot(arrays):
    arrays["slots"][2] = arrays["slots"][0] = 7


BREAKS = {
    "NaN, infinity": lambda arrays: arrays["k"][0, 0].__setitem__(slice(3), (np.nan, np.inf, -np.inf)),
    "slot past the end": _set("slots", 1, 96),
    "slot below -1": _set("slots", 0, -2),
    "slot of 2^40": _set("slots", 2, 2**40),
    "two tokens, one slot": _same_slot,
    "values without a cache": _drop("v_cache"),
    "a cache without values": _drop("v"),
    "scale 0": _set("k_scale", (), 0),
    "scale below float32": _set("k_scale", (), 1e-50),
    "scale NaN": _set("v_scale", (), np.nan),
}


def check(call, sizes):
    if (call["v"] is None) != (call["v_cache"] is None):
        given, missing = ("v", "v_cache") if call["v_cache"] is None else ("v_cache", "v")
        raise ValueError(f"write_kv: {given} is given and {missing} is None; give both, or neither")
    quantized = sizes["C"] not in FLOATS
    if not quantized and sizes["C"] != sizes["T"]:
        raise ValueError(f"write_kv: the caches are {sizes['C']} and k is {sizes['T']}; cast k and v to {sizes['C']}")
    for name in ("k_scale", "v_scale"):
        if (given := call[name]) is not None:
            if not quantized:
                raise ValueError(f"write_kv: {name} is for int8 and FP8 caches; these are {sizes['C']}: leave it out")
            if tuple(given.shape) not in ((), (1,), (sizes["kv_heads"],)):
                raise ValueError(
                    f"write_kv: {name} has shape {tuple(given.shape)}; give 1 value or kv_heads={sizes['kv_heads']}"
                )


def check_values(call):
    """The slots and the scales, read on the host."""
    slots, capacity = call["slots"], call["k_cache"].shape[0] * call["k_cache"].shape[1]
    if bool((wrong := (slots < -1) | (slots >= capacity)).any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"write_kv: slots[{at}] is {int(slots[at])}; the cache has slots 0 to {capacity - 1}, and -1 skips a token"
        )
    taken, count = slots[slots >= 0].unique(return_counts=True)
    if bool((count > 1).any()):
        slot = int(taken[count.argmax()])
        at = (slots == slot).nonzero().flatten().tolist()
        raise ValueError(f"write_kv: slot {slot} is given to tokens {at}; give each token a slot of its own, or -1")
    for name in ("k_scale", "v_scale"):
        scale = call[name]
        if scale is not None and not bool(((scale > 0) & (scale < torch.inf)).all()):
            raise ValueError(f"write_kv: {name} is {scale.tolist()}; scales must be positive and finite")


def cost(call, sizes):
    width = sizes["kv_heads"] * (sizes["dim"] + sizes.get("v_dim", 0))
    moved = sizes["tokens"] * (width * (itemsize(call["k"]) + itemsize(call["k_cache"])) + itemsize(call["slots"]))
    return Cost(moved, sizes["tokens"] * width * (dtype_name(call["k_cache"]) not in FLOATS))


def _case(name, *, hostile=False, raises=None, tokens=7, **more):
    return Case(name, {"tokens": tokens} | more, hostile, raises)


@op(
    """k[tokens kv_heads dim]:T v?[tokens kv_heads v_dim]:T
    k_cache![pages page_size kv_heads dim]:C v_cache?![pages page_size kv_heads v_dim]:C slots[tokens]:int64
    k_scale?[*k_scales]:float32 v_scale?[*v_scales]:float32 ->""",
    dtypes={"T": FLOATS, "C": (*FLOATS, "int8", "float8_e4m3fn", "float8_e5m2")},
    cases=[
        _case("one token", tokens=1),
        _case("some tokens"),
        _case("many tokens", tokens=300, pages=24, kv_heads=8, dim=128),
        _case("MLA", kv_heads=1, dim=576, values=False),
        _case("v_dim below dim", dim=96, v_dim=64),
        _case("HND", layout="HND"),
        _case("packed K|V", layout="packed"),
        _case("packed K|V last", layout="packed_last"),
        _case("strided k and v", fused=True),
        _case("int8 cache", C="int8", scales="tensor"),
        _case("int8 cache, scale per head", C="int8", scales="head"),
        _case("e4m3 cache", C="float8_e4m3fn", scales="one"),
        _case("e4m3 cache, scale per head, HND", C="float8_e4m3fn", scales="head", layout="HND"),
        _case("e5m2 cache, scale per head", C="float8_e5m2", scales="head"),
        _case("e4m3 cache, no scale", C="float8_e4m3fn"),
        _case("MLA, e4m3 cache", kv_heads=1, dim=576, values=False, C="float8_e4m3fn", scales="tensor"),
        _case("skipped tokens", hostile=True, skipped=3),
        _case("all skipped", hostile=True, skipped=7),
        _case("no tokens", hostile=True, tokens=0),
        _case("a full cache", hostile=True, tokens=96),
        *(_case(f"page size {size}", hostile=True, page_size=size, pages=9) for size in (1, 3, 256)),
        *(_case(f"dim {dim}", hostile=True, dim=dim) for dim in (1, 3, 72, 136)),
        *(_case(f"saturated {C}", hostile=True, C=C, scales="tensor", size=3e4)
          for C in ("int8", "float8_e4m3fn", "float8_e5m2")),
        *(_case(f"tiny values, {C}", hostile=True, C=C, scales="head", size=1e-4)
          for C in ("int8", "float8_e4m3fn", "float8_e5m2")),
        *(_case(f"NaN and infinity, {C or 'plain'}", hostile=True, C=C, break_it="NaN, infinity")
          for C in (None, "int8", "float8_e4m3fn", "float8_e5m2")),
        _case("cache beyond 2^31 elements", hostile=True, C="int8", scales="tensor", values=False, layout="huge"),
        *(_case(name, hostile=True, raises=words, break_it=name)
          for name, words in {
              "slot past the end": r"slots\[1\] is 96; the cache has slots 0 to 95",
              "slot below -1": r"slots\[0\] is -2",
              "slot of 2^40": r"slots\[2\] is 1099511627776",
              "two tokens, one slot": r"slot 7 is given to tokens \[0, 2",
              "values without a cache": r"v is given and v_cache is None",
              "a cache without values": r"v_cache is given and v is None",
          }.items()),
        *(_case(name, hostile=True, raises=words, break_it=name, C="float8_e4m3fn", scales="tensor")
          for name, words in {
              "scale 0": r"k_scale is 0\.0; scales must be positive",
              "scale below float32": r"k_scale is 0\.0; scales must be positive",
              "scale NaN": r"v_scale is nan; scales must be positive",
          }.items()),
        _case("scale for a plain cache", hostile=True, raises="k_scale is for int8 and FP8", scales="tensor"),
    ],
    inputs=inputs,
    cost=cost,
    check=check,
    check_values=check_values,
)  # fmt: skip
def write_kv(k, v, k_cache, v_cache, slots, *, k_scale=None, v_scale=None):
    """Store each token's key and value in its slot, quantized where the cache is.

        k_cache[slots[t] // page_size, slots[t] % page_size, h] = q(k[t, h] / k_scale[h])        v alike
        q rounds to nearest even and saturates: at -128 and 127 in int8, at the largest finite value in FP8

    Args:
        k, v: the new tokens; strided rows are fine.
        k_cache, v_cache: written in place; strided views, so NHD, HND and packed K|V need no copy.  dtype of k, or
            int8, float8_e4m3fn, float8_e5m2.  Where values are stored inside keys (MLA), v and v_cache are None.
        slots: page * page_size + offset; -1 skips the token.  No slot may be given twice.  Where values are not
            checked, a slot outside the cache is skipped: nothing else is ever written.
        k_scale, v_scale: what the quantized cache will be multiplied by, one value or one per KV head; None is 1.

    Returns:
        Nothing.  NaN stays NaN in FP8 and becomes 0 in int8; infinities saturate.
    """
    page_size, capacity = k_cache.shape[1], k_cache.shape[0] * k_cache.shape[1]
    stored = ((slots >= 0) & (slots < capacity)).nonzero().flatten()
    page, offset = slots[stored] // page_size, slots[stored] % page_size
    for rows, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if cache is not None:
            _bytes(cache)[page, offset] = _bytes(_quantized(rows[stored], scale, cache.dtype))


def _quantized(rows, scale, dtype):
    """rows / scale in `dtype`, rounded to nearest even, saturated."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return rows.to(dtype)
    rows = wide(rows) if scale is None else wide(rows) / scale.to(wide(rows).dtype).reshape(-1, 1)
    if dtype == torch.int8:
        return torch.nan_to_num(rows, nan=0).round().clamp(-128, 127).to(dtype)
    largest = FP8_MAX[str(dtype).removeprefix("torch.")]
    return rows.clamp(-largest, largest).to(dtype)


def _bytes(x):
    """FP8 as bytes: torch indexes those on every device."""
    return x.view(torch.uint8) if x.dtype.is_floating_point and x.dtype.itemsize == 1 else x
