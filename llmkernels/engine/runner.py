"""One forward pass for what the scheduler chose: its plain data become arrays, the model runs, tokens come back."""

from collections.abc import Sequence as Row

import torch

from llmkernels.engine.cache import KVCache
from llmkernels.engine.grammar import Masks
from llmkernels.engine.model import Batch, Model
from llmkernels.engine.sampling import Chosen, choose
from llmkernels.engine.scheduler import Chunk, Sequence
from llmkernels.settings import current, use

CALIBRATION = 256  # tokens that decide the scales of a quantized cache


class Runner:
    """A model and its cache."""

    def __init__(self, model: Model, cache: KVCache):
        self.model, self.cache = model, cache

    def run(self, chunks: Row[Chunk]) -> list[Chosen]:
        """Run these chunks; the next token of each chunk that samples, in order."""
        answers = [chunk.sequence.payload for chunk in chunks if chunk.samples]
        masks = Masks.begin([answer.guide for answer in answers], self.model.config.vocab)
        logits = self.logits(chunks)
        return choose(logits, answers, masks) if answers else []

    def logits(self, chunks: Row[Chunk]) -> torch.Tensor:
        """[samples vocab]: the logits after each chunk that samples, in order.  Pages to be copied are copied first.

        The ops do not read the scheduler's metadata first, which are right by construction, unless the caller insists.
        """
        if copies := [chunk.copy for chunk in chunks if chunk.copy]:
            self.cache.copy(copies)
        with use(checked=bool(current().checked)):
            return self.model.forward(prepare(chunks, self.cache.page_size, self.model.device), self.cache)


def prepare(chunks: Row[Chunk], page_size: int, device: torch.device) -> Batch:
    """The arrays of a step."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, rows = [0], []
    for chunk in chunks:
        pages, span = chunk.sequence.pages, range(chunk.start, chunk.start + chunk.count)
        tokens += chunk.sequence.tokens[span.start : span.stop]
        positions += span
        slots += [pages[p // page_size] * page_size + p % page_size for p in span]
        starts.append(len(tokens))
        rows += [len(tokens) - 1] if chunk.samples else []
    width = _round_up(max(len(chunk.sequence.pages) for chunk in chunks))
    table = [chunk.sequence.pages + [-1] * (width - len(chunk.sequence.pages)) for chunk in chunks]

    def array(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Batch(
        tokens=array(tokens, torch.int64),
        positions=array(positions, torch.int64),
        slots=array(slots, torch.int64),
        block_table=array(table, torch.int32),
        seq_lens=array([chunk.start + chunk.count for chunk in chunks], torch.int32),
        cu_seqlens_q=array(starts, torch.int32),
        rows=array(rows, torch.int64),
        max_seqlen_q=_round_up(max(chunk.count for chunk in chunks)),
        max_seqlen_k=width * page_size,
    )


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


def _round_up(count: int) -> int:
    """The next power of two, so that few kinds of call occur."""
    return 1 << (count - 1).bit_length()
