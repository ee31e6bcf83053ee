"""Deltas -> what OpenAI's clients read: choices, chunks, logprobs, usage."""

import time
import uuid
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer

from llmkernels.models.tokenizer import BROKEN
from llmkernels.server.protocol import PromptDetails, Usage
from llmkernels.server.remote import Answer, Delta
from llmkernels.server.tools import Reader, message, part_of


class Form:
    """The shape of one response: of completions, or of chat.

    name: the model's, as the client knows it.
    calls: the texts hold calls of tools.
    logprobs: they are told, where the answers have them.
    """

    def __init__(self, name: str, tokenizer: Tokenizer | None, chat: bool, calls: bool = False, logprobs: bool = True):
        self._name, self._tokenizer, self._chat, self._calls = name, tokenizer, chat, calls
        self._told = logprobs
        self._readers: dict[int, Reader] = {}
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._begun: set[int] = set()
        self._lengths: dict[int, int] = {}  # of the texts of a choice's tokens so far, for text_offset

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The response that is not streamed; a choice for each answer, numbered as they come."""
        choices = []
        for index, answer in enumerate(answers):
            choice = self._choice(index, answer, 0, len(answer.tokens), answer.finish_reason)
            if self._calls:
                choice["message"] = message(answer.text)
                if answer.finish_reason == "stop" and "tool_calls" in choice["message"]:
                    choice["finish_reason"] = "tool_calls"
            elif self._chat:
                choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
            else:
                choice["text"] = answer.text
            choices.append(choice)
        return self._envelope(choices, whole=True) | {"usage": usage(answers).model_dump()}

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """The chunk that tells of this delta of its choice."""
        end = delta.start + len(delta.tokens)  # the answer may be further than this delta
        choice = self._choice(delta.number, delta.answer, delta.start, end, delta.finish_reason)
        if self._chat:
            role = {} if delta.number in self._begun else {"role": "assistant"}
            self._begun.add(delta.number)
            choice["delta"] = role | (self._called(choice, delta) if self._calls else {"content": delta.text})
        else:
            choice["text"] = delta.text
        return self._envelope([choice], whole=False)

    def _called(self, choice: dict[str, Any], delta: Delta) -> dict[str, Any]:
        """The delta's text as plain text and parts of calls."""
        reader = self._readers.setdefault(choice["index"], Reader())
        found: dict[str, Any] = {}
        for part in map(part_of, reader.push(delta.text, end=delta.finish_reason is not None)):
            if "content" in part:
                found["content"] = found.get("content", "") + part["content"]
            else:
                found.setdefault("tool_calls", []).extend(part["tool_calls"])
        if delta.finish_reason == "stop" and reader.calls:
            choice["finish_reason"] = "tool_calls"
        return found

    def last(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The chunk without choices that ends a stream whose client wants its usage."""
        return self._envelope([], whole=False) | {"usage": usage(answers).model_dump()}

    def _envelope(self, choices: list[dict[str, Any]], whole: bool) -> dict[str, Any]:
        kind = "text_completion" if not self._chat else "chat.completion" if whole else "chat.completion.chunk"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._name, "choices": choices}

    def _choice(self, index: int, answer: Answer, start: int, end: int, reason: str | None) -> dict[str, Any]:
        """Choice `index`, without its text, of tokens start to end."""
        logprobs = self._logprobs(index, answer, start, end)
        why = {"error": answer.error} if reason == "error" else {}
        return {"index": index, "finish_reason": reason, "logprobs": logprobs} | why

    def _logprobs(self, index: int, answer: Answer, start: int, end: int) -> dict[str, Any] | None:
        """Those of tokens start to end, which are the next ones of choice `index`; None where nobody asked."""
        if not answer.params.logprobs or not self._told:
            return None
        tokens, own = answer.tokens[start:end], answer.logprobs[start:end]
        tops = answer.top_logprobs[start:end] if answer.params.top_logprobs else [{} for _ in tokens]
        if self._chat:
            rows = zip(tokens, own, tops, strict=True)
            content = [
                self._entry(token, value) | {"top_logprobs": [self._entry(*pair) for pair in top.items()]}
                for token, value, top in rows
            ]
            return {"content": content, "refusal": None}
        texts = [self._text(token) for token in tokens]
        before = self._lengths.get(index, 0)
        *offsets, self._lengths[index] = accumulate(map(len, texts), initial=before)
        return {
            "tokens": texts,
            "token_logprobs": own,
            "top_logprobs": [{self._text(token): value for token, value in top.items()} for top in tops],
            "text_offset": offsets,
        }

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": value, "bytes": None if BROKEN in text else list(text.encode())}

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False) if self._tokenizer else str(token)


def usage(answers: Sequence[Answer]) -> Usage:
    """Tokens read and written; a prompt counts once, however many answers it has."""
    firsts = [answer for answer in answers if answer.index == 0]
    prompt, written = sum(a.prompt for a in firsts), sum(len(a.tokens) for a in answers)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=written,
        total_tokens=prompt + written,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(a.cached_tokens for a in firsts)),
    )
