"""Attention over a paged KV cache: PagedAttention, Kwon et al. 2023, https://arxiv.org/abs/2309.06180.

One ragged op.  A batch is sequences; a sequence brings some new tokens (its queries) and has a number of keys, new ones
included, in pages that a block table names.  One new token is decode, many are prefill or a chunk of it, a few with a
tree mask are speculative verification; a batch may mix them all.
"""

from itertools import pairwise

import torch

from llmkernels.contract import FLOATS, Cost
from llmkernels.ops.numerics import itemsize, wide
from llmkernels.ops.paged_attention_cases import CASES, inputs
from llmkernels.registry import op


def check(call, sizes):
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"paged_attention: heads={heads} is not a multiple of kv_heads={kv_heads}; repeat or drop heads until it is"
            + _maybe_hnd(call)
        )
    quantized = sizes["C"] != sizes["T"]
    if quantized and sizes["C"] in FLOATS:
        raise ValueError(
            f"paged_attention: the caches are {sizes['C']} and q is {sizes['T']}; cast one, or use int8 or FP8 caches"
        )
    for name in ("k_scale", "v_scale"):
        if (given := call[name]) is not None:
            if not quantized:
                raise ValueError(
                    f"paged_attention: {name} is for int8 and FP8 caches; these are {sizes['C']}: leave it out"
                )
            if tuple(given.shape) not in ((), (1,), (kv_heads,)):
                raise ValueError(
                    f"paged_attention: {name} has shape {tuple(given.shape)}; give 1 value or kv_heads={kv_heads}"
                )
    left, right = call["window"]
    if left < -1 or right < -1:
        raise ValueError(
            f"paged_attention: window is {(left, right)}; each side is a number of keys, or -1 for no limit"
        )
    if not call["soft_cap"] >= 0:
        raise ValueError(f"paged_attention: soft_cap is {call['soft_cap']}; give a positive bound, or 0 for none")
    if call["tree_mask"] is not None:
        for name, off in (("window", (-1, -1)), ("alibi_slopes", None)):
            if (tuple(call[name]) if name == "window" else call[name]) != off:
                raise ValueError(
                    f"paged_attention: tree_mask with {name}: a tree's token does not stand at its row; leave one out"
                )
        if not call["causal"]:
            raise ValueError(
                "paged_attention: tree_mask with causal=False: the mask replaces causal already; leave causal on"
            )


def check_values(call):
    """The block table and the lengths, read on the host."""
    table, starts, lengths = call["block_table"], call["cu_seqlens_q"].tolist(), call["seq_lens"].tolist()
    pages, page_size, tokens = call["k_cache"].shape[0], call["k_cache"].shape[1], call["q"].shape[0]
    if starts[0] != 0 or starts[-1] != tokens or any(a > b for a, b in pairwise(starts)):
        raise ValueError(f"paged_attention: cu_seqlens_q is {starts}; it must rise from 0 to tokens={tokens}")
    live: list[tuple[int, int]] = []
    for s, (new, length) in enumerate(zip(new_tokens(starts), lengths, strict=True)):
        if length < 0 or length > table.shape[1] * page_size:
            raise ValueError(
                f"paged_attention: seq_lens[{s}] is {length}; block_table has room for "
                f"{table.shape[1]} pages of {page_size}: widen it" + _maybe_hnd(call)
            )
        if length and length < new:
            raise ValueError(
                f"paged_attention: seq_lens[{s}] is {length}, but the sequence has {new} new tokens, which are keys too"
            )
        live.append(live_pages(length, new, page_size, call["window"][0]) if length and new else (0, 0))
    if width := max((last for _, last in live), default=0):
        column, (first, last) = torch.arange(width, device=table.device), torch.tensor(live, device=table.device).T
        ids = table[:, :width]
        wrong = (column >= first[:, None]) & (column < last[:, None]) & ((ids < 0) | (ids >= pages))
        if bool(wrong.any()):
            s, at = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"paged_attention: block_table[{s}, {at}] is {int(table[s, at])}; the cache has pages 0 to {pages - 1}"
            )
    for name, longest in (
        ("max_seqlen_q", max(new_tokens(starts), default=0)),
        ("max_seqlen_k", max(lengths, default=0)),
    ):
        if call[name] is not None and call[name] < longest:
            raise ValueError(f"paged_attention: {name} is {call[name]}; the longest is {longest}")
    if call["tree_mask"] is not None and call["tree_mask"].shape[1] * 32 < max(new_tokens(starts), default=0):
        raise ValueError(
            f"paged_attention: tree_mask has {call['tree_mask'].shape[1]} words of 32 new tokens; "
            f"a sequence has {max(new_tokens(starts))}"
        )


