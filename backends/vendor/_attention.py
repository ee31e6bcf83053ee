"""What both ways of paged_attention are handed."""

from typing import NamedTuple

import torch


class Cache(NamedTuple):
    """The paged cache and the sequences in it, as the contract names them."""

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


class Options(NamedTuple):
    """What is the same for every sequence of a call."""

    scale: float
    causal: bool
    window: tuple
    soft_cap: float
    slopes: torch.Tensor | None  # of ALiBi, [kv_heads, group]
    tree_mask: torch.Tensor | None
    exact: bool  # lse is handed on, and has to be right to float32's roundoff
    max_seqlen_q: int | None
    max_seqlen_k: int | None
