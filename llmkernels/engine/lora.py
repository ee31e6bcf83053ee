"""Adapters of a model that are loaded and unloaded as it runs, many in one batch.

All that are loaded lie stacked, and `lora_gemm` gives each row its own; a step in which no row has one does not come
here at all.  models/adapter.py reads them.
"""

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from llmkernels.engine.scheduler import Scheduler
from llmkernels.models.adapter import Pair, modules, read
from llmkernels.models.model import Delta, Model

MOST_ADAPTERS = 64


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: its place in the stacks.

    number: of this loading: keys that were computed with it are found under it, and under no later one of its name.
    """

    name: str
    slot: int
    number: int


class Adapters:
    """The adapters of a model, by name; and those unloaded whose last requests are still with the scheduler."""

    def __init__(self, model: Model, scheduler: Scheduler):
        self._model, self._scheduler = model, scheduler
        self._named: dict[str, Adapter] = {}
        self._leaving: list[Adapter] = []
        self._numbers = count(1)

    @property
    def names(self) -> list[str]:
        return [*self._named]

    def find(self, name: str) -> Adapter:
        """The adapter of this name; ValueError where none is loaded."""
        if name in self._named:
            return self._named[name]
        if any(adapter.name == name for adapter in self._leaving):
            raise ValueError(f"adapter {name!r} is being unloaded; load it again to use it")
        raise ValueError(f"there is no adapter {name!r}; loaded are: {', '.join(self._named) or 'none'}")

    def load(self, name: str, path: str | Path) -> None:
        """Read an adapter; a CheckpointError (a ValueError) leaves everything as it was."""
        self.sweep()
        if not isinstance(name, str) or not name:
            raise ValueError(f"an adapter's name is {name!r}; give a text of at least one character")
        if name in self._named:
            raise ValueError(f"adapter {name!r} is loaded already; unload it first, or choose another name")
        taken = {adapter.slot for adapter in (*self._named.values(), *self._leaving)}
        if len(taken) == MOST_ADAPTERS:
            raise ValueError(f"{MOST_ADAPTERS} adapters are loaded, which is the most; unload one")
        slot = next(slot for slot in count() if slot not in taken)
        pairs = read(Path(path), self._model)
        changed = []
        for key, linear, start, rows, width in modules(self._model):
            if (pair := pairs.get(key)) is not None or key in linear.deltas:
                sizes = start, rows, width
                changed.append((key, linear, _stacked(linear.deltas.get(key), sizes, slot, pair, self._model)))
        for key, linear, delta in changed:
            linear.deltas[key] = delta
        self._model.adapted += 1
        self._named[name] = Adapter(name, slot, next(self._numbers))

    def unload(self, name: str) -> None:
        """Nobody may ask for it from now on; another one may take its place when its last request has ended."""
        self._leaving.append(self.find(name))
        del self._named[name]
        self.sweep()

    def sweep(self) -> None:
        """Forget those that were unloaded and are used no more; when none is left, the stacks as well."""
        if not self._leaving:
            return
        used = {sequence.adapter for sequence in (*self._scheduler.running, *self._scheduler.waiting)}
        self._leaving = [adapter for adapter in self._leaving if adapter.slot in used]
        if not self._named and not self._leaving:
            for _, linear, *_ in modules(self._model):
                linear.deltas.clear()
            self._model.adapted += 1


def _stacked(old: Delta | None, sizes: tuple[int, int, int], slot: int, pair: Pair | None, model: Model) -> Delta:
    """The stack of a module with the adapter in `slot`; lower ranks are filled up with zeros."""
    start, rows, width = sizes
    places = max(slot + 1, len(old.a) if old else 0)
    rank = max(len(pair.a) if pair else 0, old.a.shape[1] if old else 0)
    like: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    a, b = torch.zeros(places, rank, width, **like), torch.zeros(places, rows, rank, **like)
    scales = torch.zeros(places, device=model.device)
    if old:
        a[: len(old.a), : old.a.shape[1]] = old.a
        b[: len(old.b), :, : old.b.shape[2]] = old.b
        scales[: len(old.scales)] = old.scales
    a[slot], b[slot], scales[slot] = 0, 0, 0
    if pair:
        a[slot, : len(pair.a)], b[slot, :, : len(pair.a)], scales[slot] = pair
    return Delta(start, start + rows, a, b, scales)
