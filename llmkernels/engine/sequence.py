"""What the scheduler moves: a request while it is alive, and the part of it that runs in a step.  Plain data."""

from collections.abc import Hashable
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False, slots=True)
class Sequence:
    """One request while it is alive.

    tokens: the prompt, and what was generated since.
    prompt_length: how many of them are the prompt.
    limit: how many tokens there may be at most, prompt included.
    stop: token ids that end the text.
    scope: what its keys depend on besides its tokens; see PrefixCache.
    forks: sequences with the same prompt that start from this one's pages once the prompt is computed.
    adapter: which of the loaded adapters it runs with; -1: none.
    payload: the caller's, untouched.
    plain: no guesses are made behind its tokens.
    memory: what speculation knows of its tokens; see NGrams.
    pooled: who takes its tokens' hidden states, so that each is computed, whatever the prefix cache has; None: nobody.
    computed: the first so many tokens have their keys and values in pages.
    settled: so many of them were tokens before their step ran, not guesses that came true in it; a draft model has the
        keys of these too, so their pages may be found by others.
    drafted: a draft model has the keys of so many where guesses came true that it had read; of `settled` in any case.
    pages: ids of its pages, in order; token i is in pages[i // page_size].
    decoding: its chunk of one token, used in step after step: a thousand new ones take longer than the rest of a step.
    row, written: its place in the block table, and how many of its pages stand there as they are; see BlockTable.
    cached: how many tokens' keys were there when it first ran.  None: it has not run yet.
    overtaken: how many that came later were admitted before it.
    finish_reason: None while alive, then 'stop' (a token of `stop`), 'length' (the limit), or what `end` was told.
    """

    tokens: list[int]
    prompt_length: int
    limit: int
    stop: frozenset[int] = frozenset()
    scope: Hashable = None
    forks: "list[Sequence]" = field(default_factory=list)
    adapter: int = -1
    payload: Any = None
    plain: bool = False
    memory: Any = None
    pooled: Any = None
    computed: int = 0
    settled: int = 0
    drafted: int = 0
    pages: list[int] = field(default_factory=list)
    decoding: "Chunk | None" = None
    row: int = -1
    written: int = 0
    cached: int | None = None
    overtaken: int = 0
    finish_reason: str | None = None


@dataclass(eq=False, slots=True)
class Chunk:
    """Tokens start to start + count of a sequence run in this step.

    samples: they end it, so a new token follows.
    copy: a page whose keys must be copied before the step runs, and the page they go to; None: no copy.
    room: how many guesses may follow the chunk; its sequence has pages for them.
    guesses, parents: up to `room` tokens that may follow, filled in before the step runs.  A guess continues the guess
        at parents[i] < i, or the chunk where that is -1; so they are a chain, or a tree.
    accepted: the guesses that came true, in order, filled in when it has run.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    copy: tuple[int, int] | None = None
    room: int = 0
    guesses: Row[int] = ()
    parents: Row[int] = ()
    accepted: Row[int] = ()

    def guess(self, parent: int, token: int) -> int | None:
        """Put a token behind guess `parent` (-1: the chunk), once.  Its number; None where there is no room."""
        for i, known in enumerate(zip(self.parents, self.guesses, strict=True)):
            if known == (parent, token):
                return i
        if len(self.guesses) == self.room:
            return None
        self.guesses, self.parents = [*self.guesses, token], [*self.parents, parent]
        return len(self.guesses) - 1

    def path(self, node: int) -> list[int]:
        """The numbers of the guesses from the chunk to guess `node`."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def branches(self) -> bool:
        """Are its guesses more than a chain?"""
        return any(parent != i - 1 for i, parent in enumerate(self.parents))
