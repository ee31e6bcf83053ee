"""Attention over the paged cache of continuous batching: model.generate_batch.

Layers with full attention write and read transformers' pages in place.  Those with a sliding window keep a ring buffer
that new keys overwrite while older queries still need them; there transformers gathers the window's keys first.
"""

from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

import llmkernels
from llmkernels.settings import current, use


def attention(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: Any,
    step: dict[str, Any],
    window: int,
    options: dict[str, Any],
) -> torch.Tensor:
    """[1, tokens, heads, v_dim] for query [1, heads, tokens, dim] and the new key and value [1, kv_heads, tokens, dim].

    step: of transformers: cu_seq_lens_q [seqs + 1], and for each kind of layer cu_seq_lens_k, max_length_k, write_index
    [tokens] and read_index [keys of all sequences], or empty where no sequence has keys but the new ones.
    """
    starts = step["cu_seq_lens_q"]
    allocator = cache.layer_to_allocator[layer]
    if not allocator.supports_block_table:
        key, value = cache.update(key, value, layer, step)
        ends = step["cu_seq_lens_k"]
        k, v = key[0].transpose(0, 1)[:, None], value[0].transpose(0, 1)[:, None]  # each key is a page
        longest = step["max_length_k"]
        table = _ragged(torch.arange(k.shape[0], device=k.device), ends, longest, 1)
    else:
        ends, longest = step["cu_seq_lens_k"][allocator.layer_type], step["max_length_k"][allocator.layer_type]
        k, v = allocator.get_cache_for_block_table(layer)
        page_size = k.shape[1]
        slots, read = step["write_index"][allocator.index], step["read_index"][allocator.index]
        with trusted():
            llmkernels.write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), k, v, slots)
        table = _ragged(read if read.numel() else slots, ends, longest, page_size)
    with trusted():
        out = llmkernels.paged_attention(
            query[0].transpose(0, 1), k, v, table, ends.diff().int(), starts, window=(window, -1), **options
        )
    return out[None]


def trusted() -> AbstractContextManager:
    """Block tables, lengths and slots are right by construction: they are read first only if the caller insists."""
    return use(checked=bool(current().checked))


def _ragged(slots: torch.Tensor, ends: torch.Tensor, longest: int, page_size: int) -> torch.Tensor:
    """block_table int32 [seqs, pages] of the slots of all sequences' keys, one sequence after the other.

    A sequence's first key begins a page, so every page_size-th slot names one.
    """
    pages = max(-(-longest // page_size), 1)
    at = ends[:-1, None] + page_size * torch.arange(pages, dtype=ends.dtype, device=ends.device)
    return (slots[at.clamp(max=slots.shape[0] - 1).long()] // page_size).int()  # past a sequence's end: any page


def allow(name: str) -> None:
    """Let continuous batching keep this attention; transformers' own list is 'sdpa', 'paged|eager' and '*flash*'."""
    original = ContinuousBatchingManager.switch_to_cb_friendly_attn
    if getattr(original, "allows", None) == name:
        return

    @wraps(original)
    def switch(self: Any, model: Any, *args: Any, **options: Any) -> None:
        if model.config._attn_implementation != name:
            original(self, model, *args, **options)

    switch.allows = name  # type: ignore[attr-defined]
    ContinuousBatchingManager.switch_to_cb_friendly_attn = switch
