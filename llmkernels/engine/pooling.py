"""Embeddings: the mean of a prompt's hidden states behind the last norm, gathered chunk by chunk.

A request for one is a request like others, with max_tokens=1: it waits for its turn, runs in chunks beside those that
decode, and loses its pages to older ones where they are short.  It finds no cached prefix, which has keys and no hidden
states; its own keys are found by those that come later.
"""

from collections.abc import Sequence

import torch

from llmkernels.engine.sequence import Chunk


class Mean:
    """Of one sequence: takes its tokens' hidden states in order, from token 0 again where it lost its pages."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: torch.Tensor | None = None

    def take(self, start: int, hidden: torch.Tensor) -> None:
        """hidden [tokens hidden]: those from token `start` on."""
        if start == 0:
            self.count, self._sum = 0, None
        if start != self.count:
            raise RuntimeError(f"hidden states from token {start} on, behind {self.count}")
        added = hidden.float().sum(0)
        self._sum = added if self._sum is None else self._sum + added
        self.count += len(hidden)

    def mean(self) -> list[float]:
        """Divided by its length, so that a dot product of two is the cosine between them."""
        assert self._sum is not None
        return [*torch.nn.functional.normalize(self._sum, dim=0).tolist()]


def deliver(chunks: Sequence[Chunk], hidden: torch.Tensor) -> None:
    """Give each sequence that wants them its tokens' hidden states.  hidden: of a step's tokens."""
    ordered = sorted(chunks, key=lambda chunk: chunk.sequence.row)
    parts = hidden.split([chunk.count + len(chunk.guesses) for chunk in ordered])
    for chunk, part in zip(ordered, parts, strict=True):
        if chunk.sequence.pooled:
            chunk.sequence.pooled.take(chunk.start, part[: chunk.count])
