"""Text -> token ids, and back one token at a time, through the `tokenizers` library."""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from llmkernels.models.files import CheckpointError, read_json

CONTEXT = 6  # tokens decoded again with each new one: what a byte or a space means depends on its neighbours
MOST_HELD = 24  # tokens that may wait for the end of a character: far more than it has bytes, so they have none
BROKEN = "\ufffd"  # what bytes that are no whole character decode to


def read_tokenizer(model: Path, wish: bool | str | Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of the checkpoint in `model` (True), of a tokenizer.json (its path), or none (False)."""
    if wish is False:
        return None
    file = model / "tokenizer.json" if wish is True else Path(wish)
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing; give tokenizer=<path of a tokenizer.json>, or tokenizer=False to use token ids"
        )
    content = read_json(file)
    if not isinstance(content.get("model"), dict) or not isinstance(content.get("added_tokens"), list):
        raise CheckpointError(f"{file} lacks model or added_tokens; it must be as the tokenizers library writes it")
    return tokenizers.Tokenizer.from_str(json.dumps(content))


class Detokenizer:
    """The text of one answer, piece by piece.  A piece waits until its last character is whole."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt: list[int]):
        self._tokenizer = tokenizer
        self._shown = ""
        self._keep(prompt)

    def push(self, token: int) -> str:
        """The text that this token adds; empty while bytes of a character are missing."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if text.endswith(BROKEN) and len(self._window) < MOST_HELD:
            return ""
        piece = text[len(self._shown) :]
        self._keep(self._window)
        if text.endswith(BROKEN):  # bytes that are no text, without end: each is decoded a few times, not every time
            self._shown = self._tokenizer.decode(self._window)
        return piece

    def _keep(self, tokens: list[int]) -> None:
        self._window = tokens[-CONTEXT:]
        self._shown = self._tokenizer.decode(self._window).rstrip(BROKEN)


class StopStrings:
    """Ends a text before the first of some strings.  What may be the beginning of one is held back until it is not."""

    def __init__(self, strings: Sequence[str]):
        self._strings = strings
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that can be shown after this piece, and whether it ended there."""
        text, self._held = self._held + piece, ""
        found = [at for at in (text.find(string) for string in self._strings) if at >= 0]
        if found:
            return text[: min(found)], True
        for start in range(max(0, len(text) - max(map(len, self._strings), default=0) + 1), len(text)):
            if any(string.startswith(text[start:]) for string in self._strings):
                self._held = text[start:]
                return text[:start], False
        return text, False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text
