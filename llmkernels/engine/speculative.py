"""Speculative decoding: guesses at the next tokens, all verified by one forward pass of the model.

Leviathan et al. 2023, https://arxiv.org/abs/2211.17192; Chen et al. 2023, https://arxiv.org/abs/2302.01318; trees as in
SpecInfer, Miao et al. 2024, https://arxiv.org/abs/2305.09781.  Guesses come from a smaller model with the same
vocabulary, from the text itself (what followed the last tokens when they occurred before), or from both:

    the chunk's token --+-- the --+-- read --+-- call       depth 3: the draft model's choices,
                        |         |          +-- calls      width 2: beside each its runner-up,
                        |         +-- write                 and a path that n-grams found
                        +-- a ------- file

The model samples a token behind the chunk and behind every guess, each with the very number that plain sampling would
use there.  If the first of them was guessed, it is a token, the one behind it is the next candidate, and so on; the
first that nobody guessed ends the step.  So every token is the one that plain sampling draws after the tokens before
it: the same seed gives the same text with speculation as without, as far as roundoff lets a batch of another size do.
It is also the rule of the papers: their q is 1 for a guess that is not drawn, so it is accepted with probability
min(1, p/q) = p, and what replaces it is drawn from p without it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkernels.engine.cache import KVCache
from llmkernels.engine.model import Batch, Model
from llmkernels.engine.sampling import Answer, Chosen, adjusted
from llmkernels.engine.scheduler import Chunk
from llmkernels.engine.scheduler import Sequence as Request

MOST_GUESSES = 31  # with the chunk's token they are the 32 bits of one word of the tree's mask


@dataclass(frozen=True)
class Speculation:
    """What to guess.  Wrong values raise ValueError.

    draft: the directory of a checkpoint with the same vocabulary; None: no draft model.
    ngram: how many last tokens, at most, are looked up in the text so far; 0: none.
    depth: how many tokens in a row are guessed.
    width: 1 guesses one token at each place; more: also the draft model's next choices there, and n-grams beside them.
    """

    draft: str | Path | None = None
    ngram: int = 0
    depth: int = 4
    width: int = 1

    def __post_init__(self) -> None:
        for name, low, high in (("ngram", 0, 8), ("depth", 1, 16), ("width", 1, 8)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"speculation: {name} is {value!r}; give an integer from {low} to {high}")
        if self.draft is None and not self.ngram:
            raise ValueError("speculation: there is neither draft nor ngram; give draft=<path>, ngram=3, or both")
        if self.guesses > MOST_GUESSES:
            raise ValueError(
                f"speculation: depth {self.depth} and width {self.width} are {self.guesses} guesses a step; "
                f"at most {MOST_GUESSES}: lower one"
            )

    @property
    def guesses(self) -> int:
        """How many guesses a sequence has verified in a step at most."""
        beside = self.depth if self.width > 1 and self.draft is not None and self.ngram else 0
        return self.depth * (self.width if self.draft is not None else 1) + beside


class Ahead:
    """An answer as it will be if some guesses come true."""

    def __init__(self, answer: Answer, guesses: Sequence[int]):
        self.params, self.seed, self.prompt_tokens = answer.params, answer.seed, answer.prompt_tokens
        self.guide = answer.guide
        self.tokens: Sequence[int] = Joined(answer.tokens, guesses)


class Joined(Sequence[int]):
    """Two lists, one after the other, without a copy of either."""

    def __init__(self, first: Sequence[int], second: Sequence[int]):
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __iter__(self) -> Iterator[int]:
        yield from self._first
        yield from self._second

    def __getitem__(self, index: Any) -> Any:
        return [*self][index] if isinstance(index, slice) or index < 0 else self._at(index)

    def _at(self, index: int) -> int:
        before = len(self._first)
        return self._first[index] if index < before else self._second[index - before]


def guess(chunk: Chunk, parent: int, token: int) -> int | None:
    """Put a token behind guess `parent` (-1: the chunk), once.  Its number; None where there is no room."""
    for i, (before, known) in enumerate(zip(chunk.parents, chunk.guesses, strict=True)):
        if before == parent and known == token:
            return i
    if len(chunk.guesses) == chunk.room:
        return None
    chunk.guesses, chunk.parents = [*chunk.guesses, token], [*chunk.parents, parent]
    return len(chunk.guesses) - 1


def path(chunk: Chunk, node: int) -> list[int]:
    """The numbers of the guesses from the chunk to guess `node`."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = chunk.parents[node]
    return nodes[::-1]


def branches(chunk: Chunk) -> bool:
    """Are its guesses more than a chain?"""
    return any(parent != i - 1 for i, parent in enumerate(chunk.parents))


def ahead(chunk: Chunk, node: int) -> "Answer | Ahead":
    """The chunk's answer after guess `node`."""
    answer: Answer = chunk.sequence.payload
    return answer if node < 0 else Ahead(answer, [chunk.guesses[i] for i in path(chunk, node)])


def accept(chunk: Chunk, chosen: Sequence[Chosen]) -> tuple[list[Chosen], list[int]]:
    """What was sampled behind the chunk, and behind each guess in turn -> the new tokens, and which guesses they were.

    All but the last of the new tokens were guessed.
    """
    children = {(p, token): i for i, (p, token) in enumerate(zip(chunk.parents, chunk.guesses, strict=True))}
    taken, nodes = [chosen[0]], [-1]
    while (node := children.get((nodes[-1], taken[-1].token))) is not None:
        nodes.append(node)
        taken.append(chosen[node + 1])
    chunk.accepted = [one.token for one in taken[:-1]]
    return taken, nodes[1:]


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


