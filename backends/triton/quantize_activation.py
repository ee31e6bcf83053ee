"""Rows rounded to 8 bits, with a scale for each row or group of columns: _rows.py."""

import torch

from ._launch import refuse_device, rows_of
from ._rows import LARGEST_GROUP, prepared

TRAITS = {
    "deterministic": True,
    "batch_invariant": True,
    "graph_safe": True,
    "workspace_bytes": 0,
    "accumulate": "float32",
}
ROUNDING = {"int8": "int8", "float8_e4m3fn": "fp8"}


def refuse(x, *, dtype, group, scale):
    yield from refuse_device(x)
    if LARGEST_GROUP < group < x.shape[-1]:
        yield "OPTION", f"group={group}; takes at most {LARGEST_GROUP}, or the whole row", "use a smaller group"


def run(x, *, dtype, group, scale):
    hidden = x.shape[-1]
    values, scales = prepared(
        rows_of(x), rounding=ROUNDING[dtype], group=group if group < hidden else 0, scale=scale,
        dtype=getattr(torch, dtype),
    )  # fmt: skip
    groups = 0 if group and not hidden else scales.shape[1]
    return values.view(x.shape), scales.view(*x.shape[:-1], scales.shape[1])[..., :groups]
