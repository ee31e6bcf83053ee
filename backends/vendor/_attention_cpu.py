"""Paged attention on CPU: gather the pages of a sequence, then torch's flash kernel.

Where the time goes, and so the shape of this file:
- the flash kernel wants the queries that share a KV head as rows of one matrix (decode: [seqs, kv_heads, group, dim]);
- what was gathered should still be in the cache when it is read: long decode goes in tiles, merged by their lse;
- memory fresh from the system costs more than the gather itself: what is gathered goes into a scratch buffer;
- each call of a torch op costs microseconds: short sequences decode together, padded.
Only keys that some query sees are gathered, so that what other slots hold never matters.
"""

import threading
from typing import NamedTuple

import torch
from torch.nn.functional import pad

TILE_BYTES = 4 << 20  # of keys and values in one flash call of a decode
SCRATCH_BYTES = 1 << 18, 4 << 20  # of a gather: below, the allocator needs nothing fresh; above, it is a long prefill
QUERIES = 256  # of a prefill that share one mask
SCORES = 1 << 22  # elements of a bias or score matrix that differs from head to head

_flash_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_scratch = threading.local()  # keys and values, bytes[SCRATCH_BYTES[1]] each


class Pages(NamedTuple):
    """The way into the cache.  shared: the values are the first channels of the keys (MLA)."""

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    shared: bool
    dtype: torch.dtype  # what the flash kernel computes on

    @property
    def width(self):
        """Channels of what `gather` returns: the flash kernel knows one width for keys and values."""
        return max(self.keys.shape[3], self.values.shape[3])

    @property
    def key_bytes(self):
        """Of one position, all heads, keys and values."""
        heads, dim = self.keys.shape[2:]
        return heads * (dim + self.values.shape[3]) * self.keys.element_size()

    def gather(self, seq, first, last):
        """Keys and values first to last of a sequence, each [1, kv_heads, last - first, width]."""
        size = self.keys.shape[1]
        pages, start = self.table[seq, first // size : -(-last // size)], first % size
        rows = slice(start, start + last - first)
        return self._both(lambda cache, name: _rows(cache, pages, name)[:, rows].to(self.dtype))

    def gather_padded(self, seqs, firsts, lasts):
        """The same for several sequences at once, each from the start of its first page.

        Padding repeats a sequence's last page; rows that are no key of the range are zeroed.

        Returns:
            (k, v), each [seqs, kv_heads, rows, width]; the position of each row in its sequence, and whether it is one
            of the keys asked for, both [seqs, rows].
        """
        size = self.keys.shape[1]
        seqs, firsts, lasts = (torch.tensor(numbers)[:, None] for numbers in (seqs, firsts, lasts))
        begin, end = firsts // size, (lasts - 1) // size
        columns = torch.minimum(begin + torch.arange(int((end - begin).max()) + 1), end)
        pages = self.table[seqs, columns].flatten()
        position = begin * size + torch.arange(columns.shape[1] * size)
        real = (position >= firsts) & (position < lasts)
        junk = (~real).flatten().nonzero().flatten()

        def rows(cache, name):
            picked = _rows(cache, pages, name).to(self.dtype).index_fill_(1, junk, 0)
            return picked.view(*position.shape, *cache.shape[2:])

        return self._both(rows), position, real

    def _both(self, rows):
        k = _widened(rows(self.keys, "keys"), self.width).transpose(1, 2)
        return k, k if self.shared else _widened(rows(self.values, "values"), self.width).transpose(1, 2)


def attend(q, cache, options):
    """(out [tokens, heads, v_dim], lse float32 [tokens, heads]); zeros and -inf where nothing is seen."""
    # In half precision the flash kernel's lse is off by 2e-5: it sums weights that were rounded.
    dtype = torch.float32 if options.exact or options.soft_cap else q.dtype
    kv_heads, v_dim = cache.keys.shape[2], cache.values.shape[3]
    if cache.k_scale is not None and cache.k_scale.numel() == 1:
        options = options._replace(scale=options.scale * float(cache.k_scale))
    elif cache.k_scale is not None:
        dtype = torch.float32
        q = q.float() * cache.k_scale.repeat_interleave(q.shape[1] // kv_heads)[:, None]
    pages = Pages(cache.keys, cache.values, cache.table, _starts_with(cache.keys, cache.values), dtype)
    q = _widened(q.to(dtype), pages.width)
    parts = [*_parts(q, pages, cache.lengths.tolist(), cache.starts.tolist(), options)]
    if len(parts) == 1 and parts[0][1].shape[0] == q.shape[0]:
        _, out, lse = parts[0]
    else:
        out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        for rows, part, part_lse in parts:
            out[rows], lse[rows] = part, part_lse
    out = out[..., :v_dim]
    if cache.v_scale is not None:
        out = out.unflatten(1, (kv_heads, -1)).float().mul_(cache.v_scale.view(-1, 1, 1)).flatten(1, 2)
    return out, lse


def _parts(q, pages, lengths, starts, options):
    """Yields (rows of q, their out, their lse) until every row that may see a key had its turn."""
    tile = max(64, TILE_BYTES // pages.key_bytes)
    batches: dict[int, list] = {}  # bits of the length -> decoding sequences of about that length
    for seq, (begin, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        if begin == end or not length:
            continue
        if end - begin > 1 or options.tree_mask is not None:
            tree = None if options.tree_mask is None else options.tree_mask[begin:end]
            yield slice(begin, end), *_new_tokens(q[begin:end], pages, seq, length, tree, options)
        else:
            batches.setdefault(max(length, 64).bit_length(), []).append((begin, seq, length))
    for bits, members in batches.items():
        at_once = max(1, tile >> bits)
        for chunk in (members[i : i + at_once] for i in range(0, len(members), at_once)):
            tokens, seqs, lengths = zip(*chunk, strict=True)
            rows = slice(tokens[0], tokens[-1] + 1) if tokens[-1] - tokens[0] < len(chunk) else list(tokens)
            yield rows, *_decode(q[rows], pages, seqs, lengths, tile, options)


def _decode(q, pages, seqs, lengths, tile, options):
    """One query for each of `seqs`: several sequences that fit in one call, or one, cut into tiles of keys."""
    left = options.window[0]
    firsts = [max(0, length - 1 - left) if left >= 0 else 0 for length in lengths]
    q = q.unflatten(1, (pages.keys.shape[2], -1))
    if len(seqs) > 1:
        (k, v), position, real = pages.gather_padded(seqs, firsts, lengths)
        distance = position - torch.tensor(lengths)[:, None] + 1
        bias = _bias(real[:, None, None], distance[:, None, None], options.slopes, 1)
        out, lse = _attention(q, k, v, bias, False, options)
        return out.flatten(1, 2), lse.flatten(1, 2)
    parts, length = [], lengths[0]
    for first in range(firsts[0], length, tile):
        last = min(first + tile, length)
        k, v = pages.gather(seqs[0], first, last)
        bias = (
            None if options.slopes is None else _bias(None, torch.arange(first, last) - length + 1, options.slopes, 1)
        )
        parts.append(_attention(q, k, v, bias, False, options))
    out, lse = parts[0]
    if len(parts) > 1:
        outs, some = (torch.stack(x) for x in zip(*parts, strict=True))
        lse = torch.logsumexp(some, 0)
        out = torch.mul(outs, torch.exp(some - lse)[..., None]).sum(0)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _new_tokens(q, pages, seq, length, tree, options):
    """Several queries of one sequence: a prompt, a chunk of one, or a tree of guesses."""
    new, heads = q.shape[:2]
    (left, right), old = options.window, length - new
    plain = options.slopes is None and not options.soft_cap
    prompt = plain and not old and options.causal and tree is None and left < 0
    rows = new if prompt else QUERIES if plain else max(1, min(QUERIES, SCORES // (heads * length)))
    parts = []
    for start in range(old, length, rows):  # positions of the block's queries
        stop = min(start + rows, length)
        first = max(0, start - left) if left >= 0 else 0
        last = min(length, stop if options.causal else stop + right if right >= 0 else length)
        if tree is not None:
            last, seen = length, _tree(tree[start - old : stop - old], old, new)
        block = q[start - old : stop - old].unflatten(1, (pages.keys.shape[2], -1)).permute(1, 2, 0, 3)
        k, v = (x[0][:, None].expand(-1, block.shape[1], -1, -1) for x in pages.gather(seq, first, last))
        distance = torch.arange(first, last) - torch.arange(start, stop)[:, None]
        if tree is None:
            seen = None if prompt else _seen(distance, options)
        out, lse = _attention(block, k, v, _bias(seen, distance, options.slopes, 2), prompt, options)
        if tree is not None and bool((blind := ~seen.any(1)).any()):
            out, lse = out.masked_fill(blind[:, None], 0), lse.masked_fill(blind, -torch.inf)
        parts.append((out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(x) for x in zip(*parts, strict=True))


def _attention(q, k, v, bias, causal, options):
    """q [.., .., queries, width], k and v [.., .., keys, width] -> out like q, lse [.., .., queries]."""
    if not options.soft_cap:
        return _flash_kernel(q, k, v, 0.0, causal, attn_mask=bias, scale=options.scale)
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2))
    scores = scores.mul_(options.scale / options.soft_cap).tanh_().mul_(options.soft_cap)
    scores = scores if bias is None else scores.add_(bias)
    lse = torch.logsumexp(scores, -1)
    return torch.matmul(scores.sub_(lse[..., None]).exp_(), v.float()), lse


def _bias(seen, distance, slopes, extra):
    """What is added to the scores: ALiBi's slope times the distance, -inf where a key is not seen; None for nothing.

    extra: dimensions of the scores after those of the heads.
    """
    if slopes is None and (seen is None or bool(seen.all())):
        return None
    bias = torch.zeros(distance.shape) if slopes is None else slopes[(..., *(None,) * extra)] * distance
    return bias if seen is None else bias.masked_fill_(~seen, -torch.inf)


def _seen(distance, options):
    """Whether a query sees the key that lies `distance` after it."""
    left, right = options.window
    seen = distance >= -left if left >= 0 else torch.ones_like(distance, dtype=torch.bool)
    if options.causal or right >= 0:
        seen &= distance <= (0 if options.causal else right)
    return seen


def _tree(words, old, new):
    """The packed mask, after the older keys, which all are seen: [queries, old + new]."""
    bit = torch.arange(new)
    seen = (words.view(torch.int32)[:, bit // 32] >> (bit % 32).int()) & 1
    return pad(seen.bool(), (old, 0), value=True)


def _rows(cache, pages, name):
    """The slots of these pages in order, [1, slots, kv_heads, width], contiguous; good until the next call."""
    shape = (pages.numel(), *cache.shape[1:])
    size = cache[0].numel() * pages.numel() * cache.element_size()
    least, most = SCRATCH_BYTES
    if least <= size <= most:
        if not hasattr(_scratch, name):
            with torch.inference_mode(False):  # or it could be written in that mode only
                setattr(_scratch, name, torch.empty(most, dtype=torch.uint8))
        picked = getattr(_scratch, name)[:size].view(cache.dtype).view(shape)
        torch.index_select(cache, 0, pages, out=picked)
    else:
        picked = cache.index_select(0, pages)
    return picked.view(1, -1, *cache.shape[2:])


def _widened(rows, width):
    return rows if rows.shape[-1] == width else pad(rows, (0, width - rows.shape[-1]))


def _starts_with(keys, values):
    """Whether the values are the first channels of the keys, as in MLA."""
    return (
        values.data_ptr() == keys.data_ptr() and values.stride() == keys.stride() and values.shape[3] <= keys.shape[3]
    )
