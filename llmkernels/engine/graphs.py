"""Steps of few tokens that are recorded once and replayed, with no Python between their kernels.

A step of few tokens a sequence, decoding or verifying guesses, makes the same calls every time; only the values in its
arrays differ.  So its arrays are static here, and a step is known by how many sequences it has, how many tokens for
each, and how wide its block table is, all rounded up.  The first step of a kind runs as any other: kernels are checked,
compiled, and pack their weights.  The second one is recorded, later ones are replayed.

    on a CPU    a backend that offers recording() keeps the calls of its native kernels; the arrays that are made
                meanwhile are ours, and the same ones for every kind of step.  Whatever else torch computes in between
                would be missing, so such a step is not kept.
    on a GPU    a CUDA graph, where every implementation that answered declares the trait graph_safe.

Rows that fill a step up have no keys and no slot: they read nothing but token 0, and write nothing.  One token each
gives the bits of a plain step; several, whose number is rounded up, give them up to roundoff, as other batch sizes do.

    one token each     sequence 0 | sequence 1 | ... | of no sequence, a token each
    several            sequence 0: its tokens | sequence 1: fewer | ... | one that has no keys and the tokens left over

Each replay is counted in the ledger as the calls it stands for.  What answers a step is asked for anew under other
settings (`use`), and where a caller wants calls checked or noted, the step runs as any other.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmkernels import discovery, ledger
from llmkernels.engine.cache import KVCache
from llmkernels.engine.layout import Layout, round_up, table_width
from llmkernels.engine.model import Batch, Model
from llmkernels.engine.tables import BlockTable
from llmkernels.settings import current

MOST_STEPS = 64  # recorded at once: the one used longest ago is dropped for another
MOST_TOKENS = 64  # of a step with several for a sequence: all of them get logits; beyond, the work outweighs Python
MOST_EACH = 32  # tokens of a sequence: what lies behind a cached prefix is often as short
MOST_EXACT = 6  # tokens for each sequence on average that are not rounded up to the next 8


@dataclass
class Step:
    """A kind of step.  replay is None until it is recorded; `refused` says why it never is.

    x: [count hidden], where a replay finds the tokens' embeddings.  logits: [count vocab], where it leaves them.
    """

    batch: Batch
    x: torch.Tensor
    logits: torch.Tensor | None = None
    replay: Callable[[], None] | None = None
    refused: str = ""
    tallies: list[tuple[ledger.Tally, int]] = field(default_factory=list)


class DecodeGraphs:
    """The recorded steps of a model and its cache, over a block table that stays where it is.

    decode: Model.decode, or what torch.compile makes of it.
    replayed, plain: steps of few tokens that were replayed, and that were not.  refused: reason -> plain steps because
    of it.
    """

    def __init__(self, model: Model, cache: KVCache, table: BlockTable, decode: Callable[..., torch.Tensor]):
        assert table.static
        self.model, self.cache, self.decode = model, cache, decode
        self.replayed = self.plain = 0
        self.refused: Counter[str] = Counter()
        self._inputs = Inputs(table, cache.page_size, model)
        self._steps: dict[Hashable, Step] = {}
        self._memory: Any = [] if model.device.type == "cpu" else torch.cuda.graph_pool_handle()
        _ALIVE.add(self)

    def logits(self, layout: Layout) -> torch.Tensor | None:
        """[samples vocab], as Model.forward gives them; None where there are many tokens, or it runs as any other.

        They are overwritten by the next step.
        """
        tokens, sequences = len(layout.tokens), len(layout.lengths)
        count, each = rounded(sequences), -(-tokens // sequences)
        each = each if each <= MOST_EXACT else -(-each // 8) * 8
        if layout.most > MOST_EACH or (layout.most > 1 and count * each > MOST_TOKENS):
            return None
        self.plain += 1
        settings = current()
        if settings.checked or settings.recorder:
            self.refused["calls are to be checked or noted"] += 1
            return None
        several = round_up(max(layout.most, count * each - tokens)) if layout.most > 1 else 0
        form = count, each, several, table_width(layout.pages), bool(layout.sees), bool(layout.adapters)
        key = settings, torch.get_num_threads(), form, self.model.adapted if layout.adapters else -1
        step = self._steps.pop(key, None)
        if step is None:
            if len(self._steps) >= MOST_STEPS:
                del self._steps[next(iter(self._steps))]
            step = self._inputs.step(*form)
        self._steps[key] = step  # behind all others
        if step.refused:
            self.refused[step.refused] += 1
            return None
        self._inputs.set(layout, len(step.x), len(step.batch.seq_lens))
        torch.index_select(self.model.embedding, 0, step.batch.tokens, out=step.x)
        if step.replay is None:
            logits = self._first(step)
        else:
            step.replay()
            for tally, calls in step.tallies:
                tally.calls += calls
            self.replayed += 1
            self.plain -= 1
            assert step.logits is not None
            logits = step.logits
        every = layout.rows == [*range(len(logits))]
        return logits if every else logits[torch.tensor(layout.rows, dtype=torch.int64, device=logits.device)]

    def clear(self) -> None:
        """Forget every step."""
        self._steps.clear()

    def _first(self, step: Step) -> torch.Tensor:
        """Run a step that is not recorded; the second time, record it."""
        run = lambda: self.decode(step.x, step.batch, self.cache)  # noqa: E731
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
    """The static arrays of steps: as a step of any kind sees them, and as Python fills them."""

    def __init__(self, table: BlockTable, page_size: int, model: Model):
        self.page_size = page_size
        place = model.device
        pin = place.type == "cuda"
        sequences = len(table.array)
        count = max(sequences, MOST_TOKENS)
        self._long = torch.zeros(3, count, dtype=torch.int64, pin_memory=pin)  # tokens, positions, slots
        self._adapters = torch.zeros(count, dtype=torch.int32, pin_memory=pin)
        self._sees = torch.zeros(count, 1, dtype=torch.uint32, pin_memory=pin)
        self._sequences = torch.zeros(2, sequences + 1, dtype=torch.int32, pin_memory=pin)  # lengths, starts
        self._staged = [self._long, self._adapters, self._sees, self._sequences, table.array]
        # the same memory on a CPU
        self._there = [array.to(place) for array in self._staged] if place.type != "cpu" else self._staged
        self._one_each = torch.arange(sequences + 1, dtype=torch.int32, device=place)
        self._x = torch.empty(count, model.config.hidden, dtype=model.dtype, device=place)
        self._views = [array.numpy() for array in (*self._long, self._adapters, self._sees[:, 0], *self._sequences)]

    def step(self, count: int, each: int, several: int, width: int, tree: bool, adapted: bool) -> Step:
        """A step of `count` sequences with `each` tokens on average, `several` at most, or 0 where each has one."""
        long, adapters, sees, (lengths, starts), table = self._there
        tokens, count = count * each, count + bool(several)
        batch = Batch(
            tokens=long[0, :tokens],
            positions=long[1, :tokens],
            slots=long[2, :tokens],
            block_table=table[:count, :width],
            seq_lens=lengths[:count],
            cu_seqlens_q=starts[: count + 1] if several else self._one_each[: count + 1],
            rows=None,
            max_seqlen_q=several or 1,
            max_seqlen_k=width * self.page_size,
            tree_mask=sees[:tokens] if tree else None,
            adapters=adapters[:tokens] if adapted else None,
        )
        return Step(batch, self._x[:tokens])

    def set(self, layout: Layout, tokens: int, sequences: int) -> None:
        """Fill in a layout, and what fills it up to a step of so many tokens and sequences."""
        known, own = len(layout.tokens), len(layout.lengths)
        each = layout.tokens, layout.positions, layout.slots, layout.adapters, layout.sees
        for view, values, filling in zip(self._views, each, (0, 0, -1, -1, 1), strict=False):
            if values:
                view[:known] = values
                if known < tokens:
                    view[known:tokens] = filling
        lengths, starts = self._views[-2:]
        lengths[:own] = layout.lengths
        if own < sequences:
            lengths[own:sequences] = 0
        if layout.most > 1:
            starts[: own + 1] = layout.starts
            starts[own + 1 : sequences] = known
            starts[sequences] = tokens
        if self._there is not self._staged:
            for there, staged in zip(self._there, self._staged, strict=True):
                there.copy_(staged, non_blocking=True)  # done before these are set again: a step ends with its tokens


def rounded(count: int) -> int:
    """The number of rows of a step for so many sequences: at most an eighth more, so that few sizes occur."""
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step


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
