"""Paged attention on CUDA, without a look at any value: shapes come from the arguments alone.

The keys that some query sees are gathered to [seqs, keys, kv_heads, dim], `keys` being the upper bound that the caller
gave or the width of the block table; places that no key fills repeat a live one, so that junk never enters.  Then
torch's ragged flash kernel takes them or, for what that does not know, batched products in float32.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad

SCORE_BYTES = 4 << 30  # of the float32 scores that the batched products may allocate

_flash_kernel = torch.ops.aten._flash_attention_forward


def refuse(q, cache, options):
    queries, keys = _bounds(q, cache, options)
    needed = 4 * cache.lengths.shape[0] * q.shape[1] * queries * keys
    if needed > SCORE_BYTES and not _takes_flash(q, cache, options):
        yield (
            "SHAPE",
            f"the scores of {cache.lengths.shape[0]} sequences, {queries} queries and {keys} keys take "
            f"{needed / 2**30:.1f} GiB; at most {SCORE_BYTES / 2**30:g} are allocated",
            "give max_seqlen_q and max_seqlen_k, or fewer sequences, or leave out what torch's flash kernel does not "
            "know: soft_cap, alibi_slopes, tree_mask, return_lse, float32, quantized caches, dim above 256",
        )


def attend(q, cache, options):
    """(out [tokens, heads, v_dim], lse float32 [tokens, heads]); zeros and -inf where nothing is seen."""
    queries, keys = _bounds(q, cache, options)
    flash = _takes_flash(q, cache, options)
    gathered = _gather(cache, keys, options.window[0], q.dtype if flash else torch.float32)
    return (_flash if flash else _products)(q, gathered, cache.starts, queries, options)


def _takes_flash(q, cache, options):
    """Whether the flash kernel answers.  Callers never see its lse, which comes from approximate exponentials."""
    return (
        q.dtype != torch.float32
        and not (options.soft_cap or options.exact)
        and options.slopes is None
        and options.tree_mask is None
        and max(q.shape[2], cache.values.shape[3]) <= 256
        and cache.keys.dtype == q.dtype  # a dequantized key, rounded to bfloat16 again, misses the tolerance
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _bounds(q, cache, options):
    """(queries, keys): the most of each that a sequence has, as far as shapes and the caller tell."""
    queries, keys = q.shape[0], cache.table.shape[1] * cache.keys.shape[1]
    queries = queries if options.max_seqlen_q is None else min(queries, options.max_seqlen_q)
    keys = keys if options.max_seqlen_k is None else min(keys, options.max_seqlen_k)
    left = options.window[0]
    return queries, keys if left < 0 else min(keys, queries + left)


class Gathered(NamedTuple):
    """The keys and values of a batch, and where they stand."""

    k: torch.Tensor  # [seqs, keys, kv_heads, dim], dequantized
    v: torch.Tensor
    position: torch.Tensor  # [seqs, keys] of each key in its sequence; the sequence may be shorter
    first: torch.Tensor  # [seqs], the first gathered position
    length: torch.Tensor
    new: torch.Tensor


def _gather(cache, keys, left, dtype):
    length, new, size = cache.lengths.long(), cache.starts.diff().long(), cache.keys.shape[1]
    first = (length - new - left).clamp(min=0) if left >= 0 else torch.zeros_like(length)
    position = first[:, None] + torch.arange(keys, device=length.device)
    at = torch.minimum(position, length[:, None] - 1).clamp(min=0)
    column = torch.div(at, size, rounding_mode="floor")
    page = cache.table.gather(1, column).long().clamp(0, cache.keys.shape[0] - 1)  # an empty sequence's page is junk
    index = page, at - column * size
    k = _picked(cache.keys, index, cache.k_scale, dtype)
    v = _picked(cache.values, index, cache.v_scale, dtype)
    return Gathered(k, v, position, first, length, new)


def _picked(cache, index, scale, dtype):
    if cache.dtype.itemsize > 1:
        return cache[index].to(dtype)
    rows = cache.view(torch.int8)[index].view(cache.dtype).float()  # torch indexes bytes, not FP8
    return (rows if scale is None else rows * scale.reshape(-1, 1)).to(dtype)


def _flash(q, gathered, starts, queries, options):
    seqs, keys = gathered.position.shape
    tokens, heads, v_dim = q.shape[0], q.shape[1], gathered.v.shape[3]
    width = max(q.shape[2], v_dim)
    width += -width % 8  # the kernel knows one width, a multiple of 8
    q, k, v = (pad(x, (0, width - x.shape[-1])) for x in (q, gathered.k, gathered.v))
    causal, (left, right) = options.causal, options.window
    if queries == 1 and tokens == seqs:
        causal, left, right = False, -1, -1  # what was gathered is what the one query sees; so heads share their keys
    elif queries == 1:
        queries = 2  # with a bound of 1, the kernel takes for granted that each sequence has a query
    out, lse, *_ = _flash_kernel(
        q,
        k.flatten(0, 1),
        v.flatten(0, 1),
        starts,
        torch.arange(0, (seqs + 1) * keys, keys, dtype=torch.int32, device=q.device),
        queries,
        keys,
        0.0,
        causal,
        False,
        scale=options.scale,
        window_size_left=left,
        window_size_right=0 if causal else right,
        seqused_k=(gathered.length - gathered.first).int(),
    )
    lse = lse.reshape(heads, tokens).t()
    return out[..., :v_dim], lse.masked_fill(lse == torch.inf, -torch.inf)  # inf marks a row without keys


def _products(q, gathered, starts, queries, options):
    """Batched products, scores and all: [seqs, kv_heads, group, queries, keys]."""
    tokens, kv_heads = q.shape[0], gathered.k.shape[2]
    row, old = torch.arange(queries, device=q.device), gathered.length - gathered.new
    token = (starts[:-1, None].long() + row).clamp(max=tokens - 1)  # of each query; beyond a sequence's last, any
    distance = gathered.position[:, None] - (old[:, None] + row)[:, :, None]  # [seqs, queries, keys]
    seen = _seen(gathered, distance, options)
    if options.tree_mask is not None:
        seen &= _tree(options.tree_mask.view(torch.int32)[token], gathered.position - old[:, None])
    grouped = q[token].float().unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    k, v = gathered.k.permute(0, 2, 3, 1), gathered.v.transpose(1, 2)
    scores = torch.matmul(grouped.flatten(2, 3), k).mul_(options.scale)
    if options.soft_cap:
        scores = scores.div_(options.soft_cap).tanh_().mul_(options.soft_cap)
    scores = scores.unflatten(2, (-1, queries))
    if options.slopes is not None:
        scores += options.slopes[..., None, None] * distance[:, None, None]
    scores.masked_fill_(~seen[:, None, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = scores.sub_(lse[..., None]).exp_()
    out = torch.matmul(weights.flatten(2, 3), v).unflatten(2, (-1, queries))
    out = out.masked_fill((lse == -torch.inf)[..., None], 0).permute(0, 3, 1, 2, 4).flatten(2, 3)
    lse = lse.permute(0, 3, 1, 2).flatten(2, 3)  # [seqs, queries, heads]
    place = torch.arange(tokens, device=q.device, dtype=starts.dtype)
    seq = torch.searchsorted(starts[1:], place, right=True)
    index = seq, place - starts[seq]
    return out[index], lse[index]


def _seen(gathered, distance, options):
    """[seqs, queries, keys]: is this a key of the sequence, and does the query see it?"""
    left, right = options.window
    seen = (gathered.position < gathered.length[:, None])[:, None].expand(distance.shape)
    seen = seen & (distance <= (0 if options.causal else right)) if options.causal or right >= 0 else seen.clone()
    return seen & (distance >= -left) if left >= 0 else seen


def _tree(words, guess):
    """words [seqs, queries, words], and which new token each key is [seqs, keys], negative for the older ones."""
    at = guess.clamp(min=0)
    word = torch.div(at, 32, rounding_mode="floor").clamp(max=words.shape[2] - 1)
    words = words.gather(2, word[:, None].expand(-1, words.shape[1], -1))
    return ((words >> (at % 32).int()[:, None]) & 1).bool() | (guess < 0)[:, None]
