"""Where guesses at the next tokens come from: the text itself, and a draft model."""

from collections.abc import Sequence

from llmkernels.engine.layout import slot
from llmkernels.engine.sequence import Chunk
from llmkernels.structured.masks import Guide


class NGrams:
    """Where the n-grams of one growing text occurred last: prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding"""

    def __init__(self, longest: int):
        self._longest, self._read = longest, 0
        self._next: dict[tuple[int, ...], int] = {}  # an n-gram -> where what followed it begins

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens: what followed the longest known end of the text, and so on from there."""
        for end in range(max(self._read, 1), len(tokens)):
            for n in range(1, min(self._longest, end) + 1):
                self._next[tuple(tokens[end - n : end])] = end
        self._read = len(tokens)
        for n in range(min(self._longest, len(tokens)), 0, -1):
            at = self._next.get(tuple(tokens[-n:]))
            if at is not None:
                period = len(tokens) - at  # where the text itself ends, it goes on as it did
                return [tokens[at + i % period] for i in range(count)]
        return []


class Way:
    """How a draft model goes on behind a chunk: the likeliest guess at each place.

    node: the last one; -1: none yet.
    tokens: those that it has read again.
    """

    def __init__(self, chunk: Chunk):
        self.chunk, self.node, self.tokens = chunk, -1, list[int]()
        self.guide: Guide | None = chunk.sequence.payload.guide
        self._accepted = 0

    def take(self, tokens: Sequence[int]) -> bool:
        """Guess these at the next place; whether it goes on behind the first of them."""
        node, before = self.chunk.guess(self.node, tokens[0]), self.node
        if node is None:
            return False
        for token in tokens[1:]:
            self.chunk.guess(before, token)
        self.node = node
        if self.guide:
            if not self.guide.go_on(tokens[0]):
                return False
            self._accepted += 1
            if self.guide.ended:
                return False
        return len(self.chunk.guesses) < self.chunk.room

    def read(self, page_size: int) -> tuple[int, int, int]:
        """Its last guess for the draft model: token, position, slot."""
        chunk = self.chunk
        token, position = chunk.guesses[self.node], chunk.start + chunk.count + len(self.tokens)
        self.tokens.append(token)
        return token, position, slot(chunk.sequence.pages, position, page_size)

    def close(self) -> None:
        """Its grammar stands again where the answer does."""
        if self.guide:
            self.guide.go_back(self._accepted)
