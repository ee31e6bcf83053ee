"""A model that takes layouts: its step is replayed where it was recorded, and runs from new arrays otherwise."""

from collections.abc import Callable

import torch

from llmkernels.engine.cache import KVCache
from llmkernels.engine.graphs import DecodeGraphs
from llmkernels.engine.layout import Layout
from llmkernels.engine.tables import BlockTable
from llmkernels.models.model import Model
from llmkernels.settings import current, use


class Forward:
    """A model and its cache, over a block table.

    graphs: its steps of few tokens, where they are to be recorded and replayed.
    """

    def __init__(self, model: Model, cache: KVCache, table: BlockTable, graphs: bool):
        self.model, self.cache, self.table = model, cache, table
        self.graphs = DecodeGraphs(model, cache, table) if graphs else None

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
            return self.model.forward(batch, self.cache)
