"""paged_attention: the kernels of _attention.py, and how their grid is computed from shapes alone."""

import math

import torch

from ._attention import attend, combine
from ._bytes import stored, words_of
from ._chip import chip_of
from ._launch import INTERPRETED, blocks, computed, launch, power, readable, refuse_device, rounded
from ._tuned import choose

TRAITS = {"deterministic": True, "graph_safe": True, "accumulate": "float32"}

SHARE_BYTES = 256 << 20  # of partial results, where the keys of a sequence are shared among programs
FEW_ROUNDS = 2 if INTERPRETED else 12  # of programs: in tests, both kinds
FAR = 2**30  # farther than any key is from any query


def refuse(q, v_cache, **others):
    yield from refuse_device(q)
    chip = chip_of(q)
    if chip.rdna:  # a wave keeps whole rows of q in registers, on RDNA 3 each operand twice
        wide = max(q.shape[2], v_cache.shape[3])
        most = 128 if q.dtype == torch.float32 or chip.arch.startswith("gfx11") else 256
        if wide > most:
            dtype = str(q.dtype).removeprefix("torch.")
            reason = f"dim={wide} in {dtype}; a wave of {chip.arch} has registers for {most} channels"
            yield "SHAPE", reason, "use another backend for this call, or another chip"


def run(
    q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, *, scale, causal, window, soft_cap, sinks, alibi_slopes,
    k_scale, v_scale, tree_mask, return_lse, max_seqlen_q, max_seqlen_k,
):  # fmt: skip
    tokens, heads, dim = q.shape
    _, page_size, kv_heads, v_dim = v_cache.shape
    seqs, group, chip = seq_lens.shape[0], heads // kv_heads, chip_of(q)
    out = torch.empty((tokens, heads, v_dim), dtype=computed(q.dtype), device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device) if return_lse else None
    if out.numel() == 0:
        return (rounded(out, q.dtype), lse) if return_lse else rounded(out, q.dtype)

    queries = min(tokens, max_seqlen_q or tokens)  # the most of a sequence
    keys = min(block_table.shape[1] * page_size, FAR if max_seqlen_k is None else max_seqlen_k)
    if window[0] >= 0 and tree_mask is None:
        keys = min(keys, window[0] + 64)  # of a tile, which has about as many tokens
    rows = group * min(queries, blocks(tokens, seqs))
    heuristic = _tiles(
        chip, q.element_size(), k_cache.element_size(), rows, keys, dim, v_dim, programs=seqs * kv_heads,
        tree=tree_mask is not None, window=window[0] >= 0,
    )  # fmt: skip
    heuristic.setdefault("EDGE", heuristic["BLOCK_N"])
    tiles = choose(
        "paged_attention", q.device, heuristic, dtype=q.dtype, cache=k_cache.dtype, group=group, dim=dim, v_dim=v_dim,
        page=page_size, rows=power(rows, 16, 1024), keys=power(keys, 256),
    )  # fmt: skip
    tiles = tiles | {"EDGE": min(tiles["EDGE"], tiles["BLOCK_N"])}
    in_words: list = [None]
    if q.element_size() == 2 and not (chip.arch.startswith("sm_10") and tiles["BLOCK_M"] >= 64):
        in_words = [words_of(cache, chip) for cache in (k_cache, v_cache)]
    words = None not in in_words  # tcgen05 of Blackwell: two sums in its own memory take more than words save
    dim_a, dim_b = _split(dim, 32 if words else 16)
    inside = v_cache.data_ptr() == k_cache.data_ptr() and v_cache.stride() == k_cache.stride() and v_dim == dim_a
    if computed(q.dtype) == torch.float32 and dim == dim_a >= 32 and not inside:
        dim_a, dim_b = dim // 2, dim // 2  # two sums of half the length lose less
    in_tile = min(group, tiles["BLOCK_M"])
    per_tile = tiles["BLOCK_M"] // in_tile  # tokens
    one_tile = queries <= per_tile
    count, parts = seqs if one_tile else tokens // per_tile + seqs, kv_heads * blocks(group, in_tile)
    shares = _shares(chip, tiles, max(seqs, tokens // per_tile) * parts, keys, 4 * tokens * heads * v_dim)
    # In few rounds of programs a long tile that begins late ends last; in many, a head's keys are found in L2.
    band = 1 if one_tile or count * parts > FEW_ROUNDS * chip.processors else parts
    share_out = share_lse = None
    if shares > 1:
        share_out = torch.empty((tokens, heads, shares, v_dim), dtype=torch.float32, device=q.device)
        share_lse = torch.empty((tokens, heads, shares), dtype=torch.float32, device=q.device)

    q_in = readable(q if q.stride(2) == 1 else q.contiguous())
    (k_in, kind), (v_in, _) = in_words if words else (stored(readable(cache), chip) for cache in (k_cache, v_cache))
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    tree = None if tree_mask is None else tree_mask.contiguous().view(torch.int32)
    k_scale, v_scale, slopes, sinks = (
        x if x is None else x.contiguous() for x in (k_scale, v_scale, alibi_slopes, sinks)
    )
    scale = dim**-0.5 if scale is None else scale
    plain = scale > 0 and not soft_cap and slopes is None and k_scale is None
    unit = math.log2(math.e) * (scale if plain else 1)
    left, right = window
    right = 0 if causal else right
    launch(
        attend, (count * band, parts // band, shares), q,
        q_in, k_in, v_in, table, seq_lens.contiguous(), cu_seqlens_q.contiguous(),
        k_scale, v_scale, slopes, sinks, tree, out, lse, share_out, share_lse,
        scale, unit, soft_cap or None, min(left, FAR), min(right, FAR), seqs, kv_heads, band, *q_in.stride()[:2],
        *k_in.stride(), *v_in.stride(), table.stride(0), 0 if tree is None else tree.shape[1],
        _step(k_scale), _step(v_scale),
        GROUP=group, HEADS=in_tile, DIM=dim, DIM_A=dim_a, DIM_B=dim_b, V_DIM=v_dim, 
        V_PAD=power(v_dim, 32 if words else 16), PAGE=page_size, KIND=kind, WORDS=words,
        PTX=words and not chip.amd and not INTERPRETED, V_IN_K=inside, SAME=k_in.stride() == v_in.stride(),
        WIDE=max(_reach(k_in), _reach(v_in)) >= 2**31,
        LEFT=left >= 0 and tree is None, RIGHT=right >= 0 and tree is None, PLAIN_SCORES=plain, SHARES=shares > 1,
        ONE_TILE=one_tile, **tiles,
    )  # fmt: skip
    if shares > 1:
        block = power(v_dim, 16, max(16, 4096 // shares))
        launch(
            combine, (tokens, heads, blocks(v_dim, block)), q, share_out, share_lse, sinks, out, lse, heads,
            SHARES=shares, PADDED=power(shares), V_DIM=v_dim, BLOCK=block, num_warps=4,
        )  # fmt: skip
    out = rounded(out, q.dtype)
    return (out, lse) if return_lse else out


def _tiles(chip, itemsize, cached, rows, keys, dim, v_dim, *, programs, tree, window):
    """itemsize and cached: bytes of q and of the caches; rows: query heads times tokens of a sequence, on average.

    keys: the most that a tile sees.  programs: that there are while none shares its keys with another.
    """
    wide = max(dim, v_dim)
    if INTERPRETED:
        edge = 128 if rows <= 16 else 64
        return {"BLOCK_M": power(rows, 16, 64), "BLOCK_N": 128, "EDGE": edge, "num_warps": 4, "num_stages": 1}
    if itemsize == 4:  # no matrix instruction: registers are what limits
        block = power(rows, 16, 32 if wide <= 128 and cached > 1 and not chip.rdna else 16)
        warps = 8 if wide <= 256 else 4 if chip.amd else 16  # a lane has 256 registers there with 8, 128 here with 16
        return {"BLOCK_M": block, "BLOCK_N": block, "num_warps": warps, "num_stages": 1}
    # AMD: Triton gives each wave whole rows of the first product, so those beyond one for 16 rows would multiply, and
    # unpack, the same keys again.  They are as many as registers ask for.
    if chip.rdna:
        if wide > 128:
            block_m, block_n, waves = 16, 16, 4
        elif chip.arch.startswith("gfx11"):
            block_m, block_n, waves = (16, 16, 4 if window else 2) if rows <= 16 else (64, 16, 2)
        else:
            block_m, waves = power(rows, 16, 128), 1
            block_n = 16 if block_m == 32 else 32  # two waves stage more keys each than eight, beside masks
        return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": waves * block_m // 16, "num_stages": 1}
    if rows <= 64 or wide > 256:  # decode: bytes in flight matter
        block_m = power(rows, 16, 64 if wide <= 256 or chip.amd else 16)
        if chip.amd:
            block_n = 64 if wide <= 128 else 32 if wide <= 256 else 16
            return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": block_m // 16, "num_stages": 1}
        if wide > 256:
            return {"BLOCK_M": block_m, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3}
        light = block_m == 16 and wide <= 128
        own = keys // max(1, 2 * chip.processors // programs)  # keys of a program
        if light and cached > 1 and chip.hopper and own <= 1024:  # so few passes that none is worth asking early for
            return {"BLOCK_M": 16, "BLOCK_N": 128 if own > 256 else 64, "num_warps": 4, "num_stages": 1}
        block_n = 128 if light and cached > 1 and 2 * programs > chip.processors else 64
        if block_m > 16 and dim & (dim - 1):  # read as two powers of two: registers
            block_n = 32
        stages = 3 if cached > 1 else 5 if chip.hopper else 4
        if keys <= 1024:  # few passes: smaller ones begin sooner
            block_n, stages = min(block_n, 64), 3 if block_m > 16 and 64 < wide <= 128 else 2  # two spill
        warps = 2 if light and block_n == 64 else 4  # who shares a pass waits for the others
        edge = min(block_n, 32) if block_m > 16 else block_n  # masks of 32 rows take registers
        return {"BLOCK_M": block_m, "BLOCK_N": block_n, "EDGE": edge, "num_warps": warps, "num_stages": stages}
    if chip.amd:
        return {"BLOCK_M": 128, "BLOCK_N": 64 if wide <= 128 else 32, "num_warps": 4, "num_stages": 1}
    if tree:  # its words lie in shared memory too
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    if chip.hopper:  # EDGE: of 128 keys on the diagonal a prompt's tokens see half
        if wide <= 128 and cached > 1 and keys <= 512:
            return {"BLOCK_M": 64, "BLOCK_N": 64, "EDGE": 64, "num_warps": 4, "num_stages": 2}
        if wide <= 128 and cached > 1 and not window:
            few = 2 * blocks(rows, 128) * programs <= chip.processors
            block_m, warps = (64, 4) if few else (128, 8)
            return {"BLOCK_M": block_m, "BLOCK_N": 128, "EDGE": 32, "num_warps": warps, "num_stages": 5}
        return {"BLOCK_M": 128, "BLOCK_N": 64, "EDGE": 32, "num_warps": 8, "num_stages": 5 if wide <= 128 else 3}
    return {"BLOCK_M": 128 if wide <= 128 else 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}


def _shares(chip, tiles, programs, keys, bytes_each):
    """How many programs share the keys of a tile: a power of two, so that no processor is idle."""
    each = 2 if tiles["BLOCK_M"] < 64 else 1
    if chip.amd:
        each = max(each, 4 // tiles["num_warps"])  # a wave for each of a processor's four SIMDs
    wanted = min(chip.processors * each // programs, keys // (2 * tiles["BLOCK_N"]), SHARE_BYTES // bytes_each, 64)
    return power(wanted + 1) // 2 or 1


def _split(dim, least):
    """dim as a power of two and the power of two that covers the rest: 576 = 512 + 64, 72 = 64 + 16 - 8."""
    most = max(least, power(dim + 1) // 2)
    return most, power(dim - most, least)


def _reach(cache):
    """No element lies farther from the first."""
    return cache.untyped_storage().nbytes() // cache.element_size()


def _step(scale):
    return 0 if scale is None or scale.numel() == 1 else 1
