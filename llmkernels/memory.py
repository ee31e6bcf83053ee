"""Memory that notices misuse: red zones around tensors, NaN where nothing was written, copies to compare afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ZONE = 512  # bytes on each side of a tensor: more than a cache line, a vector register or a warp's row of loads
PATTERN = 0xA5


class Fence:
    """Tensors allocated with red zones.  `trespasses` tells whose zone was written."""

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.zones: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def empty(self, shape: Any, dtype: torch.dtype, name: str = "an output") -> torch.Tensor:
        """A contiguous tensor between two red zones, filled with NaN, or with the largest integer."""
        shape = torch.Size(shape)
        bytes_ = shape.numel() * dtype.itemsize
        memory = torch.full((ZONE + bytes_ + -bytes_ % ZONE + ZONE,), PATTERN, dtype=torch.uint8, device=self.device)
        self.zones.append((name, memory[:ZONE], memory[ZONE + bytes_ :]))
        inside = memory[ZONE : ZONE + bytes_].view(dtype).view(shape)
        return poison(inside)

    def place(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """A copy of `tensor`, contiguous, between two red zones."""
        copy = self.empty(tensor.shape, tensor.dtype, name)
        bits(copy).copy_(bits(tensor.contiguous()))
        return copy

    def trespasses(self) -> list[str]:
        """One sentence for each tensor around which something was written."""
        found = []
        for name, before, after in self.zones:
            for side, zone in (("before", before), ("after", after)):
                if bool((zone != PATTERN).any()):
                    found.append(f"wrote {side} the memory of {name}")
        return found


class Gaps:
    """The bytes of a strided view's memory that lie in none of the views which a kernel writes."""

    def __init__(self, view: torch.Tensor, views: list[torch.Tensor]):
        memory = view.untyped_storage()
        self.all = torch.empty(0, dtype=torch.uint8, device=view.device).set_(memory, 0, (memory.nbytes(),), (1,))
        inside = torch.zeros(memory.nbytes() // view.itemsize, dtype=torch.bool, device=view.device)
        for one in views:
            if one.untyped_storage().data_ptr() == memory.data_ptr():
                inside.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
        outside = ~inside.repeat_interleave(view.itemsize)
        self.where = torch.nn.functional.pad(outside, (0, memory.nbytes() - outside.numel()), value=True)
        self.before = self.all[self.where]

    def written(self) -> bool:
        return not torch.equal(self.all[self.where], self.before)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, for bitwise comparison: NaN equals NaN, -0.0 does not equal 0.0."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with what no kernel should let through."""
    if tensor.dtype.is_floating_point:
        return tensor.copy_(torch.full_like(tensor, torch.nan, dtype=torch.float32))
    return tensor.fill_(1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


@contextmanager
def poisoned_allocations(fence: Fence) -> Iterator[None]:
    """torch.empty and its relatives give fenced, NaN-filled memory inside this block."""
    real = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}
    real_new = torch.Tensor.new_empty

    def empty(*size: Any, dtype: Any = None, device: Any = None, **rest: Any) -> torch.Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        dtype = dtype or torch.get_default_dtype()
        if rest or torch.device(device or "cpu").type != fence.device.type:
            return poison(real["empty"](*size, dtype=dtype, device=device, **rest))
        return fence.empty(shape, dtype)

    def empty_like(x: torch.Tensor, *, dtype: Any = None, device: Any = None, **rest: Any) -> torch.Tensor:
        if rest or not x.is_contiguous():
            return poison(real["empty_like"](x, dtype=dtype, device=device, **rest))
        return empty(x.shape, dtype=dtype or x.dtype, device=device or x.device)

    def empty_strided(*args: Any, **options: Any) -> torch.Tensor:
        return poison(real["empty_strided"](*args, **options))

    def new_empty(x: torch.Tensor, *size: Any, dtype: Any = None, device: Any = None, **rest: Any) -> torch.Tensor:
        return empty(*size, dtype=dtype or x.dtype, device=device or x.device, **rest)

    torch.empty, torch.empty_like, torch.empty_strided = empty, empty_like, empty_strided  # type: ignore[assignment]
    torch.Tensor.new_empty = new_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(torch, name, function)
        torch.Tensor.new_empty = real_new  # type: ignore[method-assign]
