"""Attention over transformers' own caches, by paged_attention, without a copy of them.

A contiguous cache [batch, kv_heads, length, dim] is pages already: a row is one page of `length` slots, or `length`
pages of one slot, each dim elements after the one before.  The second view reaches any keys of a row, so left padding
is skipped by a block table that begins behind it.
"""

from functools import lru_cache
from typing import Any

import torch

import llmkernels
from llmkernels.integrations.transformers import masks, paged

NAME = "llmkernels"


@torch.compiler.disable  # as transformers does with its own flash and paged attention: what is around it is compiled
def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cache: Any = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """What AttentionInterface calls in every layer.

    Args:
        query: [batch, heads, queries, dim].
        key, value: [batch, kv_heads, keys, dim], the whole cache; with `cache`, the new tokens of a paged one.
        attention_mask: what masks.mask returned, or a finished mask of the caller's, or None.
        sliding_window: used where no mask says it, the query's own position counted.
        softcap, s_aux: Gemma 2's bound of the scores, GPT-OSS's sinks.
        cache: transformers' PagedAttentionCache, of continuous batching.

    Returns:
        [batch, queries, heads, v_dim], and None in place of the weights, which no kernel writes down.

    Raises:
        ValueError: what the operation cannot say: dropout, gradients, weights, a bias of the scores.
    """
    _refuse(query, dropout, more)
    options = {"scale": scaling, "soft_cap": softcap or 0.0, "sinks": None if s_aux is None else s_aux.float()}
    window = sliding_window - 1 if sliding_window else -1
    if cache is not None:
        return paged.attention(module.layer_idx, query, key, value, cache, more, window, options), None
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if not batch * queries:
        return query.new_empty(batch, queries, heads, value.shape[3]), None
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is None:
        pieces = masks.pieces(0, keys, queries, keys - queries, window, is_causal)
        sequences = tuple((row, *piece, window, int(is_causal)) for row in range(batch) for piece in pieces)
    elif attention_mask.dtype == torch.int32 and attention_mask.shape[-1] == masks.FIELDS:
        sequences = tuple(map(tuple, attention_mask[0, 0].tolist()))
    else:
        return _by_query(query, key, value, masks.visible(attention_mask, batch, queries, keys), options), None
    if all(first == 0 for _, _, first, *_ in sequences):  # a row is a page
        k, v, apart = key.transpose(1, 2), value.transpose(1, 2), 0
    else:
        k, v, apart = _single_slots(key, value)
    *_, left, causal = sequences[0]
    with paged.trusted():
        out = llmkernels.paged_attention(
            query.transpose(1, 2).flatten(0, 1),
            k,
            v,
            causal=bool(causal),
            window=(left, -1),
            **_plan(sequences, batch * queries, keys, apart, query.device),
            **options,
        )
    return out.unflatten(0, (batch, queries)), None


def _refuse(query: torch.Tensor, dropout: float, more: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"dropout of attention is {dropout}; llmkernels only infers: call model.eval(), or train with "
            'attn_implementation="sdpa"'
        )
    if query.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "attention must be differentiated here; llmkernels only infers: wrap the call in torch.no_grad(), or train "
            'with attn_implementation="sdpa"'
        )
    if more.get("output_attentions"):
        raise ValueError(
            "output_attentions is True, but no kernel writes the weights down: leave it out, or use "
            'model.set_attn_implementation("eager")'
        )
    if more.get("position_bias") is not None:
        raise ValueError(
            "this model adds a learned bias to the scores (position_bias), which paged_attention cannot: load it with "
            'attn_implementation="sdpa"'
        )


@lru_cache(maxsize=16)
def _plan(
    sequences: tuple[tuple[int, ...], ...], tokens: int, keys: int, apart: int, device: torch.device
) -> dict[str, Any]:
    """The block table and lengths of a step, made once for all its layers, of what masks.mask says.

    apart: pages between two rows of the batch; 0 where each row is one page.

    Raises:
        ValueError: the mask was made for other `tokens` (queries of all rows) or more `keys` (of a row) than there are.
    """
    new, lengths = [piece[1] for piece in sequences], [piece[3] for piece in sequences]
    needed = max(first + length for _, _, first, length, *_ in sequences)
    if sum(new) != tokens or needed > keys:
        raise ValueError(
            f"the attention mask was made for {sum(new)} queries and {needed} keys, but this layer has {tokens} and "
            f'{keys}; this model gives layers masks that are not theirs: load it with attn_implementation="sdpa"'
        )
    table = torch.tensor([row * apart + first if apart else row for row, _, first, *_ in sequences])[:, None]
    if apart:
        table = table + torch.arange(max(lengths))
    return {
        "block_table": table.to(device, torch.int32),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32, device=device),
        "cu_seqlens_q": torch.tensor([0, *new]).cumsum(0).to(device, torch.int32),
        "max_seqlen_q": _round_up(max(new)),
        "max_seqlen_k": _round_up(max(lengths)),
    }


def _by_query(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """Any mask bool [batch, queries, keys]: each query is a sequence whose block table lists the keys it sees."""
    batch, _, queries, _ = query.shape
    k, v, apart = _single_slots(key, value)
    lengths = visible.sum(-1, dtype=torch.int32).flatten()
    longest = max(int(lengths.max()), 1)
    seen = visible.byte().argsort(dim=-1, descending=True, stable=True)[..., :longest]  # keys in order, then the others
    table = seen + apart * torch.arange(batch, device=seen.device)[:, None, None]
    with paged.trusted():
        out = llmkernels.paged_attention(
            query.transpose(1, 2).flatten(0, 1),
            k,
            v,
            table.flatten(0, 1).int(),
            lengths,
            torch.arange(batch * queries + 1, dtype=torch.int32, device=query.device),
            max_seqlen_q=1,
            max_seqlen_k=_round_up(longest),
            **options,
        )
    return out.unflatten(0, (batch, queries))


def _single_slots(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Views [pages, 1, kv_heads, dim] of caches [batch, kv_heads, keys, dim], and the pages from a row to the next.

    Key j of row b is page apart * b + j; pages in between are other heads' memory, and no table names them.  A copy is
    made only where the two caches are laid out in two ways, or rows do not lie a whole number of keys apart.
    """
    apart = [_apart(key), _apart(value)]
    if apart[0] is None or apart[0] != apart[1]:
        key, value = key.contiguous(), value.contiguous()
        apart = [_apart(key), _apart(value)]
    return _as_pages(key, apart[0]), _as_pages(value, apart[1]), apart[0] or 0


def _apart(cache: torch.Tensor) -> int | None:
    row, _, slot, _ = cache.stride()
    if cache.shape[0] == 1:
        return cache.shape[2]  # a table of one row never uses it
    return row // slot if slot and row % slot == 0 and row >= slot * cache.shape[2] else None


def _as_pages(cache: torch.Tensor, apart: int | None) -> torch.Tensor:
    batch, kv_heads, keys, dim = cache.shape
    _, head, slot, channel = cache.stride()
    pages = (batch - 1) * (apart or 0) + keys
    return cache.as_strided((pages, 1, kv_heads, dim), (slot, slot, head, channel))


def _round_up(count: int) -> int:
    """The next power of two, so that few kinds of call occur."""
    return 1 << max(count - 1, 0).bit_length()
