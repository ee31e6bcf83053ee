"""Structured answers: which tokens may come next, by XGrammar, https://arxiv.org/abs/2411.15100.

A Structure is compiled once (in a process of its own: grammar_process.py) for a tokenizer; each answer walks through
the compiled grammar with a Guide of its own.  Masks are filled on a thread while the model runs:

    Masks.begin(answers) -> the forward pass -> choose(logits, answers, masks) -> Guide.accept(token) -> Guide.forced()
"""

import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import tokenizers
import torch

from llmkernels.engine import grammar_process
from llmkernels.engine.structure import Structure

MOST_KEPT = 256  # compiled grammars
MISSING = "structured answers need XGrammar: pip install 'llmkernels[grammar]'"


class Guide:
    """Where one answer stands in its grammar."""

    def __init__(self, grammar: Any, stop: frozenset[int], tokenizer: tokenizers.Tokenizer):
        """stop: tokens that may end the text where the grammar is complete."""
        self.matcher = _xgrammar().GrammarMatcher(grammar, override_stop_tokens=sorted(stop))
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


class Grammars:
    """Compiles structures for one tokenizer, and keeps the compiled; any thread may call it.

    Args:
        vocab: the width of the logits.
        stop: the checkpoint's end-of-text tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocab: int, stop: frozenset[int]):
        self._tokenizer, self._vocab, self._stop = tokenizer, vocab, stop
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = frozenset(index for index, token in added if token.special)
        self._kept: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._alive: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()  # longer than kept, if in use
        self._process: Any = None
        self._info: Any = None
        self._busy = threading.Lock()

    def guide(self, grammar: Any, stop: frozenset[int]) -> Guide:
        """A new answer's way through a compiled grammar.  stop: tokens that end the texts of its request."""
        return Guide(grammar, self._stop | (stop & self._special), self._tokenizer)

    def compiled(self, structure: Structure) -> Any:
        """The compiled grammar, maybe after seconds.

        Raises:
            ValueError: it does not compile, or takes too long.
        """
        if not self._stop:
            raise ValueError("the checkpoint names no end-of-text token, so no structure could end; use another one")
        with self._busy:
            found = self._alive.get(structure.key)
            if found is None:
                found = self._alive[structure.key] = self._compile(*structure.key)
            self._kept[structure.key] = found
            self._kept.move_to_end(structure.key)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
            return found

    def close(self) -> None:
        """End the process; the next structure starts another."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _compile(self, kind: str, text: str) -> Any:
        xgrammar = _xgrammar()
        if self._info is None:
            self._info = self._tokenizer_info()
        process: Any = self._process
        if process is None or process.poll() is not None:
            command = [sys.executable, "-c", f"from {grammar_process.__name__} import main; main()"]
            process = self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            grammar_process.write(process.stdin, self._info.serialize_json())
        grammar_process.write(process.stdin, [kind, text])
        answer = grammar_process.read(process.stdout)
        if answer is None:
            self.close()
            raise ValueError("the grammar ended the process that compiled it; give a smaller one")
        if "error" in answer:
            raise ValueError(f"the {kind} cannot be enforced: {answer['error']}")
        return xgrammar.CompiledGrammar.deserialize_json(answer["grammar"], self._info)

    def _tokenizer_info(self) -> Any:
        """Special tokens are no text: no grammar allows them."""
        xgrammar = _xgrammar()
        vocab = [""] * self._vocab
        for token, index in self._tokenizer.get_vocab().items():
            if index < self._vocab and index not in self._special:
                vocab[index] = token
        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
        steps = {step["type"] for step in (decoder, *decoder.get("decoders", ())) if step}
        types = xgrammar.VocabType
        plain = types.BYTE_FALLBACK if "ByteFallback" in steps else types.RAW
        kind = types.BYTE_LEVEL if "ByteLevel" in steps else plain
        return xgrammar.TokenizerInfo(vocab, kind, vocab_size=self._vocab, stop_token_ids=sorted(self._stop))


def _fill(work: list[tuple[Guide, Sequence[int]]], bits: torch.Tensor) -> None:
    row = 0
    for guide, draft in work:
        guide.fill(bits, row, draft)
        row += 1 + len(draft)


@cache
def _xgrammar() -> Any:
    try:
        import xgrammar
    except ImportError:
        raise ValueError(MISSING) from None
    return xgrammar


@cache
def _filler() -> Any:
    return _xgrammar().BatchGrammarMatcher(max_threads=1)


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="llmkernels masks")
