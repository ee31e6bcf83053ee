"""Which tokens run in the next step: continuous batching, chunked prefill, preemption.

Plain data in, plain data out; no tensors here.  A sequence is its tokens, and how many of them are computed, that is
have their keys and values in its pages.  A step gives each running sequence a chunk of what is pending: one token
when it decodes, as much of the prompt as the budget allows when it does not.  So there are no phases: decode and
prefill are the same thing at different sizes, and mix in every batch.

    tokens    [ prompt .............................. | generated ]
    computed  [ in pages ......... ][ pending ....................]
                                     [ chunk ]  -> computed += count; at the end of tokens, a new token is sampled

Order: everyone who runs is older than everyone who waits.  Pages go to the oldest first; when they run out, the
youngest loses all of its own and waits again, at the front (its tokens are kept, its keys are computed anew).  The
oldest therefore always gets on, and with it, in turn, everybody.
"""

from collections import deque
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from typing import Any, Protocol


class Pool(Protocol):
    """What the scheduler needs of cache.PagePool."""

    pages: int

    def take(self, count: int) -> list[int] | None: ...
    def give_back(self, pages: Row[int]) -> None: ...


@dataclass(eq=False)
class Sequence:
    """One request while it is alive.

    tokens: the prompt, and what was generated since.
    prompt_length: how many of them are the prompt.
    limit: how many tokens there may be at most, prompt included.
    stop: token ids that end the text.
    payload: the caller's, untouched.
    computed: the first so many tokens have their keys and values in pages.
    pages: ids of its pages, in order; token i is in pages[i // page_size].
    finish_reason: None while alive, then 'stop' (a token of `stop`), 'length' (the limit) or 'abort'.
    """

    tokens: list[int]
    prompt_length: int
    limit: int
    stop: frozenset[int] = frozenset()
    payload: Any = None
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True)
class Chunk:
    """Tokens start to start + count of a sequence run in this step.  `samples`: they end it, so a new one follows."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


class Scheduler:
    """First come, first served, under a budget of tokens a step and a pool of pages.

    max_batch_tokens: tokens a step at most.
    max_sequences: sequences that run at once at most; not more than max_batch_tokens, so that each gets on each step.
    """

    def __init__(self, pool: Pool, page_size: int, max_batch_tokens: int, max_sequences: int):
        if not 1 <= max_sequences <= max_batch_tokens:
            raise ValueError(
                f"max_sequences is {max_sequences} and max_batch_tokens {max_batch_tokens}; "
                "give 1 <= max_sequences <= max_batch_tokens, a token each step for each sequence"
            )
        self.pool, self.page_size = pool, page_size
        self.max_batch_tokens, self.max_sequences = max_batch_tokens, max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; ValueError where even an empty pool could not hold it to its end."""
        needed = -(-(sequence.limit - 1) // self.page_size)  # the last token's keys are never needed
        if needed > self.pool.pages:
            raise ValueError(
                f"the request may grow to {sequence.limit} tokens, {needed} pages of {self.page_size}; the cache has "
                f"{self.pool.pages}: ask for fewer tokens, or give it more memory (kv_cache_bytes, kv_cache_pages)"
            )
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """What runs next, oldest first; empty when nothing is left to do.  Report back with `advance`."""
        chunks: list[Chunk] = []
        spare = self.max_batch_tokens - len(self.running)  # beyond the one token that each running sequence gets
        while len(chunks) < len(self.running):
            sequence = self.running[len(chunks)]
            if self._reserve(sequence):
                chunks.append(_chunk(sequence, 1 + spare))
                spare -= chunks[-1].count - 1
            else:
                self._preempt()  # the youngest, who has no chunk yet; at worst this very sequence
        while self.waiting and spare and len(self.running) < self.max_sequences:
            if not self._reserve(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            chunks.append(_chunk(sequence, spare))
            spare -= chunks[-1].count
        return chunks

    def advance(self, chunks: Row[Chunk], sampled: Row[int]) -> None:
        """The chunks ran, and those that sample gave these tokens, in order."""
        tokens = iter(sampled)
        for chunk in chunks:
            sequence = chunk.sequence
            token = next(tokens) if chunk.samples else None
            if sequence.finish_reason:
                continue  # aborted while the step ran
            sequence.computed += chunk.count
            if token is not None:
                sequence.tokens.append(token)
                if token in sequence.stop:
                    self._finish(sequence, "stop")
                elif len(sequence.tokens) >= sequence.limit:
                    self._finish(sequence, "length")

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence, at any time; nothing happens to one that is finished or was never added."""
        if sequence in self.running or sequence in self.waiting:
            self._finish(sequence, "abort")

    def _reserve(self, sequence: Sequence) -> bool:
        """Pages for all of its tokens, pending ones included: a prompt once admitted never waits for pages midway."""
        missing = -(-len(sequence.tokens) // self.page_size) - len(sequence.pages)
        taken = self.pool.take(missing) if missing > 0 else []
        sequence.pages += taken or []
        return taken is not None

    def _preempt(self) -> None:
        victim = self.running.pop()
        self._release(victim)
        victim.computed = 0
        self.waiting.appendleft(victim)
        self.preemptions += 1

    def _finish(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.pages)
        sequence.pages = []


def _chunk(sequence: Sequence, most: int) -> Chunk:
    count = min(len(sequence.tokens) - sequence.computed, most)
    end = sequence.computed + count
    return Chunk(sequence, sequence.computed, count, end == len(sequence.tokens))
