"""A model that takes layouts: its step is replayed where it was recorded, and runs from new arrays otherwise.

torch.compile makes one graph of a whole step, with the ops as its nodes, for any number of tokens, and another where
a step differs in kind: with adapters, a tree of guesses, a single token.  A CUDA graph is captured from that; on a CPU
the native calls themselves are recorded, so only longer steps run what was compiled there.
"""

from collections.abc import Callable

import torch
import torch._dynamo

from llmkernels.engine.cache import KVCache
from llmkernels.engine.graphs import DecodeGraphs
from llmkernels.engine.layout import Layout
from llmkernels.engine.tables import BlockTable
from llmkernels.models.model import Batch, Cache, Model, States
from llmkernels.settings import current, use

KINDS = 64  # of steps that are compiled; torch's own limit of 8 would end the engine


class Forward:
    """A model and its cache, over a block table.

    graphs: its steps of few tokens, where they are to be recorded and replayed.
    compiled: whether torch.compile goes over the model first.
    """

    def __init__(self, model: Model, cache: KVCache, table: BlockTable, graphs: bool, compiled: bool = False):
        self.model, self.cache, self.table, self.compiled = model, cache, table, compiled
        self.states = self._compiled() if compiled else model.states
        recorded = model.states if model.device.type == "cpu" else self.states
        self.graphs = DecodeGraphs(model, cache, table, recorded) if graphs else None

    def logits(self, layout: Layout, hidden: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
        """[samples vocab]: the logits of the rows that the layout asks for; the next step may overwrite them.

        The ops do not read the metadata, which are right by construction, unless the caller insists.
        hidden: see Batch.
        """
        with use(checked=bool(current().checked)):
            if self.graphs and not hidden and (logits := self.graphs.logits(layout)) is not None:
                return logits
            batch = layout.batch(self.table.array, self.cache.page_size, self.model.device)
            batch.hidden = hidden
            return self.model.forward(batch, self.cache, self.states)

    def _compiled(self) -> States:
        run = torch.compile(self.model.states, fullgraph=True, dynamic=True)

        def states(x: torch.Tensor, batch: Batch, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
            with torch._dynamo.config.patch(recompile_limit=KINDS):
                return run(x, batch, cache)

        return states
