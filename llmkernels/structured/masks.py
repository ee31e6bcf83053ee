"""Which tokens may come next: where an answer stands in its grammar, and the masks of a batch, filled on a thread.

Masks.begin(guides) -> the forward pass -> choose(logits, answers, masks) -> Guide.accept(token) -> Guide.forced()
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import tokenizers
import torch

MISSING = "structured answers need XGrammar: pip install 'llmkernels[grammar]'"


class Guide:
    """Where one answer stands in its grammar."""

    def __init__(self, grammar: Any, stop: frozenset[int], tokenizer: tokenizers.Tokenizer):
        """stop: tokens that may end the text where the grammar is complete."""
        self.matcher = library().GrammarMatcher(grammar, override_stop_tokens=sorted(stop))
        self._tokenizer = tokenizer

    def accept(self, token: int) -> None:
        """The answer goes on with this token, one that the mask allowed."""
        if not self.matcher.accept_token(token):
            raise RuntimeError(f"token {token} was sampled and its grammar does not allow it")

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, in order, the grammar lets follow; nothing changes."""
        count = 0
        while count < len(tokens) and not self.matcher.is_terminated() and self.matcher.accept_token(tokens[count]):
            count += 1
        if count:
            self.matcher.rollback(count)
        return count

    def fill(self, bits: torch.Tensor, row: int, draft: Sequence[int]) -> None:
        """Fill one row of masks with what may come next, and one more after each token of a draft.

        After a token that the grammar does not allow everything is: its own mask forbids it, so nobody gets there.
        """
        self.matcher.fill_next_token_bitmask(bits, row)
        taken = self.allowed(draft)
        for i, token in enumerate(draft[:taken], row + 1):
            self.matcher.accept_token(token)
            if self.matcher.is_terminated():
                bits[i].fill_(-1)
            else:
                self.matcher.fill_next_token_bitmask(bits, i)
        bits[row + 1 + taken : row + 1 + len(draft)].fill_(-1)
        if taken:
            self.matcher.rollback(taken)

    def forced(self) -> list[int]:
        """Tokens of the text that must follow, without the last one: what comes after it may be one token with it.

        Without them the model would be asked for each, and could only choose how to cut the text.
        """
        try:
            text = self.matcher.find_jump_forward_string()
        except UnicodeDecodeError:  # the first bytes of a character whose last ones are free
            return []
        if len(text) < 2:
            return []
        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids[:-1]
        return tokens[: self.allowed(tokens)]


class Masks:
    """The tokens that the grammars of a batch allow next, computed aside."""

    def __init__(self, rows: list[int], bits: torch.Tensor, filled: "Future[None]"):
        self._rows, self._bits, self._filled = rows, bits, filled

    @classmethod
    def begin(
        cls, guides: Sequence[Guide | None], vocab: int, drafts: Sequence[Sequence[int]] | None = None
    ) -> "Masks | None":
        """Start to fill those of one batch, whose rows without a guide are free; None where all are.

        drafts: tokens after which the logits are computed as well; each has a row, behind that of its guide.
        """
        if not any(guides):
            return None
        drafts = drafts or [()] * len(guides)
        firsts = [*accumulate((1 + len(draft) for draft in drafts), initial=0)]
        bound = [i for i, guide in enumerate(guides) if guide]
        rows = [row for i in bound for row in range(firsts[i], firsts[i + 1])]
        bits = torch.empty(len(rows), -(-vocab // 32), dtype=torch.int32)
        matchers = [guide.matcher for guide in guides if guide]
        if len(rows) == len(matchers):
            filled = _thread().submit(_filler().batch_fill_next_token_bitmask, matchers, bits)
        else:
            work = [(guide, draft) for guide, draft in zip(guides, drafts, strict=True) if guide]
            filled = _thread().submit(_fill, work, bits)
        return cls(rows, bits, filled)

    def forbid(self, logits: torch.Tensor) -> None:
        """Set what is not allowed to -inf, in place.  logits: [rows vocab]."""
        self._filled.result()
        vocab, rows = logits.shape[1], self._rows
        if logits.device.type == "cpu":
            flags = np.unpackbits((~self._bits).numpy().view(np.uint8), axis=1, bitorder="little")
            forbidden = torch.from_numpy(flags.view(np.bool_))[:, :vocab]
        else:
            shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
            forbidden = (self._bits.to(logits.device)[:, :, None] >> shifts & 1 == 0).flatten(1)[:, :vocab]
        if len(rows) == len(logits):
            logits.masked_fill_(forbidden, -torch.inf)
        else:
            logits[rows] = logits[rows].masked_fill_(forbidden, -torch.inf)


def _fill(work: list[tuple[Guide, Sequence[int]]], bits: torch.Tensor) -> None:
    row = 0
    for guide, draft in work:
        guide.fill(bits, row, draft)
        row += 1 + len(draft)


@cache
def library() -> Any:
    try:
        import xgrammar
    except ImportError:
        raise ValueError(MISSING) from None
    return xgrammar


@cache
def _filler() -> Any:
    return library().BatchGrammarMatcher(max_threads=1)


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="llmkernels masks")
