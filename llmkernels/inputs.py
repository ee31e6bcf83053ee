"""The arguments of a contract's case: drawn by the contract in NumPy, rounded and laid out here."""

import zlib
from typing import Any

import numpy as np
import torch

from llmkernels.contract import Case, Contract, Sparse, View
from llmkernels.memory import Fence
from llmkernels.shapes import dtype_name


def inputs(
    contract: Contract, case: Case, dtype: str, device: str = "cpu", fence: Fence | None = None, wide: bool = False
) -> dict[str, Any]:
    """The arguments of a case, by name, as torch tensors; with `wide`, every float32, bfloat16 and float16 as float64.

    The same case and dtype give the same values, whatever the device, the backend and the width.
    """
    rng = np.random.default_rng(zlib.crc32(f"{contract.name} {case.name}".encode()))
    raw = contract.inputs(rng, **case.args)
    views = {name: value for name, value in raw.items() if isinstance(value, View)}
    tensors = {}
    for name, value in raw.items():
        if isinstance(value, (np.ndarray, Sparse, np.floating, torch.Tensor)):
            argument = name if name in contract.shapes.inputs else next(n for n, v in views.items() if v.base == name)
            tensors[name] = _tensor(value, _dtype(contract, argument, case, dtype), device, name, fence, wide)
        elif hasattr(value, "scheme"):
            tensors[name] = value.map(
                lambda part, name=name: _tensor(part, dtype_name(part), device, name, fence, False)
            )
    for name, view in views.items():
        base = tensors[view.base][view.index]
        tensors[name] = base.permute(view.axes) if view.axes else base
    call = {name: tensors.get(name, value) for name, value in raw.items() if not name.startswith("_")}
    return contract.bind(**call)


def _dtype(contract: Contract, argument: str, case: Case, dtype: str) -> str:
    first = contract.shapes.inputs[argument].dtypes[0]
    if first not in contract.shapes.dtypes:
        return first
    return dtype if first == "T" else case.args.get(first) or dtype


def _tensor(value: Any, dtype: str, device: str, name: str, fence: Fence | None, wide: bool) -> torch.Tensor:
    kind = getattr(torch, dtype)
    if isinstance(value, Sparse):
        large = torch.empty(value.shape, dtype=kind, device=device)
        for row, content in value.rows.items():
            large[row] = _rounded(content, kind).to(device)
        return large
    tensor = _rounded(value, kind).to(device)
    if fence:
        tensor = fence.place(tensor, name)
    return tensor.double() if wide and kind in (torch.float32, torch.bfloat16, torch.float16) else tensor


def _rounded(value: Any, kind: torch.dtype) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.to(kind)
    if kind == torch.int8 and np.asarray(value).dtype.kind == "f":
        value = np.nan_to_num(np.rint(value), nan=127).clip(-128, 127)  # NaN marks a slot that must have no effect
    return torch.from_numpy(np.array(value)).to(kind)
