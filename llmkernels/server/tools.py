"""Tools: how a model is told of them, how it is held to their schemas, and how its text becomes calls.

A call is written as Hermes 2 Pro and many since write it, https://github.com/NousResearch/Hermes-Function-Calling:

    <tool_call>
    {"name": "NAME", "arguments": {...}}
    </tool_call>

The grammar allows these lines alone, one or more, where tool_choice demands a call, and text around them where it is
'auto'; the arguments satisfy the function's parameters.
"""

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from llmkernels.server.protocol import Tool
from llmkernels.structured import Structure
from llmkernels.structured.schema import enforceable

OPEN, CLOSE = "<tool_call>", "}\n</tool_call>"
HEAD = re.compile(r'<tool_call>\n\{"name": "([\w-]+)", "arguments": ')


def structure(tools: Sequence[Tool], choice: str, parallel: bool) -> Structure:
    """What an answer with these tools may be.

    Args:
        choice: 'auto', 'required', or the name of the one tool to call.
        parallel: more than one call may come.

    Raises:
        ValueError: the parameters of a tool cannot be enforced; with strict=false they are any object.
    """
    tags = []
    for tool in tools:
        function = tool.function
        if choice not in ("auto", "required", function.name):
            continue
        schema: Any = {"type": "object"}
        if function.strict is not False:
            try:
                schema = enforceable({"type": "object"} | (function.parameters or {}))
            except ValueError as error:
                raise ValueError(f"parameters of the tool {function.name!r}: {error}") from None
        content = {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": 1}
        begin = f'{OPEN}\n{{"name": "{function.name}", "arguments": '
        tags.append({"type": "tag", "begin": begin, "content": content, "end": CLOSE})
    several = parallel and choice in ("auto", "required")
    form: dict[str, Any]
    if choice == "auto":
        form = {"type": "triggered_tags", "triggers": [OPEN], "tags": tags}
    else:
        form = {"type": "tags_with_separator", "separator": "\n", "tags": tags, "at_least_one": True}
    return Structure(tags={"type": "structural_tag", "format": form | {"stop_after_first": not several}})


def instructions(tools: Sequence[Tool]) -> str:
    """What a system message says of the tools, for chat templates that say nothing of them."""
    lines = "\n".join(json.dumps(tool.model_dump(exclude_none=True), ensure_ascii=False) for tool in tools)
    call = f'{OPEN}\n{{"name": <function-name>, "arguments": <args-json-object>{CLOSE}'
    return f"You may call these functions:\n<tools>\n{lines}\n</tools>\nA call is written as\n{call}"


class Piece(NamedTuple):
    """Something that a text has grown by: plain text (call is None), or a call's name or arguments."""

    call: int | None
    text: str = ""
    name: str | None = None
    id: str | None = None


class Reader:
    """Turns the text of one answer, in pieces, into plain text and calls."""

    def __init__(self) -> None:
        self.calls = 0
        self._held, self._inside = "", False

    def push(self, text: str, end: bool = False) -> list[Piece]:
        """What this text adds; what may be the beginning of a mark waits for more, unless it is the end."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            read = self._arguments if self._inside else self._text
            if read(pieces, end):
                return pieces

    def _text(self, pieces: list[Piece], end: bool) -> bool:
        at = self._held.find(OPEN)
        plain = self._held[:at] if at >= 0 else self._free(OPEN, end)
        if plain.strip() or (plain and not self.calls):  # the line breaks between calls are no text
            pieces.append(Piece(None, plain))
        self._held = self._held[len(plain) :]
        head = HEAD.match(self._held)
        if not head:
            return True
        pieces.append(Piece(self.calls, name=head[1], id=f"call_{uuid.uuid4().hex[:24]}"))
        self._held, self._inside = self._held[head.end() :], True
        return False

    def _arguments(self, pieces: list[Piece], end: bool) -> bool:
        at = self._held.find(CLOSE)
        text = self._held[:at] if at >= 0 else self._free(CLOSE, end)
        if text:
            pieces.append(Piece(self.calls, text))
        self._held = self._held[len(text) :]
        if at < 0:
            return True
        self._held, self._inside = self._held[len(CLOSE) :], False
        self.calls += 1
        return False

    def _free(self, mark: str, end: bool) -> str:
        """What is held, without an end that may be the beginning of the mark."""
        if end:
            return self._held
        for length in range(min(len(mark) - 1, len(self._held)), 0, -1):
            if self._held.endswith(mark[:length]):
                return self._held[:-length]
        return self._held


def message(text: str) -> dict[str, Any]:
    """The assistant's message that a whole text is."""
    content, calls = "", list[dict[str, Any]]()
    for piece in Reader().push(text, end=True):
        if piece.call is None:
            content += piece.text
        elif piece.name is not None:
            function = {"name": piece.name, "arguments": ""}
            calls.append({"id": piece.id, "type": "function", "function": function})
        else:
            calls[piece.call]["function"]["arguments"] += piece.text
    said = {"role": "assistant", "content": content or None if calls else content, "refusal": None}
    return said | ({"tool_calls": calls} if calls else {})


def part_of(piece: Piece) -> dict[str, Any]:
    """The part of a streamed message that a piece is."""
    if piece.call is None:
        return {"content": piece.text}
    if piece.name is None:
        return {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.text}}]}
    function = {"name": piece.name, "arguments": ""}
    return {"tool_calls": [{"index": piece.call, "id": piece.id, "type": "function", "function": function}]}
