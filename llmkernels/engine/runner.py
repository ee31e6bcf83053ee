"""One forward pass for what the scheduler chose: its plain data become arrays, the model runs, tokens come back."""

from collections.abc import Sequence as Row
from functools import partial

import torch

from llmkernels.engine.cache import KVCache
from llmkernels.engine.graphs import DecodeGraphs, table_width
from llmkernels.engine.model import Batch, Model
from llmkernels.engine.pooling import deliver
from llmkernels.engine.sampling import Chosen, choose
from llmkernels.engine.scheduler import Chunk, Sequence
from llmkernels.engine.speculative import Speculator, accept, ahead, branches, path
from llmkernels.engine.tables import BlockTable
from llmkernels.settings import current, use
from llmkernels.structured.masks import Masks

CALIBRATION = 256  # tokens that decide the scales of a quantized cache


class Runner:
    """A model and its cache.

    graphs: its decode steps, where they are to be recorded and replayed.
    speculator: who guesses ahead of the model, if anybody does.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        graphs: DecodeGraphs | None = None,
        speculator: Speculator | None = None,
    ):
        self.model, self.cache, self.graphs, self.speculator = model, cache, graphs, speculator
        self.table = graphs.table if graphs else BlockTable()

    def run(self, chunks: Row[Chunk]) -> list[list[Chosen]]:
        """Run these chunks; for each that samples, in order, the tokens that follow it, all but the last guessed."""
        if self.speculator:
            with use(checked=bool(current().checked)):
                self.speculator.propose(chunks, self.prepare)
        ends = [chunk for chunk in chunks if chunk.samples]
        guides, guesses = [chunk.sequence.payload.guide for chunk in ends], [chunk.guesses for chunk in ends]
        masks = Masks.begin(guides, self.model.config.vocab, guesses)
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
            size = self.cache.page_size
            self.cache.move([(_slot(s.pages, source, size), _slot(s.pages, to, size)) for s, source, to in moves])
        if self.speculator:
            self.speculator.count(ends)
        return results

    def logits(self, chunks: Row[Chunk]) -> torch.Tensor:
        """[samples vocab]: the logits after each chunk that samples and each of its guesses, in order.

        Pages to be copied are copied first.  The ops do not read the scheduler's metadata, which are right by
        construction, unless the caller insists.
        """
        if copies := [chunk.copy for chunk in chunks if chunk.copy]:
            self.cache.copy(copies)
        with use(checked=bool(current().checked)):
            pooled = any(chunk.sequence.pooled for chunk in chunks)
            if self.graphs and not pooled and (logits := self.graphs.logits(chunks)) is not None:
                return logits
            batch = self.prepare(chunks)
            batch.hidden = partial(deliver, chunks) if pooled else None
            return self.model.forward(batch, self.cache)

    def prepare(self, chunks: Row[Chunk]) -> Batch:
        """The arrays of a step."""
        self.table.update(chunks)
        return arrays(chunks, self.table.array, self.cache.page_size, self.model.device)


def arrays(chunks: Row[Chunk], table: torch.Tensor, page_size: int, device: torch.device) -> Batch:
    """The arrays of a step: of each chunk its tokens, and behind them its guesses.

    The sequences stand in the order of their rows in the block table, and `rows` in that of the chunks.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    starts = [0]
    ordered = sorted(chunks, key=lambda chunk: chunk.sequence.row)
    firsts: dict[int, int] = {}  # row of a chunk that samples -> its last token
    for chunk in ordered:
        sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.count
        pages = sequence.pages
        if chunk.count == 1:  # nearly always
            tokens.append(sequence.tokens[start])
            positions.append(start)
            slots.append(pages[start // page_size] * page_size + start % page_size)
        else:
            tokens += sequence.tokens[start:end]
            positions += range(start, end)
            slots += [_slot(pages, p, page_size) for p in range(start, end)]
        firsts[sequence.row] = len(tokens) - 1
        for node, token in enumerate(chunk.guesses):
            tokens.append(token)
            positions.append(end - 1 + len(path(chunk, node)))
            slots.append(_slot(pages, end + node, page_size))
        starts.append(len(tokens))
    for chunk in chunks:
        if chunk.samples:
            first = firsts[chunk.sequence.row]
            rows += range(first, first + 1 + len(chunk.guesses))
    width = min(table_width(max(len(chunk.sequence.pages) for chunk in chunks)), table.shape[1])

    def array(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Batch(
        tokens=array(tokens, torch.int64),
        positions=array(positions, torch.int64),
        slots=array(slots, torch.int64),
        block_table=table[: len(chunks), :width].to(device),
        seq_lens=array([chunk.start + chunk.count + len(chunk.guesses) for chunk in ordered], torch.int32),
        cu_seqlens_q=array(starts, torch.int32),
        rows=None if rows == [*range(len(tokens))] else array(rows, torch.int64),
        max_seqlen_q=_round_up(max(chunk.count + len(chunk.guesses) for chunk in chunks)),
        max_seqlen_k=width * page_size,
        tree_mask=array(_sight(ordered), torch.uint32) if any(branches(chunk) for chunk in chunks) else None,
        adapters=_adapters(ordered, starts, device),
    )


def _adapters(ordered: Row[Chunk], starts: list[int], device: torch.device) -> torch.Tensor | None:
    """Which adapter each token runs with, int32; None where none does."""
    if all(chunk.sequence.adapter < 0 for chunk in ordered):
        return None
    each = torch.tensor([chunk.sequence.adapter for chunk in ordered], dtype=torch.int32)
    return each.repeat_interleave(torch.tensor(starts).diff()).to(device)


def _sight(chunks: Row[Chunk]) -> list[list[int]]:
    """The word of each token whose bits say which new tokens of its sequence it sees; there are at most 32."""
    words = []
    for chunk in chunks:
        words += [[(2 << i) - 1] for i in range(chunk.count)]
        before = words[-1][0]
        for node in range(len(chunk.guesses)):
            words.append([before | sum(1 << chunk.count + i for i in path(chunk, node))])
    return words


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


def _slot(pages: list[int], position: int, page_size: int) -> int:
    return pages[position // page_size] * page_size + position % page_size


def _round_up(count: int) -> int:
    """The next power of two, so that few kinds of call occur."""
    return 1 << (count - 1).bit_length()
