"""Decode steps that are recorded once and replayed, with no Python between their kernels.

A decode step, one token for each sequence, makes the same calls every time; only the values in its arrays differ.  So
its arrays are static here, and a step is known by how many sequences it has and how wide its block table is, both
rounded up.  The first step of a kind runs as any other: kernels are checked, compiled, and pack their weights.  The
second one is recorded, later ones are replayed.

    on a CPU    a backend that offers recording() keeps the calls of its native kernels; the arrays that are made
                meanwhile are ours, and the same ones for every kind of step.  Whatever else torch computes in between
                would be missing, so such a step is not kept.
    on a GPU    a CUDA graph, where every implementation that answered declares the trait graph_safe.

Rows that fill a step up have no keys and no slot: they read nothing but token 0, and write nothing.  Each replay is
counted in the ledger as the calls it stands for.  What answers a step is asked for anew under other settings (`use`),
and where a caller wants calls checked or noted, the step runs as any other.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Row
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmkernels import discovery, ledger
from llmkernels.engine.cache import KVCache
from llmkernels.engine.model import Batch, Model
from llmkernels.engine.scheduler import Chunk
from llmkernels.engine.tables import BlockTable
from llmkernels.settings import current

MOST_STEPS = 64  # recorded at once: the one used longest ago is dropped for another
LEAST_PAGES = 8  # of a block table: short sequences share one kind of step


@dataclass
class Step:
    """A kind of decode step.  replay is None until it is recorded; `refused` says why it never is.

    x: [count hidden], where a replay finds the tokens' embeddings.  logits: [count vocab], where it leaves them.
    """

    batch: Batch
    x: torch.Tensor
    logits: torch.Tensor | None = None
    replay: Callable[[], None] | None = None
    refused: str = ""
    tallies: list[tuple[ledger.Tally, int]] = field(default_factory=list)


class DecodeGraphs:
    """The recorded steps of a model and its cache.

    replayed, plain: decode steps that were replayed, and that were not.  refused: reason -> plain steps because of it.
    """

    def __init__(self, model: Model, cache: KVCache, max_sequences: int, max_length: int):
        self.model, self.cache = model, cache
        self.replayed = self.plain = 0
        self.refused: Counter[str] = Counter()
        pages = table_width(-(-max_length // cache.page_size))
        count, pinned = rounded(2 * max_sequences), model.device.type == "cuda"  # beams come on top, as many at most
        self.table = BlockTable(count, pages, static=True, pinned=pinned)
        self._inputs = Inputs(self.table, count, cache.page_size, model)
        self._steps: dict[Hashable, Step] = {}
        self._memory: Any = [] if model.device.type == "cpu" else torch.cuda.graph_pool_handle()
        _ALIVE.add(self)

    def logits(self, chunks: Row[Chunk]) -> torch.Tensor | None:
        """[samples vocab], as Model.forward gives them; None where the step is no decode, or runs as any other."""
        if not all(chunk.count == 1 and chunk.samples and not chunk.guesses for chunk in chunks):
            return None
        self.plain += 1
        if any(chunk.sequence.adapter >= 0 for chunk in chunks):
            self.refused["some of its sequences have an adapter"] += 1
            return None
        settings = current()
        if settings.checked or settings.recorder:
            self.refused["calls are to be checked or noted"] += 1
            return None
        count = rounded(len(chunks))
        width = table_width(max(len(chunk.sequence.pages) for chunk in chunks))
        key = settings, torch.get_num_threads(), count, width
        step = self._steps.pop(key, None)
        if step is None:
            if len(self._steps) >= MOST_STEPS:
                del self._steps[next(iter(self._steps))]
            step = self._inputs.step(count, width)
        self._steps[key] = step  # behind all others
        if step.refused:
            self.refused[step.refused] += 1
            return None
        self.table.update(chunks)
        self._inputs.set(chunks)
        order = [chunk.sequence.row for chunk in chunks]
        torch.index_select(self.model.embedding, 0, step.batch.tokens, out=step.x)
        if step.replay is None:
            return self._first(step)[order]
        step.replay()
        for tally, calls in step.tallies:
            tally.calls += calls
        self.replayed += 1
        self.plain -= 1
        assert step.logits is not None
        return step.logits[order]

    def clear(self) -> None:
        """Forget every step."""
        self._steps.clear()

    def _first(self, step: Step) -> torch.Tensor:
        """Run a step that is not recorded; the second time, record it."""
        run = lambda: self.model.decode(step.x, step.batch, self.cache)  # noqa: E731
        if not step.tallies:
            before = [(tally, tally.calls) for tally in ledger.TALLIES.values()]
            logits = run()
            known = dict(before)
            counted = [(tally, tally.calls - known.get(tally, 0)) for tally in ledger.TALLIES.values()]
            step.tallies = [(tally, calls) for tally, calls in counted if calls]
            step.refused = refusal({(tally.backend, tally.op) for tally, _ in step.tallies}, step.x.device.type)
            return logits
        record = _record if step.x.device.type == "cpu" else _capture
        step.replay, step.logits, step.refused = record(run, step.tallies[0][0].backend, self._memory)
        return step.logits


class Inputs:
    """The static arrays of decode steps: as a step of any size sees them, and as Python fills them."""

    def __init__(self, table: BlockTable, count: int, page_size: int, model: Model):
        self.page_size = page_size
        place = model.device
        pin = place.type == "cuda"
        self._long = torch.zeros(3, count, dtype=torch.int64, pin_memory=pin)  # tokens, positions, slots
        self._lengths = torch.zeros(count, dtype=torch.int32, pin_memory=pin)
        self._staged = [self._long, self._lengths, table.array]
        self._long[2] = -1
        # the same memory on a CPU
        self._there = [array.to(place) for array in self._staged] if place.type != "cpu" else self._staged
        self._starts = torch.arange(count + 1, dtype=torch.int32, device=place)
        self._x = torch.empty(count, model.config.hidden, dtype=model.dtype, device=place)
        self._views = [array.numpy() for array in (*self._long, self._lengths)]
        self._used = 0

    def step(self, count: int, width: int) -> Step:
        """A step of so many sequences, with no more than `width` pages each."""
        long, lengths, table = self._there
        batch = Batch(
            tokens=long[0, :count],
            positions=long[1, :count],
            slots=long[2, :count],
            block_table=table[:count, :width],
            seq_lens=lengths[:count],
            cu_seqlens_q=self._starts[: count + 1],
            rows=None,
            max_seqlen_q=1,
            max_seqlen_k=width * self.page_size,
        )
        return Step(batch, self._x[:count])

    def set(self, chunks: Row[Chunk]) -> None:
        """Fill in these sequences, each in its row of the block table; the rows behind them become empty."""
        tokens, positions, slots, lengths = self._views
        size = self.page_size
        for chunk in chunks:
            sequence, position = chunk.sequence, chunk.start
            row = sequence.row
            pages = sequence.pages
            tokens[row] = sequence.tokens[position]
            positions[row] = position
            slots[row] = pages[position // size] * size + position % size
            lengths[row] = position + 1
        for row in range(len(chunks), self._used):
            tokens[row] = positions[row] = lengths[row] = 0
            slots[row] = -1
        self._used = len(chunks)
        if self._there is not self._staged:
            for there, staged in zip(self._there, self._staged, strict=True):
                there.copy_(staged, non_blocking=True)  # done before these are set again: a step ends with its tokens


def rounded(count: int) -> int:
    """The number of rows of a step for so many sequences: at most an eighth more, so that few sizes occur."""
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step


def table_width(pages: int) -> int:
    """The columns of a block table for sequences of so many pages: a power of two, so that few widths occur."""
    return max(LEAST_PAGES, 1 << (pages - 1).bit_length())


def refusal(answered: set[tuple[str, str]], device: str) -> str:
    """Why a step that these implementations, (backend, op), answered cannot be recorded; '' where it can."""
    if device == "cpu":
        names = {backend for backend, _ in answered}
        lacking = sorted(name for name in names if not hasattr(_package(name), "recording"))
        if lacking or len(names) != 1:
            return f"answered by {', '.join(lacking or sorted(names))}, which keep no calls together"
        return ""
    for backend, op in sorted(answered):
        module = discovery.implementation(backend, op) if backend != discovery.REFERENCE else None
        if not getattr(module, "TRAITS", {}).get("graph_safe"):
            return f"{backend}'s {op} does not declare graph_safe"
    return ""


def _package(backend: str) -> Any:
    return None if backend == discovery.REFERENCE else discovery.package(backend)


def _record(run: Callable, backend: str, memory: list) -> tuple[Callable | None, torch.Tensor, str]:
    """Run a step whose calls `backend` keeps: its replay, its logits, and why it cannot be replayed."""
    with ExitStack() as stack:
        watch = stack.enter_context(Watch(memory))
        recording = stack.enter_context(_package(backend).recording())
        logits = run()
    if watch.computed:
        return None, logits, f"torch computes between the kernels: {', '.join(sorted(watch.computed))}"

    def replay(_held: list[torch.Tensor] = watch.made) -> None:  # the kernels write into these
        recording.replay()

    return replay, logits, ""


def _capture(run: Callable, _: str, memory: Any) -> tuple[Callable | None, torch.Tensor, str]:
    """The same with a CUDA graph, which keeps its arrays itself.  Capturing runs nothing: the graph does, once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):
        logits = run()
    graph.replay()
    return graph.replay, logits, ""


class Watch(TorchDispatchMode):
    """Notes what torch does inside: `made`, the memory of the arrays it makes, and `computed`, what else it runs.

    memory: the i-th array made lies in memory[i], which grows where it is too small: one replay at a time runs, and
    each begins anew, so all of them can share it.
    """

    def __init__(self, memory: list[torch.Tensor]) -> None:
        super().__init__()
        self._memory = memory
        self.made: list[torch.Tensor] = []
        self.computed: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.empty.memory_format and result.is_contiguous():
            return self._shared(result)
        if not function.is_view:
            self.computed.add(str(function))
        return result

    def _shared(self, array: torch.Tensor) -> torch.Tensor:
        index = len(self.made)
        if index == len(self._memory) or self._memory[index].nbytes < array.nbytes:
            room = torch.empty(1 << (array.nbytes - 1).bit_length(), dtype=torch.uint8)
            self._memory[index : index + 1] = [room]
        self.made.append(self._memory[index])
        return self._memory[index][: array.nbytes].view(array.dtype).view(array.shape)


_ALIVE: WeakSet[DecodeGraphs] = WeakSet()


def _forget() -> None:
    for graphs in _ALIVE:
        graphs.clear()


discovery.FORGET.append(_forget)
