"""torch's scaled_dot_product_attention beside paged_attention: pages gathered in the call, or already contiguous."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from llmkernels.bench.peers import Call, peer

OPTIONAL = ("sinks", "alibi_slopes", "tree_mask", "k_scale", "v_scale")


@dataclass
class Batch:
    """A batch whose sequences all have as many new tokens and as many keys: what SDPA takes without padding."""

    new: int
    length: int
    pages: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool

    def keys(self, cache: torch.Tensor) -> torch.Tensor:
        """[seqs kv_heads length dim], copied out of the pages."""
        return cache[self.pages].flatten(1, 2)[:, : self.length].transpose(1, 2)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
        queries = q.unflatten(0, (-1, self.new))  # [seqs new heads dim]
        if self.new == 1:  # the heads that share a KV head as its queries: enable_gqa would repeat the keys
            grouped = queries.squeeze(1).unflatten(1, (k.shape[1], -1))
            return F.scaled_dot_product_attention(grouped, k, v, self.mask, scale=scale).flatten(1, 2)
        out = F.scaled_dot_product_attention(
            queries.transpose(1, 2), k, v, self.mask, is_causal=self.is_causal, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)


def batch(call: Call) -> Batch | None:
    """The call as a Batch; None where SDPA cannot express it."""
    news, lengths = call["cu_seqlens_q"].diff().tolist(), call["seq_lens"].tolist()
    if any(call[name] is not None for name in OPTIONAL) or call["soft_cap"] or call["return_lse"]:
        return None
    if (
        call["k_cache"].dtype != call["q"].dtype
        or len(set(news)) != 1
        or len(set(lengths)) != 1
        or not news[0]
        or not lengths[0]
    ):
        return None
    new, length, (left, right) = news[0], lengths[0], call["window"]
    pages = call["block_table"][:, : -(-length // call["k_cache"].shape[1])].long()
    windowed = left >= 0 or right >= 0
    if (new == 1 and not windowed) or not (call["causal"] or windowed):
        return Batch(new, length, pages, None, False)
    if call["causal"] and new == length and not windowed:
        return Batch(new, length, pages, None, True)
    key = torch.arange(length, device=pages.device)
    distance = key - torch.arange(length - new, length, device=pages.device)[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if call["causal"]:
        seen &= distance <= 0
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return Batch(new, length, pages, seen, False)


@peer("paged_attention", "torch gather + SDPA")
def gathered(call: Call) -> Callable[[], Any] | None:
    found = batch(call)
    if not found:
        return None
    q, k_cache, v_cache, scale = (call[name] for name in ("q", "k_cache", "v_cache", "scale"))
    return lambda: found.attend(q, found.keys(k_cache), found.keys(v_cache), scale)


@peer("paged_attention", "torch SDPA, no pages")
def contiguous(call: Call) -> Callable[[], Any] | None:
    found = batch(call)
    if not found:
        return None
    q, scale = call["q"], call["scale"]
    k, v = (found.keys(call[name]).contiguous() for name in ("k_cache", "v_cache"))
    return lambda: found.attend(q, k, v, scale)
