"""One forward pass for what the scheduler chose: its plain data become arrays, the model runs, tokens come back."""

from collections.abc import Sequence as Row

import torch

from llmkernels.engine.cache import KVCache
from llmkernels.engine.grammar import Masks
from llmkernels.engine.graphs import DecodeGraphs, table_width
from llmkernels.engine.model import Batch, Model
from llmkernels.engine.sampling import Chosen, choose
from llmkernels.engine.scheduler import Chunk, Sequence
from llmkernels.engine.speculative import Speculator, accept, ahead, branches, path
from llmkernels.settings import current, use

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

    def run(self, chunks: Row[Chunk]) -> list[list[Chosen]]:
        """Run these chunks; for each that samples, in order, the tokens that follow it, all but the last guessed."""
        if self.speculator:
            with use(checked=bool(current().checked)):
                self.speculator.propose(chunks, prepare)
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
            if self.graphs and (logits := self.graphs.logits(chunks)) is not None:
                return logits
            return self.model.forward(prepare(chunks, self.cache.page_size, self.model.device), self.cache)


def prepare(chunks: Row[Chunk], page_size: int, device: torch.device) -> Batch:
    """The arrays of a step: of each chunk its tokens, and behind them its guesses."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, rows, adapters = [0], [], []
    for chunk in chunks:
        pages, span = chunk.sequence.pages, range(chunk.start, chunk.start + chunk.count)
        tokens += chunk.sequence.tokens[span.start : span.stop]
        positions += span
        slots += [_slot(pages, p, page_size) for p in span]
        rows += [len(tokens) - 1] if chunk.samples else []
        for node, token in enumerate(chunk.guesses):
            rows.append(len(tokens))
            tokens.append(token)
            positions.append(span.stop - 1 + len(path(chunk, node)))
            slots.append(_slot(pages, span.stop + node, page_size))
        adapters += [chunk.sequence.adapter] * (len(tokens) - starts[-1])
        starts.append(len(tokens))
    width = table_width(max(len(chunk.sequence.pages) for chunk in chunks))
    table = [chunk.sequence.pages + [-1] * (width - len(chunk.sequence.pages)) for chunk in chunks]

    def array(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Batch(
        tokens=array(tokens, torch.int64),
        positions=array(positions, torch.int64),
        slots=array(slots, torch.int64),
        block_table=array(table, torch.int32),
        seq_lens=array([chunk.start + chunk.count + len(chunk.guesses) for chunk in chunks], torch.int32),
        cu_seqlens_q=array(starts, torch.int32),
        rows=None if len(rows) == len(tokens) else array(rows, torch.int64),
        max_seqlen_q=_round_up(max(chunk.count + len(chunk.guesses) for chunk in chunks)),
        max_seqlen_k=width * page_size,
        tree_mask=array(_sight(chunks), torch.uint32) if any(branches(chunk) for chunk in chunks) else None,
        adapters=array(adapters, torch.int32) if max(adapters) >= 0 else None,
    )


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
