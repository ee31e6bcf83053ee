"""Attention masks in few numbers: which keys each run of queries may see.

transformers builds a mask once a forward pass, from a function of positions, and hands it to every layer.  Padding,
causality, windows and packed sequences need no matrix [queries, keys]: `mask` returns int32 [1, 1, sequences, 6] on the
CPU.  The sequences cover all queries, row after row, each one

    row            of the batch
    new            its queries, consecutive ones
    first, keys    keys first to first + keys - 1 of the row are its own; 0 keys: padding that nobody looks at
    window         the keys before its own position that a query sees; -1 is all of them
    causal         1: the last query stands at the last key; 0: a query sees all keys

It has four dimensions because transformers takes a mask of four as finished (generate builds it ahead for static
caches), and it is of integers because no other mask is.  A pattern that these numbers cannot say is a boolean matrix.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from transformers import masking_utils

FIELDS = 6


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **more: Any,
) -> torch.Tensor:
    """What AttentionMaskInterface calls: the numbers above, or bool [batch, 1, q_length, kv_length].

    Args:
        q_offset, kv_offset: the positions of the first query and of the first key that the cache still holds.
        mask_function: (batch, head, query position, key position) -> may it see?
        attention_mask: bool [batch, positions], False for padding; keys behind its end are not written yet.
    """
    if (pattern := recognise(mask_function)) is not None:
        window, causal, packed = pattern
        spans = tokens_of(attention_mask, batch_size, kv_offset, kv_length)
        if spans is not None:
            position = int(q_offset) - kv_offset
            table = [
                (row, *run, window, int(causal))
                for row, span in enumerate(spans)
                for run in (
                    runs(packed[row]) if packed is not None else pieces(*span, q_length, position, window, causal)
                )
            ]
            return torch.tensor(table, dtype=torch.int32).view(1, 1, -1, FIELDS)
    more |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    matrix = masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **more
    )
    assert matrix is not None  # both skips are off
    return matrix


def tokens_of(padding: torch.Tensor | None, batch: int, offset: int, keys: int) -> list[tuple[int, int]] | None:
    """(first, end) of each row's tokens among the keys held; None where there is padding between tokens."""
    if padding is None:
        return [(0, keys)] * batch
    tokens = padding[:, offset : offset + keys].bool()
    width, count = tokens.shape[1], tokens.sum(-1)
    if not width:
        return [(0, 0)] * batch
    first, last = tokens.int().argmax(-1), width - tokens.flip(-1).int().argmax(-1)
    if bool((last - first > count).logical_and(count > 0).any()):
        return None
    return list(zip(first.tolist(), torch.where(count > 0, last, first).tolist(), strict=True))


def pieces(first: int, end: int, queries: int, position: int, window: int, causal: bool) -> list[tuple[int, int, int]]:
    """(new, first, keys) of a row whose tokens are keys first to end - 1 and whose query i stands at position + i.

    Queries of padding before the tokens see nothing.  Those behind them see tokens, as in transformers (generate goes
    on from the last one, where a batch is padded on the right), each as a sequence of its own.
    """
    if not causal:  # new tokens are keys too, says paged_attention: more queries than keys go one by one
        together = queries <= end - first or end == first
        return [(queries, first, end - first)] if together else [(1, first, end - first)] * queries
    begin = min(max(first - position, 0), queries)
    stop = max(min(end - position, queries), begin)
    found = [(begin, first, 0), (stop - begin, first, max(position + stop - first, 0))]
    for query in range(position + stop, position + queries):
        start = min(max(first, query - window), end) if window >= 0 else first
        found.append((1, start, end - start))
    return [piece for piece in found if piece[0]]


def runs(ids: torch.Tensor) -> list[tuple[int, int, int]]:
    """(new, first, keys) of each packed sequence of a row, from the number of the sequence that each token is in."""
    lengths = [len(list(group)) for _, group in groupby(ids.tolist())]
    return [(length, sum(lengths[:at]), length) for at, length in enumerate(lengths)]


def recognise(pattern: Callable) -> tuple[int, bool, torch.Tensor | None] | None:
    """(window, causal, which packed sequence each token is in, or None) of transformers' own patterns; else None.

    Its functions are closures, so what tells them is their code and what they close over.
    """
    if pattern is masking_utils.causal_mask_function:
        return -1, True, None
    if pattern is masking_utils.bidirectional_mask_function:
        return -1, False, None
    if not _is(pattern, masking_utils.and_masks(pattern)):
        return None
    parts = _closed_over(pattern)["mask_functions"]
    if len(parts) != 2:
        return None
    if parts[1] is masking_utils.causal_mask_function and _is(parts[0], masking_utils.sliding_window_overlay(1)):
        width = _closed_over(parts[0])["sliding_window"]  # counts the query's own position
        return (width - 1, True, None) if isinstance(width, int) and width > 0 else None
    nothing = torch.empty(0)
    if _is(parts[0], masking_utils.packed_sequence_mask_function(nothing)) and _is(
        parts[1], masking_utils.remap_positions_for_packed_sequence(pattern, nothing)
    ):
        inner = recognise(_closed_over(parts[1])["mask_function"])
        ids = _closed_over(parts[0])["packed_sequence_mask"]
        return (inner[0], inner[1], ids) if inner is not None and inner[2] is None else None
    return None


def _is(function: Any, like: Any) -> bool:
    return getattr(function, "__code__", None) is like.__code__


def _closed_over(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def visible(given: torch.Tensor, batch: int, queries: int, keys: int) -> torch.Tensor:
    """A finished mask of the caller's as bool [batch, queries, keys], True where a query sees a key.

    Raises:
        ValueError: it differs between heads, has another shape, or adds to scores anything but 0 and minus infinity.
    """
    shape = tuple(given.shape)
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[2] in (1, queries) and shape[3] >= keys
    if not fits or shape[1] != 1:
        raise ValueError(
            f"attention_mask has shape {shape}; llmkernels takes [batch, positions] with 1 for tokens and 0 for "
            f"padding, or a finished mask [{batch} or 1, 1, {queries}, {keys}], the same for all heads: pass one of "
            'these, or load the model with attn_implementation="eager"'
        )
    given = given[:, 0, :, :keys]
    if given.dtype == torch.bool:
        return given.expand(batch, queries, keys)
    if not given.is_floating_point():
        raise ValueError(
            f"attention_mask is a finished mask of {str(given.dtype).removeprefix('torch.')}; transformers' masks of "
            "four dimensions are bool (True: sees) or float (0: sees, the dtype's smallest number: does not)"
        )
    hidden = given <= torch.finfo(given.dtype).min
    if bool((~hidden & (given != 0)).any()):
        at = [int(i) for i in (~hidden & (given != 0)).nonzero()[0]]
        raise ValueError(
            f"attention_mask adds {float(given[tuple(at)]):.4g} to a score (query {at[1]}, key {at[2]}); "
            "paged_attention hides keys but adds no bias of the caller's: use 0 and the dtype's smallest number only, "
            'or load the model with attn_implementation="eager"'
        )
    return ~hidden.expand(batch, queries, keys)
