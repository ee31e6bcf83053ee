"""A different low-rank adapter for each row: LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685; many in one
call, as in Punica, Chen et al. 2023, https://arxiv.org/abs/2310.18547."""

import math

import numpy as np

from llmkernels.contract import FLOATS, Case, Cost, View
from llmkernels.ops.numerics import itemsize, wide
from llmkernels.registry import op


def inputs(rng, rows=8, in_=96, out=80, rank=16, count=3, adapters=None, layout="rows", special=None):
    """Adapters that no row uses hold NaN."""
    which = rng.integers(-1, count, rows) if adapters is None else np.resize(adapters, rows)
    arrays = {
        "y": rng.standard_normal((rows, out)),
        "x": rng.standard_normal((rows, in_)),
        "a": rng.standard_normal((count, rank, in_)) / math.sqrt(max(in_, 1)),
        "b": rng.standard_normal((count, out, rank)) / math.sqrt(max(rank, 1)),
        "adapters": which.astype(np.int32),
        "scales": rng.uniform(0.5, 2, count),
    }
    for i in set(range(count)) - set(which.tolist()):
        arrays["a"][i] = arrays["b"][i] = arrays["scales"][i] = np.nan
    if special:
        SPECIALS[special][0](arrays)
    return LAYOUTS[layout](arrays)


def _short_rank(arrays):
    """Adapter 0 has half the rank: the rest of its a and b is zeros."""
    half = arrays["a"].shape[1] // 2
    arrays["a"][0, half:] = arrays["b"][0, :, half:] = 0


def _nan_in_idle_rows(arrays):
    """Rows without an adapter hold NaN in x, and y holds what bits may be lost by adding zero: -0.0 and NaN."""
    idle = arrays["adapters"] < 0
    arrays["x"][idle] = np.nan
    arrays["y"][idle] = -0.0
    arrays["y"][idle, ::3] = np.nan


def _cancelling(arrays):
    """The update takes away most of y, so that a y or a product rounded on the way shows."""
    busy = arrays["adapters"].clip(0)
    hidden = np.einsum("rk,rnk->rn", arrays["x"], arrays["a"][busy])
    arrays["y"] = -arrays["scales"][busy, None] * np.einsum("rn,ron->ro", hidden, arrays["b"][busy])


def _zero_scale(arrays):
    arrays["scales"][0] = 0


SPECIALS = {  # and the adapters of the rows
    "a lower rank filled with zeros": (_short_rank, (0, -1, 1, 0, -1, 2)),
    "NaN in rows without adapter": (_nan_in_idle_rows, (0, -1, 1, 0, -1, 2)),
    "update cancels y": (_cancelling, (0, 2, 1)),
    "scale 0": (_zero_scale, (0, -1, 1, 0, -1, 2)),
}


def _part_of_a_row(arrays):
    """y is the middle of wider rows, as the keys of a fused QKV projection are; x has gaps too."""
    out, in_ = arrays["y"].shape[1], arrays["x"].shape[1]
    q, v = np.full_like(arrays["y"], 7), np.full_like(arrays["y"], -7)
    return arrays | {
        "_qkv": np.concatenate([q, arrays["y"], v], 1),
        "y": View("_qkv", (slice(None), slice(out, 2 * out))),
        "_x": np.concatenate([arrays["x"], np.full_like(arrays["x"], np.nan)], 1),
        "x": View("_x", (slice(None), slice(0, in_))),
    }


def _b_by_rank(arrays):
    """b stored [count rank out]."""
    return arrays | {"_b": arrays["b"].transpose(0, 2, 1), "b": View("_b", axes=(0, 2, 1))}


LAYOUTS = {"rows": lambda arrays: arrays, "part of a row": _part_of_a_row, "b by rank": _b_by_rank}


def check_values(call):
    """The adapter of each row, read on the host."""
    adapters, count = call["adapters"], call["a"].shape[0]
    bad = (adapters < -1) | (adapters >= count)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"lora_gemm: adapters[{row}] is {int(adapters[row])}; there are adapters 0 to {count - 1}, and -1 for none"
        )


