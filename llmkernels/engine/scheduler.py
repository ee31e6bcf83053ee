"""Which tokens run in the next step: continuous batching, chunked prefill, prefix reuse, forks, preemption.

Plain data in, plain data out; no tensors here.  A sequence is its tokens, and how many of them are computed, that is
have their keys and values in its pages.  A step gives each running sequence a chunk of what is pending: one token
when it decodes, as much of the prompt as the budget allows when it does not.  So there are no phases: decode and
prefill are the same thing at different sizes, and mix in every batch.

    tokens    [ prompt .............................. | generated ]
    computed  [ in pages ......... ][ pending ....................]
                                     [ chunk ]  -> computed += count; at the end of tokens, a new token is sampled

Order: everyone who runs is older than everyone who waits.  Pages go to the oldest first; when they run out, the
youngest loses all of its own and waits again, at the front (its tokens are kept, its keys are computed anew, unless
the prefix cache still has them).  The oldest therefore always gets on, and with it, in turn, everybody.

Who waits is admitted in the order of arrival, but for this: of the first LOOKAHEAD, the one with the longest known
prefix goes first, before its keys are evicted for somebody else's.  Nobody is overtaken more than PATIENCE times, and
never one that ran before and lost its pages.

Speculation takes what is left: when everybody has its tokens and nobody more can be admitted, sequences that decode
get room for guesses behind their token, as far as the budget and the free pages go.  Guesses never cause a preemption.
Those that came true are tokens like others; of the rest neither pages nor counts remain after the step.
"""

from collections import deque
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from itertools import islice

from llmkernels.engine.holdings import Holdings
from llmkernels.engine.pages import PagePool
from llmkernels.engine.prefix import PrefixCache
from llmkernels.engine.sequence import Chunk, Sequence

LOOKAHEAD = 16  # who waits and may be admitted next: each costs a lookup of its prompt
PATIENCE = 8


