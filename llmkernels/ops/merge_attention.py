"""Two attention results over disjoint keys become one: Ye et al. 2025, FlashInfer, https://arxiv.org/abs/2501.01005."""

import numpy as np
import torch

from llmkernels.contract import FLOATS, Case, Cost, View
from llmkernels.ops.numerics import itemsize, wide
from llmkernels.registry import op


def inputs(rng, tokens, heads=4, v_dim=64, size=3.0, empty_a=(), empty_b=(), strided=False, junk=0.0, lse_a=None):
    """Partial results of random keys; those listed as empty saw no key, and hold `junk`."""
    arrays = {
        "out_a": rng.standard_normal((tokens, heads, v_dim)),
        "lse_a": size * rng.standard_normal((tokens, heads)),
        "out_b": rng.standard_normal((tokens, heads, v_dim)),
        "lse_b": size * rng.standard_normal((tokens, heads)),
    }
    for side, empty in (("a", list(empty_a)), ("b", list(empty_b))):
        arrays[f"out_{side}"][empty], arrays[f"lse_{side}"][empty] = junk, -np.inf
    if lse_a is not None:
        arrays["lse_a"][0, 0] = lse_a
    if strided:  # one part of a split-keys workspace [tokens, heads, parts, v_dim]; lse kept as [heads, tokens]
        arrays["_outs"] = np.stack([arrays["out_a"], arrays["out_b"]], 2)
        arrays["_lse"] = np.ascontiguousarray(arrays["lse_a"].T)
        every = slice(None)
        arrays |= {f"out_{side}": View("_outs", (every, every, i)) for i, side in enumerate("ab")}
        arrays["lse_a"] = View("_lse", axes=(1, 0))
    return arrays


def check_values(call):
    """The two lse, read on the host."""
    for name in ("lse_a", "lse_b"):
        if not bool((call[name] < torch.inf).all()):  # NaN compares false
            at = tuple((~(call[name] < torch.inf)).nonzero()[0].tolist())
            raise ValueError(
                f"merge_attention: {name}[{at[0]}, {at[1]}] is {float(call[name][at])}; "
                f"it must be finite, or -inf for a partial result that saw no key"
            )


def cost(call, sizes):
    rows = sizes["tokens"] * sizes["heads"]
    return Cost(rows * (3 * sizes["v_dim"] * itemsize(call["out_a"]) + 12), rows * (3 * sizes["v_dim"] + 6))


@op(
    """out_a[tokens heads v_dim]:T lse_a[tokens heads]:float32 out_b[tokens heads v_dim]:T lse_b[tokens heads]:float32
    -> out[tokens heads v_dim]:T lse[tokens heads]:float32""",
    dtypes={"T": FLOATS},
    cases=[
        Case("one token", {"tokens": 1}),
        Case("some tokens", {"tokens": 7, "heads": 8, "v_dim": 128}),
        Case("many tokens", {"tokens": 200, "heads": 5}),
        Case("MLA", {"tokens": 3, "heads": 16, "v_dim": 512}),
        Case("lse far apart", {"tokens": 9, "size": 60.0}),
        Case("strided", {"tokens": 6, "strided": True}),
        Case("one empty", {"tokens": 4, "empty_a": (0, 2), "empty_b": (1,)}, hostile=True),
        Case("both empty", {"tokens": 4, "empty_a": (0, 2), "empty_b": (0, 2, 3)}, hostile=True),
        Case("empty ones hold NaN", {"tokens": 4, "empty_a": (0, 2), "empty_b": (0, 3), "junk": np.nan}, hostile=True),
        Case("large lse", {"tokens": 5, "size": 1e5}, hostile=True),
        Case("no tokens", {"tokens": 0}, hostile=True),
        Case("no heads", {"tokens": 3, "heads": 0}, hostile=True),
        *(Case(f"v_dim {n}", {"tokens": 5, "v_dim": n}, hostile=True) for n in (1, 3, 72, 136)),
        Case("lse NaN", {"tokens": 2, "lse_a": np.nan}, True, r"lse_a\[0, 0\] is nan; it must be finite, or -inf"),
        Case("lse infinite", {"tokens": 2, "lse_a": np.inf}, True, r"lse_a\[0, 0\] is inf"),
    ],
    inputs=inputs,
    cost=cost,
    check_values=check_values,
)
def merge_attention(out_a, lse_a, out_b, lse_b):
    """Weigh two partial results by the softmax denominators they were divided by.

        lse = ln(exp(lse_a) + exp(lse_b))
        out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

    Args:
        out_a, out_b: attention over two disjoint sets of keys, as `paged_attention` returns it.
        lse_a, lse_b: natural logs of their softmax denominators.  -inf marks a part that saw no key: what its output
            holds has no effect.

    Returns:
        out, rounded once to the dtype of out_a, and lse in float32.  Where both parts are empty: zeros and -inf.
    """
    a, b = wide(lse_a), wide(lse_b)
    lse = torch.logaddexp(a, b)
    parts = []
    for out, part in ((out_a, a), (out_b, b)):
        seen = part > -torch.inf
        weight = torch.where(seen, torch.exp(part - lse), 0)
        parts.append(torch.where(seen[..., None], weight[..., None] * wide(out), 0))
    return (parts[0] + parts[1]).to(out_a.dtype), lse
