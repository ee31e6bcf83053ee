"""Time the calls of a real engine: what `llmkernels.ledger.record` wrote down, shape for shape and stride for stride.

Lengths and options are the recorded ones, and so is the layout of every array; the numbers in them are drawn anew, and
arguments that shared memory do not.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from llmkernels import quant, registry
from llmkernels.bench.subject import Subject

POSITIVE = {"k_scale", "v_scale", "scales", "scale"}  # what quantized values are multiplied by
FIXED = {"temperature": 0.7, "top_p": 0.95, "min_p": 0.05, "top_k": 50}


def recorded(file: Path, device: str, op: str | None = None, dtype: str | None = None) -> Iterator[Subject]:
    """One subject for each distinct call in the file.

    Raises:
        ValueError: the file is no recording, or one of its calls breaks a contract.
    """
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            told = json.loads(line)
            name, arguments, count = told["op"], told["arguments"], told["count"]
        except (json.JSONDecodeError, TypeError, KeyError):
            raise ValueError(
                f"{file}, line {number} is no recorded call; write the file with llmkernels.ledger.record"
            ) from None
        subject = _subject(name, arguments, f"line {number}, {count} times", device)
        if op in (None, name) and dtype in (None, subject.dtype):
            yield subject


def _subject(op: str, arguments: Mapping[str, Any], case: str, device: str) -> Subject:
    contract = registry.get(op).contract
    generator = torch.Generator().manual_seed(0)
    call = {name: _plain(value) for name, value in arguments.items() if not _is_array(value)}
    arrays = {name: value for name, value in arguments.items() if _is_array(value)}
    for name, told in arrays.items():
        if told["dtype"] == "quantized":
            dense = torch.randn(told["shape"], generator=generator) / math.sqrt(max(told["shape"][1], 1))
            call[name] = quant.quantize(dense, told["scheme"]).to(device)
        else:
            draw = INDICES.get(name, _floats)
            values = draw(name, tuple(told["shape"]), arrays, generator)
            call[name] = _laid_out(values, told, device)
    call = contract.bind(**call)
    sizes = contract.validate(call)
    return Subject(contract, case, str(sizes["T"]), call, device)


def _is_array(value: Any) -> bool:
    return isinstance(value, dict) and {"dtype", "shape"} <= set(value)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON has no tuples


def _laid_out(values: torch.Tensor, told: Mapping[str, Any], device: str) -> torch.Tensor:
    """`values` in the recorded dtype, with the recorded strides."""
    kind = getattr(torch, told["dtype"], None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"a recorded array is {told['dtype']!r}, which is no dtype of torch; record the calls again")
    shape, strides = tuple(told["shape"]), tuple(told.get("strides") or values.stride())
    if not values.numel():
        return values.to(device, kind)
    room = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    laid = torch.zeros(room, device=device).to(kind).as_strided(shape, strides)
    return laid.copy_(values.to(device))


def _floats(name: str, shape: tuple, arrays: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
    if name in FIXED:
        return torch.full(shape, FIXED[name])
    if name == "uniform":
        return torch.rand(shape, generator=generator)
    drawn = torch.randn(shape, generator=generator)
    if name in POSITIVE:
        return 0.05 * (1 + drawn.abs())
    return (40 * drawn).clamp(-128, 127) if arrays[name]["dtype"] == "int8" else drawn


def _lengths(name: str, shape: tuple, arrays: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
    return torch.tensor(arrays[name]["values"])


def _pages(name: str, shape: tuple, arrays: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
    """Scattered pages; no two entries share one while there are enough."""
    pages, wanted = arrays["k_cache"]["shape"][0], math.prod(shape)
    return torch.randperm(max(pages, 1), generator=generator).repeat(-(-wanted // max(pages, 1)))[:wanted].view(shape)


def _slots(name: str, shape: tuple, arrays: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(math.prod(arrays["k_cache"]["shape"][:2]), generator=generator)[: shape[0]]


def _below(array: str, lowest: int = 0) -> Callable:
    """Numbers from `lowest` up to the length of another array."""

    def draw(name: str, shape: tuple, arrays: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
        return torch.randint(lowest, arrays[array]["shape"][0], shape, generator=generator)

    return draw


def _tree(name: str, shape: tuple, arrays: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
    """Each new token sees all before it: a chain, as heavy as a tree can be."""
    words = torch.zeros(shape, dtype=torch.int64)
    for begin, end in pairwise(arrays["cu_seqlens_q"]["values"]):
        for i in range(end - begin):
            for word in range(i // 32 + 1):
                words[begin + i, word] = (1 << min(i + 1 - 32 * word, 32)) - 1
    return words


INDICES: dict[str, Callable] = {
    "seq_lens": _lengths,
    "cu_seqlens_q": _lengths,
    "block_table": _pages,
    "slots": _slots,
    "positions": _below("cos"),
    "adapters": _below("a", -1),
    "tree_mask": _tree,
}
