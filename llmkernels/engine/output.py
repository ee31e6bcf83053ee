"""What comes back: an Output for each answer, and the Deltas by which it grows."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkernels.engine.params import SamplingParams
from llmkernels.engine.sampling import Chosen
from llmkernels.engine.sequence import Sequence as Request
from llmkernels.models.tokenizer import Detokenizer, StopStrings
from llmkernels.structured.masks import Guide


@dataclass(eq=False)
class Output:
    """One answer to a request and what became of it so far; finished when finish_reason is set.

    prompt_tokens: the ids of the prompt, as the model read them.
    index: which of the params.n answers it is, from 0.
    params, seed: how it is sampled; the seed is the one drawn where params name none.
    tokens: the ids generated, a stop token included.
    text: of `tokens`, without special tokens, without the stop token or string, without the bytes of an unfinished
        character, and, until finished, without what may turn out to be a stop string.  Empty where the LLM has no
        tokenizer.
    logprobs: ln p of each of `tokens`, if params.logprobs.
    top_logprobs: for each of `tokens`, the params.top_logprobs likeliest ids and their ln p, the likeliest first.
    score: the sum of ln p of `tokens`, where params need it: for logprobs, or to choose among best_of answers.
    arrived: time.monotonic() when it was asked for.
    guide: where it stands in params.structure.
    finish_reason: None (unfinished), 'stop' (a stop token or string), 'length' (max_tokens or the context), 'abort', or
        'error', where `error` says which.
    """

    prompt_tokens: list[int]
    params: SamplingParams
    seed: int
    index: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Mapping[int, float]] = field(default_factory=list)
    score: float = 0.0
    arrived: float = field(default_factory=time.monotonic)
    guide: Guide | None = field(default=None, repr=False, kw_only=True)
    _sequence: Request = field(repr=False, kw_only=True)
    _detokenizer: Detokenizer | None = field(default=None, repr=False, kw_only=True)
    _stops: StopStrings = field(repr=False, kw_only=True)

    @property
    def finish_reason(self) -> str | None:
        return self._sequence.finish_reason

    @property
    def error(self) -> str:
        """Why the answer could not be given to its end; empty where it could."""
        failed = self.guide.failed if self.guide and self.finish_reason == "error" else ""
        return failed and f"after {len(self.tokens)} tokens of the answer {failed}"

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the prompt had their keys in the cache when the request first ran."""
        return self._sequence.cached or 0

    @property
    def embedding(self) -> list[float]:
        """The mean of the prompt's hidden states, of length 1; RuntimeError where params.embed did not ask for it."""
        if self._sequence.pooled is None or self.finish_reason not in ("length", "stop"):
            raise RuntimeError("there is no embedding; ask for one with SamplingParams(embed=True), and let it finish")
        return list(self._sequence.pooled.mean())

    def _receive(self, chosen: Chosen, reason: str | None) -> bool:
        """Take the next token in, with which the text ends if there is a reason; True where a stop string ends it."""
        self.tokens.append(chosen.token)
        if chosen.logprob is not None:
            self.score += chosen.logprob
            if self.params.logprobs:
                self.logprobs.append(chosen.logprob)
        if chosen.top:
            self.top_logprobs.append(chosen.top)
        if not self._detokenizer:
            return False
        piece = "" if reason == "stop" else self._detokenizer.push(chosen.token)
        piece, ended = self._stops.push(piece)
        self.text += piece if ended or not reason else piece + self._stops.flush()
        return ended

    def _forced(self) -> list[int]:
        """Tokens that its grammar leaves no choice about, where they may do without a step."""
        return self.guide.forced() if self.guide and self.params.jumps and not self.finish_reason else []


def best(outputs: Sequence[Any]) -> list[Any]:
    """Of the finished answers to one prompt, with their params, tokens and score, the params.n that were asked for.

    Of more, params.best_of, those whose tokens have the highest ln p on average, the best first.
    """
    params = outputs[0].params
    if len(outputs) == params.n:
        return [*outputs]
    return sorted(outputs, key=lambda output: -output.score / max(1, len(output.tokens)))[: params.n]


@dataclass(frozen=True)
class Delta:
    """What an output has grown by: joined texts give output.text, joined tokens output.tokens.

    start: where `tokens` begin among the output's.
    finish_reason: as of this delta, which is the output's last one where it is set.
    """

    text: str
    start: int
    tokens: list[int]
    finish_reason: str | None
    output: Output


class Feed:
    """Outputs that somebody follows, and how much of each was told; false when all are told to their ends."""

    def __init__(self, outputs: Iterable[Output]):
        self._told = dict.fromkeys(outputs, (0, 0))

    def __bool__(self) -> bool:
        return bool(self._told)

    def news(self) -> Iterator[Delta]:
        """What is new since it was last asked.  Pieces are whole characters; the last one may be empty."""
        for output, (characters, tokens) in [*self._told.items()]:
            reason = output.finish_reason
            if reason or len(output.text) > characters:
                self._told[output] = len(output.text), len(output.tokens)
                if reason:
                    del self._told[output]
                yield Delta(output.text[characters:], tokens, output.tokens[tokens:], reason, output)
