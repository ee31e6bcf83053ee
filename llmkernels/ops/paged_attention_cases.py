"""The calls of paged_attention worth making, and how their inputs are drawn."""

import numpy as np

from llmkernels.contract import Case, Sparse, View

DECODE = {"new": (1, 1, 1), "lengths": (17, 33, 5)}
PREFILL = {"new": (9, 32), "lengths": (9, 32)}
CHUNK = {"new": (7, 16), "lengths": (30, 50)}
MIXED = {"new": (1, 13, 1, 5), "lengths": (40, 13, 1, 21)}
GQA = {"heads": 8, "kv_heads": 2, "dim": 64}
JUNK_IDS = (-1, 2**30, -(2**31), 2**31 - 1)  # what unused table entries hold


def inputs(
    rng,
    new,
    lengths,
    heads=8,
    kv_heads=2,
    dim=64,
    v_dim=None,
    page_size=16,
    layout="NHD",
    C=None,
    sinks=False,
    alibi=False,
    scales=None,
    tree=False,
    rising=False,
    spare_pages=3,
    wide_table=2,
    break_it=None,
    **options,
):
    """Scattered pages, NaN in every slot no query may see, junk in unused table entries."""
    v_dim = v_dim or dim
    needed = [-(-n // page_size) for n in lengths]
    pages = sum(needed) + spare_pages
    table = rng.choice(JUNK_IDS, (len(new), max(needed, default=0) + wide_table)).astype(np.int32)
    order = rng.permutation(pages)
    live = np.zeros((pages, page_size), bool)
    for s, count in enumerate(needed):
        table[s, :count], order = order[:count], order[count:]
        live[table[s, :count]] = (np.arange(count * page_size) < lengths[s]).reshape(count, page_size)
    size = 40 if C == "int8" else 1
    tokens = sum(new)
    arrays = {
        "q": 2 * rng.standard_normal((tokens, heads, dim)),
        "k_cache": _cache(rng, live, kv_heads, dim, size),
        "v_cache": _cache(rng, live, kv_heads, v_dim, size),
        "block_table": table,
        "seq_lens": np.array(lengths, np.int32),
        "cu_seqlens_q": np.cumsum([0, *new], dtype=np.int32),
        "sinks": rng.standard_normal(heads) if sinks else None,
        "alibi_slopes": 2.0 ** -np.arange(1, heads + 1) if alibi else None,
        "tree_mask": _tree(rng, new) if tree else None,
    }
    if rising:  # keys grow with their position, so that later blocks of an online softmax bring a new maximum
        for s, count in enumerate(needed):
            growth = 1 + np.arange(count * page_size) / 100
            arrays["k_cache"][table[s, :count]] *= growth.reshape(-1, page_size, 1, 1)
    if scales:
        count = {"tensor": (), "head": (kv_heads,)}[scales]
        arrays |= {"k_scale": rng.uniform(0.5, 2, count) / size, "v_scale": rng.uniform(0.5, 2, count) / size}
    arrays = LAYOUTS[layout](arrays, kv_heads, dim)
    if break_it:
        BREAKS[break_it](arrays)
    return arrays | options


def _cache(rng, live, kv_heads, dim, size):
    cache = size * rng.standard_normal((*live.shape, kv_heads, dim))
    cache[~live] = np.nan
    return cache


def _tree(rng, new):
    """Each new token sees itself and the path to a random earlier parent."""
    mask = np.zeros((sum(new), -(-max(new) // 32)), np.uint32)
    row = 0
    for count in new:
        seen: list[set] = []
        for i in range(count):
            seen.append((seen[rng.integers(i)] if i else set()) | {i})
            for j in seen[i]:
                mask[row + i, j // 32] |= np.uint32(1 << j % 32)
        row += count
    return mask


def _nhd(arrays, kv_heads, dim):
    return arrays


def _hnd(arrays, kv_heads, dim):
    k, v = (arrays[n].transpose(0, 2, 1, 3) for n in ("k_cache", "v_cache"))
    return arrays | {
        "_k": k,
        "_v": v,
        "k_cache": View("_k", axes=(0, 2, 1, 3)),
        "v_cache": View("_v", axes=(0, 2, 1, 3)),
    }


def _packed(arrays, kv_heads, dim):
    both = np.stack([arrays["k_cache"], arrays["v_cache"]], 1)
    all_ = slice(None)
    return arrays | {"_kv": both, "k_cache": View("_kv", (all_, 0)), "v_cache": View("_kv", (all_, 1))}


def _packed_last(arrays, kv_heads, dim):
    """[pages kv_heads page_size 2*dim], as vLLM's CPU platform keeps it."""
    both = np.concatenate([arrays["k_cache"], arrays["v_cache"]], -1).transpose(0, 2, 1, 3)
    k, v = (..., slice(0, dim)), (..., slice(dim, None))
    return arrays | {"_kv": both, "k_cache": View("_kv", k, (0, 2, 1, 3)), "v_cache": View("_kv", v, (0, 2, 1, 3))}


def _mla(arrays, kv_heads, dim):
    return arrays | {"v_cache": View("k_cache", (..., slice(0, arrays["v_cache"].shape[-1])))}


def _strided_q(arrays, kv_heads, dim):
    """q as a slice of a fused QKV projection."""
    q = arrays["q"]
    rest = np.full((q.shape[0], 2 * kv_heads, dim), np.nan)
    return arrays | {"_qkv": np.concatenate([q, rest], 1), "q": View("_qkv", (slice(None), slice(0, q.shape[1])))}


def _huge(arrays, kv_heads, dim):
    """The same pages at the far end of a pool of more than 2^31 elements."""
    pages, page_size = arrays["k_cache"].shape[:2]
    shape = (2**31 // (page_size * kv_heads * dim) + pages, page_size, kv_heads, dim)
    shift = shape[0] - pages
    table = arrays["block_table"]
    rows = {n: Sparse(shape, {shift + p: arrays[n][p] for p in range(pages)}) for n in ("k_cache", "v_cache")}
    return (
        arrays | rows | {"block_table": np.where((table >= 0) & (table < pages), table + shift, table).astype(np.int32)}
    )


LAYOUTS = {
    "NHD": _nhd,
    "HND": _hnd,
    "packed": _packed,
    "packed_last": _packed_last,
    "MLA": _mla,
    "strided_q": _strided_q,
    "huge": _huge,
}


def _set(name, index, value):
    def change(arrays):
        arrays[name][index] = value

    return change


BREAKS = {
    "page id past the end": _set("block_table", (0, 0), 10**6),
    "negative page id": _set("block_table", (1, 0), -1),
    "length past the table": _set("seq_lens", 0, 10**5),
    "length below the new tokens": _set("seq_lens", 1, 3),
    "falling cu_seqlens": _set("cu_seqlens_q", 1, 10**4),
    "negative length": _set("seq_lens", 0, -3),
}


def _case(name, base, hostile=False, raises=None, **more):
    return Case(name, GQA | base | more, hostile, raises)


CASES = [
    _case("decode", DECODE),
    _case("prefill", PREFILL),
    _case("chunk", CHUNK),
    _case("mixed", MIXED, return_lse=True),
    _case("MHA", MIXED, kv_heads=8),
    _case("MQA", MIXED, kv_heads=1),
    _case("group of 7", DECODE, heads=14),
    _case("long decode", {"new": (1, 1), "lengths": (1500, 700)}, dim=128, return_lse=True),
    _case("long prefill", {"new": (200,), "lengths": (456,)}),
    _case("rising maximum", {"new": (1, 1, 3), "lengths": (65, 200, 130)}, rising=True, return_lse=True),
    _case("rising maximum, prompt", {"new": (90, 66), "lengths": (140, 66)}, rising=True, return_lse=True),
    _case(
        "rising maximum, e4m3 cache",
        {"new": (1, 1), "lengths": (100, 150)},
        rising=True,
        C="float8_e4m3fn",
        scales="head",
    ),
    _case("window over blocks", {"new": (1, 40), "lengths": (200, 150)}, rising=True, window=(70, 0)),
    _case("window of part of a block", {"new": (20, 1), "lengths": (170, 131)}, causal=False, window=(40, 30)),
    _case("window over blocks, dim 128", {"new": (70, 4), "lengths": (190, 99)}, dim=128, window=(64, 0)),
    _case("MLA", MIXED, heads=16, kv_heads=1, dim=576, v_dim=512, layout="MLA", scale=192**-0.5),
    _case("v_dim below dim", MIXED, dim=96, v_dim=64),
    _case("not causal", CHUNK, causal=False),
    _case("window", MIXED, window=(8, 0)),
    _case("window of one key", MIXED, window=(0, 0)),
    _case("window both ways", CHUNK, causal=False, window=(6, 3)),
    _case("soft cap", MIXED, soft_cap=3.0),
    _case("sinks", MIXED, sinks=True, return_lse=True),
    _case("ALiBi", MIXED, alibi=True),
    _case("window, soft cap, sinks", MIXED, window=(12, 0), soft_cap=5.0, sinks=True, return_lse=True),
    _case("tree", {"new": (6, 1, 9), "lengths": (25, 11, 9)}, tree=True, return_lse=True),
    _case("wide tree", {"new": (40,), "lengths": (90,)}, tree=True),
    _case("tree, dim 128", {"new": (9, 1), "lengths": (140, 7)}, tree=True, dim=128),
    _case("int8 cache", MIXED, C="int8", scales="tensor"),
    _case("int8 cache, scale per head", MIXED, C="int8", scales="head", return_lse=True),
    _case("e4m3 cache", MIXED, C="float8_e4m3fn", scales="tensor"),
    _case("e4m3 cache, no scale", DECODE, C="float8_e4m3fn"),
    _case("e5m2 cache, scale per head", MIXED, C="float8_e5m2", scales="head"),
    _case("HND", MIXED, layout="HND"),
    _case("packed K|V", MIXED, layout="packed"),
    _case("packed K|V last", MIXED, layout="packed_last"),
    _case("strided q", MIXED, layout="strided_q"),
    _case("with bounds", MIXED, max_seqlen_q=64, max_seqlen_k=128),
    *(_case(f"dim {dim}", MIXED, True, dim=dim) for dim in (72, 80, 96, 128, 136, 256)),
    *(_case(f"page size {size}", MIXED, True, page_size=size) for size in (1, 3, 64, 256)),
    _case("pool beyond 2^31 elements", MIXED, True, layout="huge", C="int8", scales="tensor"),
    _case("narrow table", MIXED, True, wide_table=0),
    _case("odd table", DECODE, True, wide_table=5),
    _case("padding sequences", {"new": (1, 1, 2, 0), "lengths": (9, 0, 0, 12)}, True, return_lse=True),
    _case("padding and sinks", {"new": (1, 1), "lengths": (9, 0)}, True, sinks=True, return_lse=True),
    _case(
        "rows that see nothing", {"new": (4,), "lengths": (20,)}, True, causal=False, window=(-1, -1), return_lse=True
    ),
    _case("no tokens", {"new": (0, 0), "lengths": (0, 7)}, True, return_lse=True),
    _case("no sequences", {"new": (), "lengths": ()}, True),
    _case("whole pages", {"new": (1, 16, 17), "lengths": (16, 32, 33)}, True),
    _case("a key past a page", {"new": (1, 15), "lengths": (17, 31)}, True),
    *(
        _case(name, {"new": (1, 5, 2), "lengths": (20, 5, 9)}, True, raises=words, break_it=name)
        for name, words in {
            "page id past the end": r"block_table\[0, 0\] is 1000000; the cache has pages 0 to",
            "negative page id": r"block_table\[1, 0\] is -1",
            "length past the table": r"seq_lens\[0\] is 100000; block_table has room",
            "length below the new tokens": r"seq_lens\[1\] is 3, but the sequence has 5 new tokens",
            "falling cu_seqlens": r"cu_seqlens_q is .*must rise from 0",
            "negative length": r"seq_lens\[0\] is -3",
        }.items()
    ),
    _case("heads not a multiple", DECODE, True, "heads=6 is not a multiple of kv_heads=4", heads=6, kv_heads=4),
    _case("bound too small", DECODE, True, "max_seqlen_k is 4; the longest is 33", max_seqlen_k=4),
    _case("tree and window", DECODE, True, "tree_mask with window", tree=True, window=(4, 0)),
    _case("scale for a plain cache", DECODE, True, "k_scale is for int8 and FP8 caches", scales="tensor"),
]
