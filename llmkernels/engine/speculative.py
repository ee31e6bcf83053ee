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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from llmkernels.engine.forward import Forward
from llmkernels.engine.guesses import NGrams, Way
from llmkernels.engine.layout import Layout
from llmkernels.engine.params import check
from llmkernels.engine.sampling import Answer, Chosen, adjusted
from llmkernels.engine.sequence import Chunk
from llmkernels.engine.sequence import Sequence as Request
from llmkernels.structured.masks import Masks

MOST_GUESSES = 31  # with the chunk's token they are the 32 bits of one word of the tree's mask


@dataclass(frozen=True)
class Speculation:
    """What to guess.  Wrong values raise ValueError.

    draft: the directory of a checkpoint with the same vocabulary; None: no draft model.
    ngram: how many last tokens, at most, are looked up in the text so far; 0: none.
    depth: how many tokens in a row are guessed.
    width: 1 guesses one token at each place; more: also the draft model's next choices there, and n-grams beside them.
    confidence: the draft model stops where it gives its likeliest token less than this probability; a guess that comes
        true seldom costs more time, of the draft model and of the verification, than it saves.  0: it never stops.
    """

    draft: str | Path | None = None
    ngram: int = 0
    depth: int = 4
    width: int = 1
    confidence: float = 0.0

    def __post_init__(self) -> None:
        check("speculation: confidence", self.confidence, float, 0, 1)
        for name, low, high in (("ngram", 0, 8), ("depth", 1, 16), ("width", 1, 8)):
            check(f"speculation: {name}", getattr(self, name), int, low, high)
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
        self.tokens = [*answer.tokens, *guesses]


def ahead(chunk: Chunk, node: int) -> "Answer | Ahead":
    """The chunk's answer after guess `node`."""
    answer: Answer = chunk.sequence.payload
    return answer if node < 0 else Ahead(answer, [chunk.guesses[i] for i in chunk.path(node)])


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


class Speculator:
    """Guesses for the chunks of a step.

    draft: the draft model and its keys, in the same pages as the model's own.  Like those they are there for `settled`
        tokens of a sequence, and for guesses that it had read and that came true; what lies behind is read again, with
        this step's chunk, in the first pass.

    guessed, accepted: tokens guessed, and those that came true, since the start.
    """

    def __init__(self, wish: Speculation, draft: Forward | None = None):
        self.wish, self.draft = wish, draft
        self.guessed = self.accepted = 0
        self._read: list[tuple[Chunk, list[int]]] = []  # the guesses that the draft model has read, in this step

    def propose(self, chunks: Sequence[Chunk]) -> None:
        """Fill in the guesses of every chunk that has room: under a grammar a chain that it allows.

        There is none behind which the grammar forces text: plain decoding asks the model nothing there.
        """
        small = all(chunk.count + chunk.room <= MOST_GUESSES + 1 for chunk in chunks)
        roomy = [chunk for chunk in chunks if chunk.room]
        tree = self.wish.width > 1 and small and not any(chunk.sequence.payload.guide for chunk in roomy)
        found = {id(chunk): self._lookup(chunk) for chunk in roomy} if self.wish.ngram else {}
        if self.draft:
            width = self.wish.width if tree else 1
            self._by_draft(chunks, [c for c in roomy if width > 1 or not found.get(id(c))], width)
        for chunk in roomy:
            if tree or not chunk.guesses:
                node: int | None = -1
                for token in found.get(id(chunk), ()):
                    node = None if node is None else chunk.guess(node, token)
            if guide := chunk.sequence.payload.guide:
                allowed = guide.allowed(chunk.guesses, chunk.sequence.payload.params.jumps)
                chunk.guesses, chunk.parents = chunk.guesses[:allowed], chunk.parents[:allowed]

    def count(self, chunks: Sequence[Chunk]) -> None:
        """The step ran: keep the score, and which guesses' keys the draft model has."""
        for chunk in chunks:
            self.guessed += len(chunk.guesses)
            self.accepted += len(chunk.accepted)
        for chunk, read in self._read:
            agreed = takewhile(lambda pair: pair[0] == pair[1], zip(chunk.accepted, read, strict=False))
            chunk.sequence.drafted = chunk.start + chunk.count + len([*agreed])
        self._read = []

    def _lookup(self, chunk: Chunk) -> list[int]:
        request: Request = chunk.sequence
        if request.memory is None:
            request.memory = NGrams(self.wish.ngram)
        return request.memory.guess(request.tokens, min(self.wish.depth, chunk.room))

    def _by_draft(self, chunks: Sequence[Chunk], wanted: Sequence[Chunk], width: int) -> None:
        """Guesses of the draft model for those wanted: one pass a token, of which the first reads all chunks."""
        assert self.draft
        if copies := [chunk.copy for chunk in chunks if chunk.copy]:
            self.draft.cache.copy(copies)
        names, behind = {id(chunk) for chunk in wanted}, []
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            start = max(sequence.settled, min(sequence.drafted, chunk.start))
            behind.append(Chunk(sequence, start, end - start, id(chunk) in names))
        size, vocab = self.draft.cache.page_size, self.draft.model.config.vocab
        layout, ways = Layout.of(behind, size), [Way(chunk) for chunk in wanted]
        self._read, pages = [(way.chunk, way.tokens) for way in ways], layout.pages
        every = ways
        for depth in range(self.wish.depth):
            masks = Masks.begin([way.guide for way in ways], vocab)
            logits = self.draft.logits(layout)
            if not ways:
                break
            logits = adjusted(logits, [ahead(way.chunk, way.node) for way in ways])
            stuck = masks.forbid(logits) if masks else []
            values, best = logits.topk(min(width, vocab))
            if self.wish.confidence:
                sure = (values[:, 0] - logits.logsumexp(1) >= math.log(self.wish.confidence)).tolist()
            else:
                sure = [True] * len(ways)
            choices = zip(ways, best.tolist(), sure, strict=True)
            ways = [w for w, tokens, certain in choices if certain and w.guide not in stuck and w.take(tokens)]
            if depth + 1 == self.wish.depth or not ways:
                break
            placed = {way.chunk.sequence.row: way.read(size) for way in ways}
            layout = Layout.one_each(len(chunks), pages, placed)
        for way in every:
            way.close()
