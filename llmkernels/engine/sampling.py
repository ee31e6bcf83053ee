"""How the next token is chosen: what a request may ask for, and one call of the `sample` op for the whole batch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import llmkernels

_MASK = 2**64 - 1
MOST_ANSWERS = 128  # to one prompt


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for.  Wrong values raise ValueError.

    n: how many answers to give; the prompt is computed once for all of them.
    max_tokens: how many tokens to generate at most; the context may end it earlier.
    temperature: the logits are divided by it; 0 takes the most likely token (greedy), and ignores the rest.
    top_k: only the k most likely tokens; 0 keeps all.
    top_p: only the most likely tokens that together reach this probability; 1 keeps all.
    min_p: only tokens at least this many times as likely as the most likely one; 0 keeps all.
    seed: the same seed gives the same text, whatever else is in the batch; None draws one.
    stop_token_ids: end the text, as the checkpoint's own end-of-text tokens do; the token itself is kept in
        Output.tokens, not in Output.text where it is a special token.
    ignore_eos: go on after the checkpoint's end-of-text tokens (stop_token_ids still end the text).
    logprobs: also return ln p of each generated token, of the model's own distribution: before temperature and cuts.
    """

    n: int = 1
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = field(default=())
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        _check("n", self.n, int, 1, MOST_ANSWERS)
        _check("max_tokens", self.max_tokens, int, 1, 2**31 - 1)
        _check("temperature", self.temperature, float, 0, 1e6)
        _check("top_k", self.top_k, int, 0, 2**31 - 1)
        _check("top_p", self.top_p, float, 0, 1)
        _check("min_p", self.min_p, float, 0, 1)
        if self.top_p == 0:
            raise ValueError("top_p is 0, which keeps no token; give up to 1, or temperature=0 for greedy")
        if self.seed is not None:
            _check("seed", self.seed, int, -(2**63), _MASK)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            _check("stop_token_ids", token, int, 0, 2**31 - 1)


def draw_seed() -> int:
    """A seed nobody chose."""
    return int.from_bytes(os.urandom(8), "little")


def fork_seed(seed: int, answer: int) -> int:
    """The seed of the answer-th of a request's n answers; the first has the request's own, whatever n is."""
    return _mix((seed & _MASK) ^ _mix(answer)) if answer else seed


def uniform(seed: int, counter: int) -> float:
    """The counter-th number in [0, 1) of a request: a function of (seed, counter) alone, so that no batch changes it.

    SplitMix64, Steele, Lea & Flood 2014, https://doi.org/10.1145/2660193.2660195, entered at any counter; the top
    24 bits, which float32 holds exactly.
    """
    return (_mix(_mix(seed & _MASK) + counter * 0x9E3779B97F4A7C15) >> 40) / 2**24


def choose(
    logits: torch.Tensor, params: Sequence[SamplingParams], seeds: Sequence[int], counters: Sequence[int]
) -> tuple[list[int], list[float | None]]:
    """The next token of each row, and its ln p where the row's params ask for it.

    Args:
        logits: [rows vocab], the model's.
        params, seeds, counters: of each row; the counter is the number of tokens the request has generated.
    """
    tokens = llmkernels.sample(
        logits,
        _column([uniform(s, c) for s, c in zip(seeds, counters, strict=True)], logits),
        **_options(params, logits),
    )
    logprobs: list[float | None] = [None] * len(params)
    if rows := [r for r, p in enumerate(params) if p.logprobs]:
        chosen = logits[rows].float().log_softmax(-1).gather(1, tokens[rows, None])
        for row, value in zip(rows, chosen[:, 0].tolist(), strict=True):
            logprobs[row] = value
    return tokens.tolist(), logprobs


def _options(params: Sequence[SamplingParams], logits: torch.Tensor) -> dict[str, Any]:
    """The per-row tensors of the `sample` op.  What no row asks for is left out, which spares the backend the work."""
    options = {"temperature": _column([p.temperature for p in params], logits)}
    if any(p.temperature for p in params):
        if any(p.top_k for p in params):
            options["top_k"] = _column([p.top_k for p in params], logits, torch.int32)
        if any(p.top_p < 1 for p in params):
            options["top_p"] = _column([p.top_p for p in params], logits)
        if any(p.min_p for p in params):
            options["min_p"] = _column([p.min_p for p in params], logits)
    return options


def _column(values: list, logits: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=logits.device)


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _check(name: str, value: Any, kind: type, low: float, high: float) -> None:
    kinds = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "a number" if kind is float else "an integer"
        raise ValueError(f"{name} is {value!r}; give {what} from {low} to {high}")
