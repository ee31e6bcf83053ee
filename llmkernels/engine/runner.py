"""One forward pass for what the scheduler chose: its plain data become arrays, the model runs, tokens come back."""

from collections.abc import Sequence as Row
from functools import partial

import torch

from llmkernels.engine.cache import KVCache
from llmkernels.engine.forward import Forward
from llmkernels.engine.inputs import rounded
from llmkernels.engine.layout import Layout, slot, table_width
from llmkernels.engine.pooling import deliver
from llmkernels.engine.sampling import Chosen, choose
from llmkernels.engine.sequence import Chunk, Sequence
from llmkernels.engine.speculative import Speculator, accept, ahead
from llmkernels.engine.tables import BlockTable
from llmkernels.models.model import Model
from llmkernels.structured.masks import Masks

CALIBRATION = 256  # tokens that decide the scales of a quantized cache


class Runner:
    """What runs a step: a model, and who guesses ahead of it, if anybody does.

    recorded: for so many sequences of so many tokens at most steps are recorded, and up to how many in all those with
        several for a sequence (Forward's graphs); empty: none are.
    compiled: whether torch.compile goes over the model first.
    """

    def __init__(self, model: Model, cache: KVCache, recorded: tuple[int, ...] = (), compiled: bool = False):
        self.table, graphs = BlockTable(), 0
        if recorded:
            sequences, length, graphs = recorded
            pages, pinned = table_width(-(-length // cache.page_size)), model.device.type == "cuda"
            most = rounded(2 * sequences)  # beams come on top, as many at most
            self.table = BlockTable(most, pages, static=True, pinned=pinned)
        self.target = Forward(model, cache, self.table, graphs, compiled)
        self.speculator: Speculator | None = None

    def run(self, chunks: Row[Chunk]) -> list[list[Chosen]]:
        """Run these chunks; for each that samples, in order, the tokens that follow it, all but the last guessed."""
        if self.speculator:
            self.table.update(chunks)
            self.speculator.propose(chunks)
        ends = [chunk for chunk in chunks if chunk.samples]
        guides, guesses = [chunk.sequence.payload.guide for chunk in ends], [chunk.guesses for chunk in ends]
        masks = Masks.begin(guides, self.target.model.config.vocab, guesses)
        logits = self.logits(chunks)
        if not ends:
            return []
        answers = [ahead(chunk, node) for chunk in ends for node in range(-1, len(chunk.guesses))]
        chosen = iter(choose(logits, answers, masks))
        results, moves = [], []
        for chunk in ends:
            taken, nodes = accept(chunk, [next(chosen) for _ in range(1 + len(chunk.guesses))])
            results.append(taken)
            after = chunk.start + chunk.count
            moves += [(chunk.sequence, after + node, after + i) for i, node in enumerate(nodes) if node != i]
        if moves:
            size = self.target.cache.page_size
            self.target.cache.move([(slot(s.pages, source, size), slot(s.pages, to, size)) for s, source, to in moves])
        if self.speculator:
            self.speculator.count(ends)
        return results

    def logits(self, chunks: Row[Chunk]) -> torch.Tensor:
        """[samples vocab]: the logits after each chunk that samples and each of its guesses, in order.

        Pages to be copied are copied first.
        """
        self.table.update(chunks)
        if copies := [chunk.copy for chunk in chunks if chunk.copy]:
            self.target.cache.copy(copies)
        pooled = any(chunk.sequence.pooled for chunk in chunks)
        layout = Layout.of(chunks, self.target.cache.page_size)
        return self.target.logits(layout, partial(deliver, chunks) if pooled else None)


def calibrate(model: Model, cache: KVCache) -> None:
    """Set the scales of a quantized cache from what the model writes for tokens spread over its vocabulary."""
    count = min(CALIBRATION, model.cos.shape[0], model.config.vocab)
    spread = [i * model.config.vocab // count for i in range(count)]
    pages = -(-count // cache.page_size)
    sample = KVCache(model.config, pages, cache.page_size, model.dtype, model.device)
    for held in (sample.k, sample.v):
        held.zero_()
    sequence = Sequence(spread, count, count + 1, pages=list(range(pages)))
    Runner(model, sample).logits([Chunk(sequence, 0, count, True)])
    cache.scales_from(sample, pages)