def cost(call, sizes):
    used = [i for i in call["adapters"].tolist() if i >= 0]
    width = sizes["in"] + sizes["out"]
    elements = len(used) * (width + sizes["out"]) + len(set(used)) * sizes["rank"] * width
    return Cost(
        elements * itemsize(call["x"]) + 4 * (sizes["rows"] + len(set(used))), 2 * len(used) * sizes["rank"] * width
    )


def _case(name, hostile=False, raises=None, **args):
    return Case(name, args, hostile, raises)


CASES = [
    _case("some rows, some adapters"),
    _case("every row its own", rows=5, count=5, adapters=(3, 0, 4, 1, 2)),
    _case("sorted runs", rows=24, adapters=(0,) * 9 + (1,) * 9 + (2,) * 6),
    _case("one adapter for all", rows=17, count=1, adapters=(0,)),
    _case("one row", rows=1, adapters=(1,)),
    *(_case(f"rank {rank}", rank=rank) for rank in (1, 8, 64)),
    _case("16 x 512, rank 16, to 1024", rows=16, in_=512, out=1024, count=4),
    _case("64 x 1024, rank 8, to 256", rows=64, in_=1024, out=256, rank=8, count=8),
    _case("part of a row", layout="part of a row"),
    _case("b by rank", layout="b by rank"),
    _case("no row has an adapter", True, adapters=(-1,)),
    _case("only one row has an adapter", True, rows=9, adapters=(-1, -1, -1, -1, 2, -1, -1, -1, -1)),
    *(_case(special, True, special=special, adapters=which) for special, (_, which) in SPECIALS.items()),
    *(
        _case(f"rank {rank}, {in_} to {out}", True, rank=rank, in_=in_, out=out)
        for rank, in_, out in ((3, 33, 7), (5, 1, 1), (17, 130, 257), (128, 40, 40))
    ),
    _case("no rows", True, rows=0),
    _case("no adapters loaded", True, count=0, adapters=(-1,)),
    _case("rank 0", True, rank=0),
    _case("no inputs", True, in_=0),
    _case("no outputs", True, out=0),
    _case("adapter past the end", True, r"adapters\[2\] is 3; there are adapters 0 to 2", adapters=(0, 1, 3)),
    _case("adapter -2", True, r"adapters\[1\] is -2", adapters=(0, -2)),
]


@op(
    "y![rows out]:T x[rows in]:T a[count rank in]:T b[count out rank]:T adapters[rows]:int32 scales[count]:float32 ->",
    dtypes={"T": FLOATS},
    cases=CASES,
    inputs=inputs,
    cost=cost,
    check_values=check_values,
)
def lora_gemm(y, x, a, b, adapters, scales):
    """Add to each row of y the update of its own adapter, in place.

        y[r] += scales[i] * (x[r] @ a[i]T) @ b[i]T      i = adapters[r]; rows with i = -1 stay as they are, bit for bit

    Args:
        y: what the base weight gave, written in place; it may be a part of wider rows.  It must not overlap x.
        x: the same rows that the base weight multiplied.
        a, b: the two factors of every adapter that is loaded; one of a lower rank is filled up with zeros.  What an
            adapter that no row names holds has no effect, NaN included.
        adapters: of each row, in any order; -1 is none.
        scales: lora_alpha / rank of each adapter.

    Returns:
        None.  The product with a stays in float32, is multiplied by b and the scale in float32, and is added to y
        before the one rounding at the store to the dtype of y.

    Raises:
        ValueError: an adapter below -1 or beyond the last.
    """
    for i in sorted(set(adapters.tolist()) - {-1}):
        rows = (adapters == i).nonzero()[:, 0]
        hidden = wide(x[rows]) @ wide(a[i]).T
        y[rows] = (wide(y[rows]) + scales[i].to(hidden.dtype) * (hidden @ wide(b[i]).T)).to(y.dtype)