@dataclass(eq=False)
class Scheduler:
    """First come, first served, under a budget of tokens a step and a pool of pages.

    max_batch_tokens: tokens a step at most.
    max_sequences: sequences that run at once at most; not more than max_batch_tokens, so that each gets on each step.
    prefix: where keys that were computed before are looked up; None: nowhere.
    guesses: how many guesses a sequence may have verified in a step.
    """

    pool: PagePool
    page_size: int
    max_batch_tokens: int
    max_sequences: int
    prefix: PrefixCache | None = None
    guesses: int = 0
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    preemptions: int = 0
    _blocked: tuple[Sequence | None, int] = (None, 0)  # who waits for pages, and how many it lacked

    def __post_init__(self) -> None:
        if not 1 <= self.max_sequences <= self.max_batch_tokens:
            raise ValueError(
                f"max_sequences is {self.max_sequences} and max_batch_tokens {self.max_batch_tokens}; "
                "give 1 <= max_sequences <= max_batch_tokens, a token each step for each sequence"
            )
        self._holdings = Holdings(self.pool, self.page_size, self.prefix)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence and its forks; ValueError where even an empty pool could not hold it to its end."""
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
        while len(self.running) > self.max_sequences:  # after forks
            self._preempt()
        spare = self.max_batch_tokens - len(self.running)  # beyond the one token that each running sequence gets
        size, own = self.page_size, self.pool.own
        while len(chunks) < len(self.running):
            sequence = self.running[len(chunks)]
            start, page = sequence.computed, sequence.computed // size
            if start + 1 == len(sequence.tokens) and page < len(sequence.pages) and own(sequence.pages[page]):
                chunk = sequence.decoding  # nothing but a token more, as nearly always
                if chunk is None or chunk.room:
                    chunk = sequence.decoding = Chunk(sequence, start, 1, True)
                chunk.start = start
                chunks.append(chunk)
                continue
            chunk = self._holdings.plan(sequence, 1 + spare)
            if chunk:
                chunks.append(chunk)
                spare -= chunk.count - 1
            else:
                self._preempt()  # the youngest, who has no chunk yet; at worst this very sequence
        known: dict[Sequence, int] = {}
        while self.waiting and spare and len(self.running) < self.max_sequences:
            chunk = self._admit(self._next(known), spare)
            if not chunk:
                break
            self.running.append(self.waiting.popleft())
            chunks.append(chunk)
            spare -= chunk.count
        if self.guesses:
            for chunk in chunks:
                spare -= self._holdings.make_room(chunk, min(spare, self.guesses))
        return chunks

    def advance(self, chunks: Row[Chunk], sampled: Row[int]) -> list[int]:
        """The chunks ran, and those that sample gave these tokens behind what they accepted, in order.

        Returns how many tokens each of those has gained: accepted and sampled ones, as far as they do not end it.
        """
        tokens, gained, size, keeps = iter(sampled), [], self.page_size, self.prefix is not None
        for chunk in chunks:
            sequence = chunk.sequence
            token = next(tokens) if chunk.samples else None
            if sequence.finish_reason:  # aborted while the step ran
                gained += [0] * chunk.samples
                continue
            before, settled = sequence.settled, chunk.start + chunk.count
            sequence.settled, sequence.computed = settled, settled + len(chunk.accepted)
            if keeps and settled % size < settled - before:  # a page is full
                self._holdings.keep(sequence, before)
            if token is None:
                continue
            if sequence.forks:
                self._fork(sequence)
            if chunk.room:
                gained.append(self._append(sequence, [*chunk.accepted, token]))
                continue
            self.extend(sequence, token)
            gained.append(1)
        return gained

    def extend(self, sequence: Sequence, token: int) -> None:
        """The running sequence goes on with this token, sampled or known without that; it may be its last."""
        sequence.tokens.append(token)
        if token in sequence.stop:
            self._finish(sequence, "stop")
        elif len(sequence.tokens) >= sequence.limit:
            self._finish(sequence, "length")

    def take_back(self, chunks: list[Chunk]) -> None:
        """These chunks may not have run: who was to go on behind a copy within a page computes all of that page."""
        for chunk in chunks:
            if chunk.copy:
                chunk.sequence.computed = chunk.sequence.settled

    def fork(self, sequence: Sequence, length: int, token: int) -> Sequence:
        """A sequence that goes on with `token` behind this one's first `length` tokens, and shares their pages.

        It runs right behind this one; where that does not run, it waits in front.
        """
        tokens = [*sequence.tokens[:length], token]
        child = Sequence(tokens, sequence.prompt_length, sequence.limit, sequence.stop, sequence.scope)
        child.adapter, child.plain, child.cached = sequence.adapter, sequence.plain, sequence.cached
        if sequence not in self.running:
            self.waiting.appendleft(child)
            return child
        self._holdings.share(child, sequence, min(length, sequence.settled))
        self.running.insert(self.running.index(sequence) + 1, child)
        return child

    def end(self, sequence: Sequence, reason: str = "abort") -> None:
        """Forget a sequence, at any time; nothing happens to one that is finished or was never added."""
        if sequence.finish_reason:
            return
        if sequence in self.running or sequence in self.waiting:
            self._finish(sequence, reason)
        for parent in (*self.running, *self.waiting):
            if sequence in parent.forks:
                parent.forks.remove(sequence)
                sequence.finish_reason = reason

    def stats(self) -> dict[str, int]:
        """What is now, in sequences and pages, and what was since the start."""
        pool, prefix = self.pool, self.prefix
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "pages_used": pool.pages - pool.free,
            "pages_idle": pool.idle,
            "pages_empty": pool.free - pool.idle,
            "preemptions": self.preemptions,
            "prefix_asked_tokens": prefix.asked if prefix else 0,
            "prefix_found_tokens": prefix.found if prefix else 0,
        }

    def _append(self, sequence: Sequence, tokens: list[int]) -> int:
        """The sequence goes on with these tokens, or with the first of them, which end it.  How many they were."""
        before = len(sequence.tokens)
        for token in tokens:
            self.extend(sequence, token)
            if sequence.finish_reason:
                break
        self._holdings.trim(sequence)
        return len(sequence.tokens) - before

    def _next(self, known: dict[Sequence, int]) -> Sequence:
        """Who waits and is to be admitted first, from now on at the front.  known: in pages; looked up once a step."""
        first = self.waiting[0]
        if not self.prefix or len(self.waiting) == 1 or first.cached is not None or first is self._blocked[0]:
            return first
        near = list(islice(self.waiting, LOOKAHEAD))
        patient = next((i for i, sequence in enumerate(near) if sequence.overtaken >= PATIENCE), LOOKAHEAD)
        near = near[: patient + 1]
        for sequence in near:
            if sequence not in known:
                known[sequence] = len(self.prefix.peek(sequence.scope, sequence.tokens[:-1]))
        longest = max(near, key=known.__getitem__)
        for sequence in near[: near.index(longest)]:
            sequence.overtaken += 1
        self.waiting.remove(longest)
        self.waiting.appendleft(longest)
        return longest

    def _admit(self, sequence: Sequence, most: int) -> Chunk | None:
        """The first chunk of a sequence that waits, behind the longest known prefix; None where pages are short."""
        blocked, missing = self._blocked
        if blocked is sequence and missing > self.pool.free:
            return None  # before the prompt is looked up again
        self._holdings.find(sequence)
        chunk = self._holdings.plan(sequence, most)
        if not chunk and self._holdings.do_without_copy(sequence):
            chunk = self._holdings.plan(sequence, most)
        if not chunk:
            self._blocked = sequence, -(-len(sequence.tokens) // self.page_size) - len(sequence.pages)
            self._holdings.release(sequence)
        elif sequence.cached is None:
            sequence.cached = chunk.start
            if self.prefix and not sequence.pooled:
                self.prefix.found += chunk.start
                self.prefix.asked += len(sequence.tokens)
        return chunk

    def _fork(self, parent: Sequence) -> None:
        """Its forks run from here on, right behind it.  Each computes the prompt's last token again, for its logits."""
        at, late = self.running.index(parent) + 1, []
        for child in parent.forks:
            if len(self.running) == self.max_sequences:
                late.append(child)
                continue
            child.cached = len(child.tokens) - 1
            self._holdings.share(child, parent, child.cached)
            self.running.insert(at, child)
            at += 1
        self.waiting.extendleft(reversed(late))
        parent.forks = []

    def _preempt(self) -> None:
        victim = self.running.pop()
        self._holdings.release(victim)
        self.waiting.appendleft(victim)
        self.preemptions += 1

    def _finish(self, sequence: Sequence, reason: str) -> None:
        """End it.  Forks that still wait for its prompt go on: the first takes its place, and its pages."""
        sequence.finish_reason, sequence.decoding = reason, None
        queue = self.running if sequence in self.running else self.waiting
        if not sequence.forks:
            queue.remove(sequence)
            self._holdings.release(sequence)
            return
        heir, *heir.forks = sequence.forks
        heir.pages, heir.computed, heir.settled = sequence.pages, sequence.computed, sequence.settled
        heir.cached = sequence.cached
        sequence.pages, sequence.forks = [], []
        queue[queue.index(sequence)] = heir
