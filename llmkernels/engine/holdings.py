"""The pages that sequences hold: taken for what they compute, found by prefix, shared with forks, kept, given back.

Pages are shared by sequences that have the same tokens up to there: a prefix found at admission, a page that two
sequences computed at the same time, forks of one prompt.  Who is about to write into a shared page gets a copy first.
Plain data, as the scheduler's; the arrays are KVCache's.
"""

from dataclasses import dataclass

from llmkernels.engine.pages import PagePool
from llmkernels.engine.prefix import PrefixCache
from llmkernels.engine.sequence import Chunk, Sequence

MOST_KNOWN = 8  # tokens that a chunk may bring (a grammar forces them) and have guesses behind them


@dataclass(frozen=True)
class Holdings:
    """What the scheduler does with the pages of a pool.  prefix: where computed keys are looked up; None: nowhere."""

    pool: PagePool
    page_size: int
    prefix: PrefixCache | None

    def find(self, sequence: Sequence) -> None:
        """One without pages gets those of its longest known prefix, its last token aside, which must give logits."""
        if self.prefix and not sequence.pooled:
            sequence.pages, known = self.prefix.match(sequence.scope, sequence.tokens[:-1])
            sequence.computed = sequence.settled = known

    def do_without_copy(self, sequence: Sequence) -> bool:
        """Where what was found ends within a page, which would have to be copied, give that page up."""
        if not (more := sequence.computed % self.page_size):
            return False
        self.pool.give_back([sequence.pages.pop()])
        sequence.computed -= more
        sequence.settled = sequence.computed
        return True

    def plan(self, sequence: Sequence, most: int) -> Chunk | None:
        """The sequence's next chunk, of at most so many tokens; None, and nothing changed, where pages are short.

        Pages are taken for all of its tokens: a prompt once admitted never waits for pages midway.
        """
        pages, start, copy = sequence.pages, sequence.computed, None
        first = start // self.page_size
        split = first < len(pages) and not self.pool.own(pages[first])
        missing = -(-len(sequence.tokens) // self.page_size) - len(pages)
        if missing or split:
            taken = self.pool.take(missing + split)
            if taken is None:
                return None
            if split:
                copy = pages[first], taken.pop()
                self.pool.give_back(copy[:1])
                pages[first] = copy[1]
                sequence.written = min(sequence.written, first)
                sequence.settled = min(sequence.settled, first * self.page_size)  # more when the copy is made
            pages += taken
        count = min(len(sequence.tokens) - start, most)
        return Chunk(sequence, start, count, start + count == len(sequence.tokens), copy)

    def make_room(self, chunk: Chunk, most: int) -> int:
        """Slots for so many guesses behind the chunk, or fewer: where it decodes, and pages are free.  How many."""
        sequence = chunk.sequence
        count = len(sequence.tokens)
        most = min(most, sequence.limit - count - 1)  # a token follows the last guess
        decodes = chunk.count == 1 or (chunk.count <= MOST_KNOWN and chunk.start >= sequence.prompt_length)
        if not (chunk.samples and decodes) or sequence.plain or sequence.forks or most < 1:
            return 0
        missing = -(-(count + most) // self.page_size) - len(sequence.pages)
        sequence.pages += self.pool.take(min(missing, self.pool.free)) or [] if missing > 0 else []
        chunk.room = min(most, len(sequence.pages) * self.page_size - count)
        return chunk.room

    def trim(self, sequence: Sequence) -> None:
        """Give back the pages behind its tokens: there were guesses, and they were wrong."""
        count = -(-len(sequence.tokens) // self.page_size)
        if len(sequence.pages) > count:
            self.pool.give_back(sequence.pages[count:])
            del sequence.pages[count:]
            sequence.written = min(sequence.written, count)

    def keep(self, sequence: Sequence, start: int) -> None:
        """The pages that are full of settled tokens, and were not when those were `start`, may be found by others."""
        assert self.prefix
        pages, size = sequence.pages, self.page_size
        for i in range(start // size, sequence.settled // size):
            before = pages[i - 1] if i else None
            page = self.prefix.add(sequence.scope, before, sequence.tokens[i * size : (i + 1) * size], pages[i])
            if page != pages[i]:
                pages[i] = page
                sequence.written = min(sequence.written, i)

    def share(self, child: Sequence, parent: Sequence, computed: int) -> None:
        """The child goes on behind so many of the parent's tokens, in the same pages."""
        child.computed = child.settled = computed
        child.pages = parent.pages[: -(-computed // self.page_size)]
        self.pool.share(child.pages)

    def release(self, sequence: Sequence) -> None:
        """It gives back its pages; the last settled keys are kept as well, unless another may write behind them."""
        pages, (full, rest) = sequence.pages, divmod(sequence.settled, self.page_size)
        if self.prefix and rest and self.pool.own(pages[full]):
            before = pages[full - 1] if full else None
            tokens = sequence.tokens[full * self.page_size : sequence.settled]
            pages[full] = self.prefix.add(sequence.scope, before, tokens, pages[full])
        self.pool.give_back(pages)
        sequence.pages, sequence.computed, sequence.settled, sequence.drafted, sequence.written = [], 0, 0, 0, 0
