"""Text -> token ids, where much of the text was encoded before: a chat sends all that was said with every turn.

A tree over blocks of text remembers the ids up to a cut in each.  Behind the last known cut the text is encoded anew:

    text   | block .........|... block ........|... block |..rest
    cuts             ^ here           ^ here        encoded anew from here on

That gives the very ids of the whole text where words are found from left to right and each is encoded by itself.  At a
cut a word ends, a letter or digit, and a space or a new line follows.  So whoever looked for that word, or for one
before it, looked no further than AHEAD characters behind the cut, which all lie in the block.  A tokenizer that is not
known to be of that kind encodes every text whole.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import tokenizers

BLOCK = 64  # characters
MOST_BLOCKS = 16384  # remembered at once: then everything is forgotten
AHEAD = 4  # characters: the longest contraction that patterns look for is 'll, and the space behind a space


@dataclass(slots=True)
class Node:
    """A block.

    cut: where text is encoded anew behind it, in characters of the whole text.  ids: from the cut before to this one.
    """

    cut: int
    ids: list[int]
    after: "dict[str, Node]" = field(default_factory=dict)


class Encoder:
    """Encodes texts with a tokenizer, the special tokens that it puts before a prompt included."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        content = json.loads(tokenizer.to_str())
        self._ahead = max((len(token["content"]) for token in content["added_tokens"]), default=0) + AHEAD
        self._remembers = _from_left_to_right(content)
        self._root, self._blocks = Node(0, []), 0

    def encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(text[error.start]):04X}"
            raise ValueError(f"the prompt holds half a surrogate pair, {half} at {error.start}: no character") from None
        if not self._remembers or len(text) < BLOCK:
            return self._tokenizer.encode(text).ids
        node, known, ids = self._root, 0, list[int]()
        while (child := node.after.get(text[known : known + BLOCK])) is not None:
            node, known = child, known + BLOCK
            ids += child.ids
        rest = self._tokenizer.encode(text[node.cut :], add_special_tokens=not node.cut)
        if self._blocks > MOST_BLOCKS:
            self._root, self._blocks = Node(0, []), 0
        else:
            self._remember(text, node, known, rest)
        return ids + rest.ids

    def _remember(self, text: str, node: Node, known: int, rest: Any) -> None:
        """The whole blocks of a text from `known` on; `rest` is what lies behind the node's cut."""
        ids, start, taken = rest.ids, node.cut, 0
        for begin in range(known, len(text) - BLOCK + 1, BLOCK):
            cut, upto = node.cut, taken
            for place in range(begin + BLOCK - self._ahead, max(node.cut, begin), -1):
                if text[place] in " \n" and text[place - 1].isalnum():
                    token = rest.char_to_token(place - start)
                    if token and rest.token_to_chars(token)[0] == place - start and _between_words(rest, token):
                        cut, upto = place, token
                        break
            node.after[text[begin : begin + BLOCK]] = child = Node(cut, ids[taken:upto])
            node, taken = child, upto
            self._blocks += 1


def _between_words(encoding: Any, token: int) -> bool:
    return bool(encoding.token_to_word(token) != encoding.token_to_word(token - 1))


def _from_left_to_right(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json finds words in order, encodes each by itself, and puts nothing behind a text."""
    model, steps, ends = content["model"], content["pre_tokenizer"] or {}, content["post_processor"] or {}
    steps, ends = steps.get("pretokenizers", [steps]), ends.get("processors", [ends])
    return (
        content["normalizer"] is None
        and not (content.get("truncation") or content.get("padding"))
        and model["type"] == "BPE"
        and not model.get("dropout")
        and not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in content["added_tokens"])
        and all(end.get("type", "ByteLevel") == "ByteLevel" or "Sequence" in end["single"][-1] for end in ends)
        and all(_looks_ahead_little(step) for step in steps)
    )


def _looks_ahead_little(step: dict[str, Any]) -> bool:
    """Whether a step of the pre-tokenizer splits as described above: GPT-2's pattern, or one that is made like it."""
    if step.get("type") == "ByteLevel":
        return not step["add_prefix_space"]
    pattern = step.get("pattern", {}).get("Regex", "(?<")
    plain = pattern.replace(r"\s+(?!\S)", "").replace("(?i:", "(").replace("(?:", "(")
    return (
        step.get("type") == "Split"
        and step["behavior"] == "Isolated"
        and not step["invert"]
        and not any(mark in plain for mark in ("(?", "\\b", "\\B", "\\G", "\\K", "\\A", "\\z", "\\Z", "$", "^(", "."))
    )
