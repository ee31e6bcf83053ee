"""Which tokens may come next: where an answer stands in its grammar, and the masks of a batch, filled on a thread.

    Masks.begin(guides) -> the forward pass -> choose(logits, answers, masks) -> Guide.accept(token) -> Guide.forced()

A grammar that lets nothing follow, or that takes too long to say what may, fails: its answer ends there, and those
beside it go on.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import tokenizers
import torch

from llmkernels.structured.utf8 import START, STATES, Characters

MISSING = "structured answers need XGrammar: pip install 'llmkernels[grammar]'"
SECONDS, SECONDS_A_TOKEN = 0.5, 0.005  # that an answer may hold the others up in all: a fixed part, and for each token
LOOKS = 5  # while a mask is waited for: a process that is stopped for a while misses one of them, not all

SLOW = "its grammar takes too long to say what may follow"


class Guide:
    """Where one answer stands in its grammar.

    failed: why it cannot go on; empty while it can.
    """

    def __init__(self, grammar: Any, stop: frozenset[int], tokenizer: tokenizers.Tokenizer, characters: Characters):
        """stop: tokens that may end the text where the grammar is complete."""
        self.matcher = library().GrammarMatcher(grammar, override_stop_tokens=sorted(stop))
        self.failed = ""
        self.characters = characters
        self._tokenizer = tokenizer
        self._states = [START]  # of UTF-8, behind each token
        self._left = SECONDS

    def accept(self, token: int) -> bool:
        """The answer goes on with this token; False, and nothing changes, where it may not."""
        began = time.thread_time()
        if not self.go_on(token):
            self.failed = self.failed or f"no token may follow, and {token} was sampled"
            return False
        del self._states[:-1]
        self._left += SECONDS_A_TOKEN
        self._spend(began)
        return True

    def go_on(self, token: int) -> bool:
        """Go on with a guess, for a while; False, and nothing changes, where it may not follow."""
        if self.ended:
            return False
        state = self.characters.after(self._states[-1], token)
        if state < 0 or not self.matcher.accept_token(token):
            return False
        self._states.append(state)
        return True

    def go_back(self, count: int) -> None:
        """Take back the last so many guesses."""
        if count:
            self.matcher.rollback(count)
            del self._states[-count:]

    @property
    def ended(self) -> bool:
        """Did it end with the last token?"""
        return bool(self.matcher.is_terminated())

    def allowed(self, tokens: Sequence[int], jumps: bool = False) -> int:
        """How many of these tokens, in order, may follow; nothing changes.

        jumps: as guesses, for an answer that takes what `forced` says: none that is followed by that, or comes later.
        """
        count = useful = 0
        while count < len(tokens) and self.go_on(tokens[count]):
            count += 1
            if jumps and not self.ended and self.forced():
                break
            useful = count
        self.go_back(count)
        return useful

    def fill(self, bits: torch.Tensor, first: int, draft: Sequence[int]) -> list[int]:
        """Fill a row of masks with what the grammar lets follow, and one more after each token of a draft.

        Returns the states of UTF-8 there, STATES where the row was left alone: behind a token that may not follow or
        that ends the text nobody gets.
        """
        began, states = time.thread_time(), [STATES] * (1 + len(draft))
        for i in range(1 + len(draft)):
            if self.ended:
                break
            self.matcher.fill_next_token_bitmask(bits, first + i)
            states[i] = self._states[-1]
            if i == len(draft) or not self.go_on(draft[i]):
                break
        self.go_back(i)
        self._spend(began)
        return states

    def forced(self) -> list[int]:
        """Tokens of the text that must follow, without the last one: what comes after it may be one token with it.

        Without them the model would be asked for each, and could only choose how to cut the text.
        """
        began = time.thread_time()
        try:
            text = self.matcher.find_jump_forward_string()
        except UnicodeDecodeError:  # the first bytes of a character whose last ones are free
            return []
        if len(text) < 2:
            return []
        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids[:-1]
        tokens = tokens[: self.allowed(tokens)]
        self._spend(began)
        return tokens

    def _spend(self, began: float) -> None:
        self._left -= time.thread_time() - began
        if self._left < 0:
            self.failed = SLOW


class Masks:
    """The tokens that the grammars of a batch allow next, computed aside."""

    def __init__(self, work: list[tuple[Guide, Sequence[int]]], rows: list[int], vocab: int):
        """work: guides and drafts.  rows: those of the logits that they mask, in order."""
        self._work, self._rows = work, rows
        self._bits = torch.full((len(rows), -(-vocab // 32)), -1, dtype=torch.int32)
        self._states: list[int] = []  # of UTF-8, row by row, of those that had their turn
        self._turn = 0
        self._filled = _aside().submit(self._fill)

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
        rows = [row for i, guide in enumerate(guides) if guide for row in range(firsts[i], firsts[i + 1])]
        return cls([(guide, draft) for guide, draft in zip(guides, drafts, strict=True) if guide], rows, vocab)

    def forbid(self, logits: torch.Tensor) -> list[Guide]:
        """Set what is not allowed to -inf, in place.  logits: [rows vocab].

        Returns the guides that let nothing follow; their rows, and those behind such guesses, stay as they are.
        """
        self.wait()
        bits = self._bits.numpy() & self._work[0][0].characters.masks[self._states]
        stuck = []
        if len(empty := np.flatnonzero(~bits.any(1))):
            bits[empty] = -1
            firsts = accumulate((1 + len(draft) for _, draft in self._work), initial=0)
            stuck = [guide for (guide, _), first in zip(self._work, firsts, strict=False) if first in empty]
        forbid(logits, self._rows, bits)
        return stuck

    def _fill(self) -> None:
        bits, states = self._bits, self._states
        for guide, draft in self._work[self._turn :]:
            found = [STATES] * (1 + len(draft)) if guide.failed else guide.fill(bits, len(states), draft)
            if bits is not self._bits:  # it took so long that another thread goes on
                return
            states += found
            self._turn += 1

    def wait(self) -> None:
        """Until all are filled.  Who takes too long fails, and its thread ends when it can; the rest have another."""
        turn, looks = self._turn, 0
        while True:
            try:
                return self._filled.result(SECONDS / LOOKS)
            except TimeoutError:
                looks = looks + 1 if turn == self._turn else 0
                turn = self._turn
            if looks == LOOKS and not self._filled.done():
                guide, draft = self._work[turn]
                guide.failed = SLOW
                self._bits, self._states = self._bits.clone(), [*self._states, *[STATES] * (1 + len(draft))]
                self._turn += 1
                _aside().leave()
                _aside.cache_clear()
                self._filled = _aside().submit(self._fill)


@cache
def library() -> Any:
    try:
        import xgrammar
    except ImportError:
        raise ValueError(MISSING) from None
    return xgrammar


def forbid(logits: torch.Tensor, rows: Sequence[int], bits: np.ndarray) -> None:
    """Set to -inf, in these rows of the logits [rows vocab], what the bits say no to; int32, a row of them for each."""
    vocab = logits.shape[1]
    if logits.device.type == "cpu":
        flags = np.unpackbits((~bits).view(np.uint8), axis=1, bitorder="little")
        forbidden = torch.from_numpy(flags.view(np.bool_))[:, :vocab]
    else:
        shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
        there = torch.from_numpy(bits).to(logits.device)
        forbidden = (there[:, :, None] >> shifts & 1 == 0).flatten(1)[:, :vocab]
    if len(rows) == len(logits):
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        logits[rows] = logits[rows].masked_fill_(forbidden, -torch.inf)


class Aside:
    """A thread that does work, in order; a daemon, for which nobody waits when it is stuck in a grammar."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="llmkernels masks", daemon=True).start()

    def submit(self, work: Callable[[], None]) -> "Future[None]":
        done: Future[None] = Future()
        self._orders.put((work, done))
        return done

    def leave(self) -> None:
        """It ends when its work is done: a native call cannot be interrupted, and whoever waits for one gets none."""
        self._orders.put(None)

    def _run(self) -> None:
        while order := self._orders.get():
            work, done = order
            try:
                done.set_result(work())
            except BaseException as failure:
                done.set_exception(failure)
                if not isinstance(failure, (ValueError, RuntimeError, TypeError)):
                    raise


@cache
def _aside() -> Aside:
    return Aside()
