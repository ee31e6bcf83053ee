"""Rotary position embedding: RoFormer, Su et al. 2021, https://arxiv.org/abs/2104.09864."""

import numpy as np
import torch

from llmkernels.contract import FLOATS, Case, Cost, View
from llmkernels.ops.numerics import itemsize, wide
from llmkernels.registry import op


def inputs(
    rng, tokens, heads=4, kv_heads=2, dim=64, half=None, max_positions=64, interleaved=False, at=None, strided=False
):
    """Any angles will do; `at` fixes the first position, the others are drawn."""
    half = dim // 2 if half is None else half
    angle = np.outer(np.arange(max_positions), 1e4 ** -(np.arange(half) / max(half, 1)))
    positions = rng.integers(max_positions, size=tokens) if max_positions else np.zeros(tokens, np.int64)
    if at is not None:
        positions[0] = at
    arrays = {
        "q": rng.standard_normal((tokens, heads, dim)),
        "k": rng.standard_normal((tokens, kv_heads, dim)),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "positions": positions,
        "interleaved": interleaved,
    }
    if strided:  # q and k as slices of one QKV projection, cos and sin as the halves of one table
        every = slice(None)
        arrays["_qkv"] = np.concatenate([arrays["q"], arrays["k"], np.full((tokens, kv_heads, dim), np.nan)], 1)
        arrays["_table"] = np.concatenate([arrays["cos"], arrays["sin"]], 1)
        arrays |= {
            "q": View("_qkv", (every, slice(0, heads))),
            "k": View("_qkv", (every, slice(heads, heads + kv_heads))),
            "cos": View("_table", (every, slice(0, half))),
            "sin": View("_table", (every, slice(half, None))),
        }
    return arrays


def check(call, sizes):
    if 2 * sizes["half"] > sizes["dim"]:
        raise ValueError(
            f"rotary_embedding: cos and sin have half={sizes['half']} columns, and dim={sizes['dim']} has "
            f"{sizes['dim'] // 2} pairs of channels; give at most one column a pair"
        )


def check_values(call):
    """The positions, read on the host."""
    positions, rows = call["positions"], call["cos"].shape[0]
    if bool((wrong := (positions < 0) | (positions >= rows)).any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"rotary_embedding: positions[{at}] is {int(positions[at])}; cos and sin have rows for 0 to {rows - 1}"
        )


def cost(call, sizes):
    elements = call["q"].numel() + call["k"].numel()
    rotated = sizes["tokens"] * (sizes["heads"] + sizes["kv_heads"]) * sizes["half"]
    return Cost(2 * elements * itemsize(call["q"]) + sizes["tokens"] * (8 * sizes["half"] + 8), 6 * rotated)


@op(
    """q[tokens heads dim]:T k[tokens kv_heads dim]:T cos[max_positions half]:float32 sin[max_positions half]:float32
    positions[tokens]:int64 -> q_out[tokens heads dim]:T k_out[tokens kv_heads dim]:T""",
    dtypes={"T": FLOATS},
    cases=[
        Case("one token", {"tokens": 1}),
        Case("some tokens", {"tokens": 7, "heads": 8, "dim": 128}),
        Case("many tokens", {"tokens": 130, "dim": 96}),
        Case("interleaved", {"tokens": 7, "interleaved": True}),
        Case("part of dim", {"tokens": 7, "dim": 80, "half": 16}),
        Case("part of dim, interleaved", {"tokens": 7, "dim": 80, "half": 16, "interleaved": True}),
        Case("MLA", {"tokens": 5, "heads": 16, "kv_heads": 1, "interleaved": True}),
        Case("strided", {"tokens": 6, "strided": True}),
        Case("strided, part of dim", {"tokens": 6, "strided": True, "half": 8, "interleaved": True}),
        Case("huge positions", {"tokens": 4, "max_positions": 2**20, "half": 2, "at": 2**20 - 1}, hostile=True),
        Case("no tokens", {"tokens": 0}, hostile=True),
        Case("no tokens, no table", {"tokens": 0, "max_positions": 0}, hostile=True),
        Case("nothing rotated", {"tokens": 3, "half": 0}, hostile=True),
        Case("no heads", {"tokens": 3, "heads": 0}, hostile=True),
        *(Case(f"dim {n}", {"tokens": 5, "dim": n}, hostile=True) for n in (2, 6, 72, 256)),
        Case("odd dim", {"tokens": 5, "dim": 67}, hostile=True),
        Case("first and last", {"tokens": 64, "max_positions": 2, "at": 0}, hostile=True),
        Case("position past the table", {"tokens": 3, "at": 64}, True, r"positions\[0\] is 64; .* rows for 0 to 63"),
        Case("negative position", {"tokens": 3, "at": -1}, True, r"positions\[0\] is -1"),
        Case("position of 2^40", {"tokens": 3, "at": 2**40}, True, r"positions\[0\] is 1099511627776"),
        Case("table too wide", {"tokens": 3, "half": 33}, True, "half=33 columns, and dim=64 has 32 pairs"),
    ],
    inputs=inputs,
    cost=cost,
    check=check,
    check_values=check_values,
)
def rotary_embedding(q, k, cos, sin, positions, *, interleaved=False):
    """Rotate pairs of channels of each query and key by the angles of the token's position.

        out[t, h, a] = x[t, h, a] * cos[p, j] - x[t, h, b] * sin[p, j]        p = positions[t], j in 0 .. half - 1
        out[t, h, b] = x[t, h, b] * cos[p, j] + x[t, h, a] * sin[p, j]        pair j is channels (a, b)

    Args:
        q, k: queries and keys; strided rows are fine.
        cos, sin: of the angles, one row a position.  Scaled ones (YaRN and its kin) rotate and scale.
        positions: row of cos and sin for each token.
        interleaved: pair j is channels (2j, 2j + 1), as GPT-J has it; otherwise (j, j + half), as GPT-NeoX has it.

    Returns:
        q_out and k_out, new arrays, each rounded once to its dtype.  Channels from 2 * half on pass through.
    """
    c, s = wide(cos)[positions][:, None], wide(sin)[positions][:, None]  # [tokens 1 half]
    half = c.shape[-1]
    step = 2 if interleaved else 1
    first, second = slice(0, half * step, step), slice(1 if interleaved else half, 2 * half, step)
    results = []
    for x in (q, k):
        out = wide(x).clone(memory_format=torch.contiguous_format)
        a, b = wide(x)[..., first], wide(x)[..., second]
        out[..., first], out[..., second] = a * c - b * s, b * c + a * s
        results.append(out.to(x.dtype))
    return tuple(results)