class Speculator:
    """Guesses for the chunks of a step.

    model, cache: the draft model and its keys, in the same pages as the model's own.  Like those they are there for
        `settled` tokens of a sequence; what lies behind is read again, with this step's chunk, in the first pass.

    guessed, accepted, verified: tokens guessed, those that came true, and chunks that had guesses, since the start.
    """

    def __init__(self, wish: Speculation, model: Model | None = None, cache: KVCache | None = None):
        self.wish, self.model, self.cache = wish, model, cache
        self.guessed = self.accepted = self.verified = 0

    def propose(self, chunks: Sequence[Chunk], prepare: Any) -> None:
        """Fill in the guesses of every chunk that has room: under a grammar a chain that it allows."""
        if self.cache is not None and (copies := [chunk.copy for chunk in chunks if chunk.copy]):
            self.cache.copy(copies)
        small = all(chunk.count + chunk.room <= MOST_GUESSES + 1 for chunk in chunks)
        tree = self.wish.width > 1 and small and not any(chunk.sequence.payload.guide for chunk in chunks if chunk.room)
        roomy = [chunk for chunk in chunks if chunk.room]
        found = {id(chunk): self._lookup(chunk) for chunk in roomy} if self.wish.ngram else {}
        if self.model is not None:
            self._draft(chunks, prepare, self.wish.width if tree else 1, found)
        for chunk in roomy:
            if tree or not chunk.guesses:
                node = -1
                for token in found.get(id(chunk), ()):
                    if (next_node := guess(chunk, node, token)) is None:
                        break
                    node = next_node

            if guide := chunk.sequence.payload.guide:
                allowed = guide.allowed(chunk.guesses)
                chunk.guesses, chunk.parents = chunk.guesses[:allowed], chunk.parents[:allowed]

    def count(self, chunks: Sequence[Chunk]) -> None:
        """The step ran: keep the score."""
        for chunk in chunks:
            if chunk.guesses:
                self.verified += 1
                self.guessed += len(chunk.guesses)
                self.accepted += len(chunk.accepted)

    def _lookup(self, chunk: Chunk) -> list[int]:
        request: Request = chunk.sequence
        if request.memory is None:
            request.memory = NGrams(self.wish.ngram)
        return request.memory.guess(request.tokens, min(self.wish.depth, chunk.room))

    def _draft(self, chunks: Sequence[Chunk], prepare: Any, width: int, found: dict[int, list[int]]) -> None:
        """Guess by the draft model, which reads all chunks on the way: one pass a token."""
        assert self.model is not None
        assert self.cache is not None
        wanted = [chunk for chunk in chunks if chunk.room and (width > 1 or not found.get(id(chunk)))]
        behind = []
        for chunk in chunks:
            start, end = chunk.sequence.settled, chunk.start + chunk.count
            behind.append(Chunk(chunk.sequence, start, end - start, chunk in wanted))
        batch = prepare(behind)
        logits = self.model.forward(batch, self.cache)
        rows = [chunk.sequence.row for chunk in wanted]
        nodes = [-1] * len(wanted)
        table, lengths = batch.block_table[rows], batch.seq_lens[rows]
        for depth in range(1, self.wish.depth + 1):
            if not wanted:
                return
            logits = adjusted(logits, [ahead(chunk, node) for chunk, node in zip(wanted, nodes, strict=True)])
            best = logits.topk(min(width, logits.shape[1])).indices.tolist()
            going = []
            for i, (chunk, tokens) in enumerate(zip(wanted, best, strict=True)):
                node = guess(chunk, nodes[i], tokens[0])
                for token in tokens[1:] if node is not None else ():
                    guess(chunk, nodes[i], token)
                if node is not None and depth < self.wish.depth and len(chunk.guesses) < chunk.room:
                    nodes[i] = node
                    going.append(i)
            if not going:
                return
            wanted, nodes = [wanted[i] for i in going], [nodes[i] for i in going]
            table, lengths = table[going], lengths[going] + 1
            logits = self.model.forward(self._one_more(wanted, nodes, table, lengths, batch), self.cache)

    def _one_more(
        self, chunks: list[Chunk], nodes: list[int], table: torch.Tensor, lengths: torch.Tensor, first: Batch
    ) -> Batch:
        """The last guess of each chunk, at the end of its keys: lengths [chunks] of them with this one."""
        assert self.cache is not None
        size, device = self.cache.page_size, table.device
        last = [*zip(chunks, nodes, strict=True)]
        positions = [chunk.start + chunk.count - 1 + len(path(chunk, node)) for chunk, node in last]
        slots = [c.sequence.pages[p // size] * size + p % size for c, p in zip(chunks, positions, strict=True)]
        count = torch.arange(len(chunks) + 1, device=device)
        return Batch(
            tokens=torch.tensor([c.guesses[n] for c, n in last], device=device),
            positions=torch.tensor(positions, device=device),
            slots=torch.tensor(slots, device=device),
            block_table=table,
            seq_lens=lengths,
            cu_seqlens_q=count.int(),
            rows=None,
            max_seqlen_q=1,
            max_seqlen_k=first.max_seqlen_k,
        )
