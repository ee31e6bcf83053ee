"""Tokens are bytes, and a grammar may let bytes through that are no text: which tokens keep an answer UTF-8.

XGrammar compiles a class of characters to ranges of bytes; where one spans several lengths, or surrogates, sequences
pass that RFC 3629 forbids.  So beside the grammar each answer goes through the automaton of that RFC's section 4.
"""

from collections.abc import Sequence

import numpy as np

START, DEAD = 0, -1
TAILS = {1: (0x80, 0xBF, START), 2: (0x80, 0xBF, 1), 3: (0x80, 0xBF, 2)}  # state: so many bytes are missing
TAILS |= {4: (0xA0, 0xBF, 1), 5: (0x80, 0x9F, 1), 6: (0x90, 0xBF, 2), 7: (0x80, 0x8F, 2)}  # behind E0, ED, F0, F4
HEADS: tuple[tuple[int, int, int], ...] = (
    (0x00, 0x7F, START),
    (0xC2, 0xDF, 1),
    (0xE0, 0xE0, 4),
    (0xE1, 0xEC, 2),
    (0xED, 0xED, 5),
    (0xEE, 0xEF, 2),
)
HEADS += ((0xF0, 0xF0, 6), (0xF1, 0xF3, 3), (0xF4, 0xF4, 7))
STATES = 8


def after(state: int, text: bytes) -> int:
    """The state behind these bytes: START between characters, 1 to 7 within one, DEAD where they are no UTF-8."""
    for byte in text:
        ways = HEADS if state == START else (TAILS[state],)
        state = next((to for low, high, to in ways if low <= byte <= high), DEAD)
        if state == DEAD:
            return DEAD
    return state


class Characters:
    """The tokens of a vocabulary as bytes.

    masks: int32 [STATES + 1 words], for each state a bit for each token that may follow; the last row has all.
    """

    def __init__(self, tokens: Sequence[bytes], stop: frozenset[int]):
        """stop: tokens that end a text, and may only stand between characters."""
        self._tokens, self._stop = tokens, stop
        words = -(-len(tokens) // 32)
        bits = np.zeros((STATES + 1, words * 32), bool)
        bits[STATES] = True
        for token, text in enumerate(tokens):
            if token in stop or not text or _whole(text):  # so that what begins it is no tail
                bits[START, token] = True
            else:
                bits[:STATES, token] = [after(state, text) != DEAD for state in range(STATES)]
        self.masks = np.packbits(bits, axis=1, bitorder="little").view(np.int32)

    def after(self, state: int, token: int) -> int:
        """The state behind a token that may follow."""
        text = b"" if token in self._stop else self._tokens[token]
        return START if state == START and _whole(text) else after(state, text)


def _whole(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
