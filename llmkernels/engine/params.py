"""What a request may ask for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkernels.structured import Structure

MOST_ANSWERS = 128  # to one prompt
MOST_LOGPROBS = 20  # of one token


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for.  Wrong values raise ValueError.

    n: how many answers to give; the prompt is computed once for all of them.
    best_of: so many answers are sampled, and `generate` returns the n whose tokens have the highest ln p on average;
        None: n of them.
    max_tokens: how many tokens to generate at most; the context may end it earlier.
    temperature: the logits are divided by it; 0 takes the most likely token (greedy), and ignores the rest.
    top_k: only the k most likely tokens; 0 keeps all.
    top_p: only the most likely tokens that together reach this probability; 1 keeps all.
    min_p: only tokens at least this many times as likely as the most likely one; 0 keeps all.
    seed: the same seed gives the same text, whatever else is in the batch, up to roundoff; None draws one.
    repetition_penalty: logits of tokens in the prompt or the answer are divided by it if positive, multiplied if
        negative: CTRL, https://arxiv.org/abs/1909.05858.  1 changes nothing.
    presence_penalty: is taken off the logits of tokens that the answer holds.
    frequency_penalty: is taken off for each time that the answer holds the token.
    logit_bias: is added to the logits of these tokens.
    stop: strings that end the text, and are not part of it; one, a list of them, or None.
    stop_token_ids: they (or one) end the text, as the checkpoint's own end-of-text tokens do; the token itself is kept
        in Output.tokens, not in Output.text where it is a special token.
    ignore_eos: go on after the checkpoint's end-of-text tokens (stop_token_ids still end the text).
    logprobs: also return ln p of each generated token, of the model's own distribution: before penalties,
        biases, temperature and cuts.
    top_logprobs: also those of so many likeliest tokens in its place.
    structure: what the text must be, a JSON Schema for example; it ends where that is complete.
    embed: the mean of the prompt's hidden states is wanted, Output.embedding; needs n=1 and max_tokens=1.
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    structure: Structure | None = None
    embed: bool = False

    def __post_init__(self) -> None:
        check("n", self.n, int, 1, MOST_ANSWERS)
        if self.best_of is not None:
            check("best_of", self.best_of, int, self.n, MOST_ANSWERS)
        check("max_tokens", self.max_tokens, int, 1, 2**31 - 1)
        check("temperature", self.temperature, float, 0, 1e6)
        check("top_k", self.top_k, int, 0, 2**31 - 1)
        check("top_p", self.top_p, float, 0, 1)
        check("min_p", self.min_p, float, 0, 1)
        if self.top_p == 0:
            raise ValueError("top_p is 0, which keeps no token; give up to 1, or temperature=0 for greedy")
        check("repetition_penalty", self.repetition_penalty, float, 1e-2, 1e2)
        check("presence_penalty", self.presence_penalty, float, -100, 100)
        check("frequency_penalty", self.frequency_penalty, float, -100, 100)
        check("top_logprobs", self.top_logprobs, int, 0, MOST_LOGPROBS)
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias is {self.logit_bias!r:.80}; give a mapping of token ids to numbers")
        for token, bias in self.logit_bias.items():
            check("a token of logit_bias", token, int, 0, 2**31 - 1)
            check(f"logit_bias[{token}]", bias, float, -100, 100)
        for name in ("stop", "stop_token_ids"):
            object.__setattr__(self, name, _several(name, getattr(self, name)))
        for string in self.stop:
            if not isinstance(string, str) or not string:
                raise ValueError(f"stop holds {string!r:.80}; give strings of at least one character")
        for name in ("ignore_eos", "logprobs", "embed"):
            if not isinstance(value := getattr(self, name), bool):
                hint = "; top_logprobs says how many" if name == "logprobs" else ""
                raise ValueError(f"{name} is {value!r:.80}; give True or False{hint}")
        if self.seed is not None:
            check("seed", self.seed, int, -(2**63), 2**64 - 1)
        for token in self.stop_token_ids:
            check("stop_token_ids", token, int, 0, 2**31 - 1)
        if self.structure is not None and not isinstance(self.structure, Structure):
            raise ValueError(f"structure is {self.structure!r:.80}; give one, as Structure(json_schema={{...}})")
        if self.embed and (self.answers, self.max_tokens, self.structure) != (1, 1, None):
            raise ValueError("embed is given with n, max_tokens or a structure; give n=1 and max_tokens=1 alone")
        if self.structure is not None and self.ignore_eos:
            raise ValueError("ignore_eos is given with a structure, which ends the text itself; leave one of them out")

    @property
    def answers(self) -> int:
        """How many are sampled."""
        return self.n if self.best_of is None else self.best_of

    @property
    def scored(self) -> bool:
        """Is ln p of every token needed, by whoever asked or to choose among the answers?"""
        return self.logprobs or self.answers > self.n

    @property
    def jumps(self) -> bool:
        """May tokens that a grammar forces do without a step?  Not where ln p is wanted: that takes one."""
        return not (self.scored or self.top_logprobs)


def _several(name: str, given: Any) -> tuple[Any, ...]:
    """One, several or none (also None), as a tuple."""
    if given is None or isinstance(given, list | tuple | set | frozenset):
        return tuple(given or ())
    if isinstance(given, str) or (isinstance(given, int) and not isinstance(given, bool)):
        return (given,)
    raise ValueError(f"{name} is {given!r:.80}; give a list")


def check(name: str, value: Any, kind: type, low: float, high: float) -> None:
    """ValueError unless the value is of this kind, int or float, and in these bounds."""
    kinds = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "a number" if kind is float else "an integer"
        raise ValueError(f"{name} is {value!r}; give {what} from {low} to {high}")