def _maybe_hnd(call):
    """A hint where the caches may be [pages kv_heads page_size dim], which shapes alone cannot tell."""
    heads, (_, second, third, _) = call["q"].shape[1], call["k_cache"].shape
    if second in (0, third) or heads % second:
        return ""
    return (
        f".  The caches' second dimension, {second}, divides heads: if that is kv_heads, they are HND; "
        "pass k_cache.transpose(1, 2) and v_cache.transpose(1, 2), which are views"
    )


def new_tokens(starts):
    """How many queries each sequence has."""
    return [b - a for a, b in pairwise(starts)]


def live_pages(length, new, page_size, left):
    """The range of table entries that some query may see; all others may hold anything."""
    first_key = max(0, length - new - left) if left >= 0 else 0
    return first_key // page_size, -(-length // page_size)


def cost(call, sizes):
    starts, lengths = call["cu_seqlens_q"].tolist(), call["seq_lens"].tolist()
    heads, left = sizes["heads"], call["window"][0]
    keys = pairs = 0
    for new, length in zip(new_tokens(starts), lengths, strict=True):
        if new and length:
            seen = visible(new, length, call["causal"], call["window"], torch.device("cpu"))
            keys += min(length, new + left) if left >= 0 else length
            pairs += int(seen.sum())
    width = sizes["dim"] + sizes["v_dim"]
    moved = sizes["tokens"] * heads * width * itemsize(call["q"])
    moved += keys * sizes["kv_heads"] * width * itemsize(call["k_cache"])
    moved += 4 * sizes["tokens"] * heads * call["return_lse"] + 4 * sum(-(-n // sizes["page_size"]) for n in lengths)
    return Cost(moved, 2 * pairs * heads * width)


def returns(call):
    return ("out", "lse") if call["return_lse"] else ("out",)


def visible(new, length, causal, window, device):
    """[new, length] bool: may query i see key j?  Query i stands at position length - new + i."""
    position = torch.arange(length - new, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None, :]
    left, right = window
    seen = torch.ones(new, length, dtype=torch.bool, device=device)
    if causal:
        seen &= key <= position
    if left >= 0:
        seen &= key >= position - left
    if right >= 0:
        seen &= key <= position + right
    return seen


@op(
    """q[tokens heads dim]:T k_cache[pages page_size kv_heads dim]:C v_cache[pages page_size kv_heads v_dim]:C
    block_table[seqs max_pages]:int32 seq_lens[seqs]:int32 cu_seqlens_q[seqs+1]:int32
    sinks?[heads]:float32 alibi_slopes?[heads]:float32 k_scale?[*k_scales]:float32 v_scale?[*v_scales]:float32
    tree_mask?[tokens words]:uint32
    -> out[tokens heads v_dim]:T lse?[tokens heads]:float32""",
    dtypes={"T": FLOATS, "C": (*FLOATS, "int8", "float8_e4m3fn", "float8_e5m2")},
    cases=CASES,
    inputs=inputs,
    cost=cost,
    check=check,
    check_values=check_values,
    returns=returns,
)
def paged_attention(
    q,
    k_cache,
    v_cache,
    block_table,
    seq_lens,
    cu_seqlens_q,
    *,
    scale: float | None = None,
    causal=True,
    window=(-1, -1),
    soft_cap=0.0,
    sinks=None,
    alibi_slopes=None,
    k_scale=None,
    v_scale=None,
    tree_mask=None,
    return_lse=False,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
):
    """Softmax attention of each new token over the keys of its own sequence.

        s[i, h, j] = cap(scale * q[i, h] . k[j, h // group]) + slope[h] * (j - position of i)
        out[i, h]  = sum over visible j of exp(s[i, h, j] - lse[i, h]) * v[j, h // group]
        lse[i, h]  = ln(sum over visible j of exp(s[i, h, j]) + exp(sinks[h]))

    Args:
        q: the new tokens of all sequences, one after the other.
        k_cache, v_cache: pages of keys and values, strided views: NHD, HND, packed K|V need no copy, and MLA is one KV
            head with v_cache a view of k_cache.  dtype of q, or int8, float8_e4m3fn, float8_e5m2.  What lies in slots
            that no query may see has no effect, NaN included.
        block_table: page ids of each sequence, in order.  Entries that no query needs may hold anything.
        seq_lens: keys of each sequence, new tokens included.  0 marks a padding sequence.
        cu_seqlens_q: tokens cu_seqlens_q[s] to cu_seqlens_q[s + 1] of q belong to sequence s.
        scale: of the scores; None is 1 / sqrt(dim).
        causal: a query sees keys up to its own position; positions are aligned to the end of the keys.
        window: (left, right), how many keys before and after its own position a query sees; -1 is no limit.
        soft_cap: cap(s) = soft_cap * tanh(s / soft_cap), Gemma 2; 0 is none.
        sinks: a logit per head that takes part in the softmax and has no value, GPT-OSS.
        alibi_slopes: of a bias linear in distance, Press et al. 2021, https://arxiv.org/abs/2108.12409.
        k_scale, v_scale: what a quantized cache is multiplied by, one value or one per KV head; None is 1.
        tree_mask: bit j % 32 of word j // 32: the token sees the j-th new token of its sequence.  All older keys are
            seen.  Replaces causal among the new tokens.
        return_lse: also return the log of the softmax's denominator.
        max_seqlen_q, max_seqlen_k: host-side upper bounds, which spare a backend a look at the lengths.

    Returns:
        out in the dtype of q; with return_lse also lse, natural log, float32, sink included.  A row that may see no
        key, like every row of a sequence of length 0, gives zeros and -inf (with sinks: the sink's logit).  Sums are
        float32; the one rounding is the store.
    """
    kv_heads, page_size = k_cache.shape[2], k_cache.shape[1]
    tokens, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(tokens, heads, v_cache.shape[3], dtype=wide(q[:0]).dtype, device=q.device)
    lse = torch.full((tokens, heads), -torch.inf, dtype=out.dtype, device=q.device)
    if sinks is not None:
        lse[:] = sinks.to(lse.dtype)
    starts, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    for s, (begin, end, length) in enumerate(zip(starts[:-1], starts[1:], lengths, strict=True)):
        new = end - begin
        if not new or not length:
            continue
        first, last = live_pages(length, new, page_size, window[0])
        pages = block_table[s, first:last].long()
        span = slice(first * page_size, length)  # the keys that were gathered
        k = _gather(k_cache, pages, length - span.start, k_scale, out.dtype)
        v = _gather(v_cache, pages, length - span.start, v_scale, out.dtype)
        queries = q[begin:end].to(out.dtype).unflatten(1, (kv_heads, heads // kv_heads))
        scores = torch.einsum("nhgd,lhd->hgnl", queries, _finite(k, length, new, causal, window)) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if alibi_slopes is not None:
            distance = (
                torch.arange(span.start, length, device=q.device)
                - torch.arange(length - new, length, device=q.device)[:, None]
            )
            scores = scores + alibi_slopes.to(out.dtype).view(kv_heads, -1, 1, 1) * distance
        seen = visible(new, length, causal, window, q.device)[:, span]
        if tree_mask is not None:
            seen[:, length - new :] = _tree(tree_mask[begin:end], new)
        scores = scores.masked_fill(~seen, -torch.inf).flatten(0, 1)  # [heads, new, keys]
        total = torch.logsumexp(scores, -1)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.to(out.dtype)[:, None])
        weights = torch.where(seen, torch.exp(scores - total[..., None]), 0).unflatten(0, (kv_heads, -1))
        out[begin:end] = torch.einsum("hgnl,lhd->nhgd", weights, _finite(v, length, new, causal, window)).flatten(1, 2)
        lse[begin:end] = total.T
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _gather(cache, pages, keys, scale, dtype):
    """The first `keys` rows of these pages, dequantized: [keys, kv_heads, dim]."""
    rows = cache[pages].flatten(0, 1)[:keys].to(dtype)
    return rows if scale is None else rows * scale.to(dtype).reshape(-1, 1)


def _finite(rows, length, new, causal, window):
    """Zeros for keys that no query sees, whatever the cache holds there."""
    seen = visible(new, length, causal, window, rows.device).any(0)[length - rows.shape[0] :]
    return torch.where(seen[:, None, None], rows, 0)


def _tree(words, new):
    """The packed mask as [new, new] bool."""
    bit = torch.arange(new, device=words.device)
    return (words.long()[:, bit // 32] >> (bit % 32) & 1).bool()
