"""merge_attention: one program merges ROWS rows, a row being one head of one token."""

import torch
import triton
import triton.language as tl

from ._launch import INTERPRETED, blocks, computed, launch, power, readable, refuse_device, rounded
from ._ptx import after_previous

TRAITS = {
    "deterministic": True,
    "batch_invariant": True,
    "graph_safe": True,
    "workspace_bytes": 0,
    "accumulate": "float32",
}


def refuse(out_a, **others):
    yield from refuse_device(out_a)


def run(out_a, lse_a, out_b, lse_b):
    tokens, heads, v_dim = out_a.shape
    out = torch.empty(out_a.shape, dtype=computed(out_a.dtype), device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    columns = power(v_dim)
    rows = power(tokens * heads, most=max(1, (16384 if INTERPRETED else 2048) // columns))
    a, b = readable(out_a), readable(out_b)
    launch(
        _merge, (blocks(tokens * heads, rows),), out_a, a, lse_a, b, lse_b, out, lse, tokens * heads, heads,
        *a.stride(), *lse_a.stride(), *b.stride(), *lse_b.stride(), V_DIM=v_dim, ROWS=rows, COLUMNS=columns,
        num_warps=4,
    )  # fmt: skip
    return rounded(out, out_a.dtype), lse


@triton.jit
def _merge(
    out_a, lse_a, out_b, lse_b, out, lse, count, heads,
    a_token, a_head, a_channel, lse_a_token, lse_a_head, b_token, b_head, b_channel, lse_b_token, lse_b_head,
    V_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """out_a, out_b [tokens, heads, V_DIM], lse_a, lse_b [tokens, heads] -> out, lse.  Strides in elements."""
    after_previous(CHAINED)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, COLUMNS)
    token, head, inside = row // heads, row % heads, row < count
    a = tl.load(lse_a + token * lse_a_token + head * lse_a_head, mask=inside, other=-float("inf"))
    b = tl.load(lse_b + token * lse_b_token + head * lse_b_head, mask=inside, other=-float("inf"))
    top = tl.maximum(a, b)
    base = tl.where(top == -float("inf"), 0.0, top)
    weight_a, weight_b = tl.exp(a - base), tl.exp(b - base)
    total = weight_a + weight_b
    tl.store(lse + row, base + tl.log(total), mask=inside)
    total = tl.where(total > 0.0, total, 1.0)
    wanted_a = (inside & (a > -float("inf")))[:, None] & (channel < V_DIM)  # an empty part may hold anything
    wanted_b = (inside & (b > -float("inf")))[:, None] & (channel < V_DIM)
    from_a = (token * a_token + head * a_head)[:, None] + channel * a_channel
    from_b = (token * b_token + head * b_head)[:, None] + channel * b_channel
    part_a = tl.load(out_a + from_a, mask=wanted_a, other=0.0).to(tl.float32)
    part_b = tl.load(out_b + from_b, mask=wanted_b, other=0.0).to(tl.float32)
    merged = (weight_a / total)[:, None] * part_a + (weight_b / total)[:, None] * part_b
    place = (row * V_DIM)[:, None] + channel
    tl.store(out + place, merged.to(out.dtype.element_ty), mask=inside[:, None] & (channel < V_DIM))
