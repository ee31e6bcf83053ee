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
from llmkernels.engine.inputs import MOST_ON_A_GPU, MOST_TOKENS
from llmkernels.engine.layout import Layout
from llmkernels.engine.tables import BlockTable
from llmkernels.models.model import Batch, Model
from llmkernels.settings import current, use

KINDS = 64  # of steps that are compiled; torch's own limit of 8 would end the engine


class Forward:
    """A model and its cache, over a block table.

    graphs: up to how many tokens its steps are recorded and replayed: see DecodeGraphs.most; True: as many as are worth
        it; 0: none.  Many tokens are recorded in two parts, but compiled in one.
    compiled: whether torch.compile goes over the model first.
    """

    def __init__(self, model: Model, cache: KVCache, table: BlockTable, graphs: bool | int, compiled: bool = False):
        self.model, self.cache, self.table, self.compiled = model, cache, table, compiled
        self.decode = self._compiled() if compiled else model.decode
        recorded = model.decode if model.device.type == "cpu" else self.decode
        if graphs is True:
            graphs = MOST_TOKENS if compiled or model.device.type == "cpu" else MOST_ON_A_GPU
        self.graphs = DecodeGraphs(model, cache, table, recorded, graphs) if graphs else None

    def logits(self, layout: Layout, hidden: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
        """[samples vocab]: the logits of the rows that the layout asks for; the next step may overwrite them.

        The ops do not read the metadata, which are right by construction, unless the caller insists.
        hidden: see Batch.
        """
        with use(checked=bool(current().checked)):
            if self.graphs and not hidden and (logits := self.graphs.logits(layout)) is not None:
                return logits
            batch = layout.batch(layout.arrays(self.table.array, self.model.device), self.cache.page_size)
            batch.hidden = hidden
            if layout.rows != [*range(len(layout.tokens))]:
                batch.rows = torch.tensor(layout.rows, dtype=torch.int64, device=self.model.device)
            decode = self.model.decode if hidden else self.decode  # what calls back is no part of a graph
            return decode(self.model.embedding[batch.tokens], batch, self.cache)

    def _compiled(self) -> Callable[..., torch.Tensor]:
        run = torch.compile(self.model.decode, fullgraph=True, dynamic=True)

        def decode(x: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
            with torch._dynamo.config.patch(recompile_limit=KINDS):
                return run(x, batch, cache)

        return decode
