"""Steps of few tokens that are recorded once and replayed, with no Python between their kernels.

A step of few tokens, decoding, verifying guesses or reading what lies behind a known prefix, makes the same calls every
time; only the values in its arrays differ, and how many rows they have.  So its arrays are static here.  The first step
of a kind runs as any other: kernels are checked, compiled, and pack their weights.  The second one is recorded, later
ones are replayed.

    on a CPU    a backend that offers recording() keeps the calls of its native kernels, and makes them again with as
                many rows as a step has: one recording serves all steps whose tokens fill up to the same power of two,
                with the bits of plain ones.  The arrays that are made meanwhile are ours, the same ones for every kind
                of step.  Whatever else torch computes in between would be missing, so such a step is not kept.
    on a GPU    a CUDA graph, where every implementation that answered declares the trait graph_safe.  Its size is
                fixed, so steps are filled up to few sizes with rows that have no keys and no slot: they read nothing
                but token 0, and write nothing.  One token each gives the bits of a plain step; several give them up to
                roundoff, as other batch sizes do.  There short chunks of prompts are steps of few tokens as well.

Each replay is counted in the ledger as the calls it stands for.  What answers a step is asked for anew under other
settings (`use`), and where a caller wants calls checked or noted, the step runs as any other.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakSet

import torch

from llmkernels import discovery, ledger
from llmkernels.engine.cache import KVCache
from llmkernels.engine.inputs import Inputs, filled, rounded
from llmkernels.engine.layout import Layout, round_up, table_width
from llmkernels.engine.recording import Replay, Results, capture, record, refusal, resized
from llmkernels.engine.tables import BlockTable
from llmkernels.models.model import Model
from llmkernels.settings import current

MOST_STEPS = 64  # recorded at once: the one used longest ago is dropped for another


@dataclass
class Step:
    """A part of a step of some kind.  replay is None until it is recorded; `refused` says why it never is.

    results: where a replay leaves them, [tokens ...] each.
    """

    results: Results = ()
    replay: Replay | None = None
    refused: str = ""
    tallies: list[tuple[ledger.Tally, int]] = field(default_factory=list)


class DecodeGraphs:
    """The recorded steps of a model and its cache, over a block table that stays where it is.

    decode: Model.decode, or what torch.compile makes of it.  most: tokens of a step with several for a sequence.
    replayed, plain: steps of few tokens that were, and that were not.  refused: reason -> plain steps because of it.
    """

    def __init__(self, model: Model, cache: KVCache, table: BlockTable, decode: Callable[..., torch.Tensor], most: int):
        assert table.static
        self.model, self.cache, self.decode, self.most = model, cache, decode, most
        self.replayed = self.plain = 0
        self.refused: Counter[str] = Counter()
        self._fixed = model.device.type != "cpu"
        self._inputs = Inputs(table, model, most)
        self._steps: dict[Hashable, Step] = {}
        self._memory: Any = torch.cuda.graph_pool_handle() if self._fixed else []
        _ALIVE.add(self)

    def logits(self, layout: Layout) -> torch.Tensor | None:
        """[samples vocab], as Model.forward gives them; None where there are many tokens, or it runs as any other.

        They are overwritten by the next step.
        """
        if (several := layout.most > 1) and len(layout.tokens) > self.most:
            return None
        wanted = layout.rows
        layout = filled(layout) if self._fixed else layout
        tokens, sequences = len(layout.tokens), len(layout.lengths)
        if several and (tokens > self.most or sequences > self._inputs.arrays.table.shape[0]):
            return None
        settings = current()
        if settings.checked or settings.recorder:
            self.plain += 1
            self.refused["calls are to be checked or noted"] += 1
            return None
        model, inputs = self.model, self._inputs
        size = (tokens, sequences, layout.most) if self._fixed else (round_up(tokens),)
        form = *size, table_width(layout.pages), bool(layout.sees), model.adapted if layout.adapters else -1
        inputs.set(layout)
        x, batch = inputs.x[:tokens], partial(layout.batch, inputs.arrays, self.cache.page_size)
        torch.index_select(model.embedding, 0, inputs.arrays.long[0, :tokens], out=x)
        if layout.rows == [*range(tokens)]:
            (logits,), replayed = self._run(form, lambda: (self.decode(x, batch(), self.cache),), tokens, sequences)
        else:  # the head has a recording of its own, of as many rows as are asked for
            form = *form, "states"
            states, replayed = self._run(form, lambda: model.states(x, batch(), self.cache), tokens, sequences)
            logits, too = self._head(states, layout.rows)
            replayed = replayed and too
        self.replayed += replayed
        self.plain += not replayed
        return logits if layout.rows == wanted else logits[wanted]

    def _head(self, states: Results, rows: list[int]) -> tuple[torch.Tensor, bool]:
        """The logits of these rows of what the last layer gave, and whether they were replayed."""
        count, device = len(rows), states[0].device
        if not count:
            return states[0].new_empty(0, self.model.config.vocab), True
        most, kind = (rounded(count),) * 2 if self._fixed else (count, round_up(count))
        ends = [end[:most] for end in self._inputs.ends]
        chosen = torch.tensor(rows + [0] * (most - count), device=device)
        for state, end in zip(states, ends, strict=True):
            torch.index_select(state, 0, chosen, out=end)
        (logits,), replayed = self._run(("head", kind), lambda: (self.model.logits(*ends),), most, 1)
        return logits[:count] if most > count else logits, replayed

    def _run(self, form: Hashable, run: Callable[[], Results], tokens: int, sequences: int) -> tuple[Results, bool]:
        """What `run` gives, and whether it was replayed.  It is recorded the second time that one of its kind runs."""
        key = current(), torch.get_num_threads(), form
        step = self._steps.pop(key, None) or Step()
        if len(self._steps) >= MOST_STEPS:
            del self._steps[next(iter(self._steps))]
        self._steps[key] = step  # behind all others
        if step.replay:
            step.replay(tokens, sequences)
            for tally, calls in step.tallies:
                tally.calls += calls
            return tuple(resized(array, tokens) for array in step.results), True
        if step.refused:
            self.refused[step.refused] += 1
            return run(), False
        if not step.tallies:
            known = {id(tally): tally.calls for tally in ledger.TALLIES.values()}
            results = run()
            counted = [(tally, tally.calls - known.get(id(tally), 0)) for tally in ledger.TALLIES.values()]
            step.tallies = [(tally, calls) for tally, calls in counted if calls]
            step.refused = refusal({(tally.backend, tally.op) for tally, _ in step.tallies}, self.model.device.type)
            return results, False
        if self._fixed:
            step.replay, step.results = capture(run, self._memory)
        else:
            backend = step.tallies[0][0].backend
            step.replay, step.results, step.refused = record(run, backend, self._memory, tokens, sequences)
        return step.results, False


_ALIVE: WeakSet[DecodeGraphs] = WeakSet()


def _forget() -> None:
    for graphs in _ALIVE:
        graphs._steps.clear()


discovery.FORGET.append(_forget)
