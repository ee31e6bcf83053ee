"""How the next token is chosen: one call of the `sample` op for the whole batch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch

import llmkernels
from llmkernels.engine.params import SamplingParams
from llmkernels.settings import current, use
from llmkernels.structured.masks import Guide, Masks

_MASK = 2**64 - 1


def fork_seed(seed: int, answer: int) -> int:
    """The seed of the answer-th of a request's n answers; the first has the request's own, whatever n is."""
    return _mix((seed & _MASK) ^ _mix(answer)) if answer else seed


def uniform(seed: int, counter: int) -> float:
    """The counter-th number in [0, 1) of a request: a function of (seed, counter) alone, so that no batch changes it.

    SplitMix64, Steele, Lea & Flood 2014, https://doi.org/10.1145/2660193.2660195, entered at any counter; the top
    24 bits, which float32 holds exactly.
    """
    return (_mix(_mix(seed & _MASK) + counter * 0x9E3779B97F4A7C15) >> 40) / 2**24


class Answer(Protocol):
    """What `choose` needs to know of a request: how it is sampled, what it read and what it has written."""

    params: SamplingParams
    seed: int
    prompt_tokens: list[int]
    tokens: list[int]
    guide: Guide | None


class Chosen(NamedTuple):
    """A token, its ln p where that was asked for, and those of the likeliest tokens, as many as were asked for."""

    token: int
    logprob: float | None = None
    top: Mapping[int, float] = MappingProxyType({})


def choose(logits: torch.Tensor, answers: Sequence[Answer], masks: Masks | None = None) -> list[Chosen]:
    """The next token of each answer.  logits: the model's, [answers vocab]; with masks, they may be overwritten.

    masks: what the answers' grammars allow, begun for these answers.
    """
    params = [answer.params for answer in answers]
    rows = [r for r, p in enumerate(params) if p.scored or p.top_logprobs]
    logprobs = logits[rows].float().log_softmax(-1) if rows else None
    scores = adjusted(logits, answers)
    if masks:
        for guide in masks.forbid(scores):
            guide.failed = "no token may follow"
    with use(checked=bool(current().checked)):  # params were checked; the cpu kernel finds broken logits
        tokens = llmkernels.sample(
            scores,
            _column([uniform(answer.seed, len(answer.tokens)) for answer in answers], logits),
            **_options(params, logits),
        )
    chosen = [Chosen(token) for token in tokens.tolist()]
    if logprobs is not None:
        values, ids = logprobs.topk(min(max(params[r].top_logprobs for r in rows), logits.shape[1]))
        own = logprobs.gather(1, tokens[rows, None])[:, 0].tolist()
        for row, value, names, best in zip(rows, own, ids.tolist(), values.tolist(), strict=True):
            count = params[row].top_logprobs
            top = dict(zip(names[:count], best[:count], strict=True))
            chosen[row] = Chosen(chosen[row].token, value if params[row].scored else None, top)
    return chosen


def adjusted(logits: torch.Tensor, answers: Sequence[Answer]) -> torch.Tensor:
    """The logits after penalties and biases, in float32; the same tensor where nobody asks for any."""
    rows: list[int] = []
    tokens: list[int] = []
    factors: list[float] = []
    added: list[float] = []
    for row, answer in enumerate(answers):
        for token, (factor, bias) in _changes(answer).items():
            rows.append(row)
            tokens.append(token)
            factors.append(factor)
            added.append(bias)
    if not rows:
        return logits
    at = torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device)
    changed = logits.float()
    changed = changed.clone() if changed is logits else changed
    values, divisor = changed[at], _column(factors, logits)
    changed[at] = torch.where(values > 0, values / divisor, values * divisor) + _column(added, logits)
    return changed


def _changes(answer: Answer) -> dict[int, tuple[float, float]]:
    """Token -> what its logit is divided by (multiplied, if negative), and what is added then."""
    wish = answer.params
    repetition, presence, frequency = wish.repetition_penalty, wish.presence_penalty, wish.frequency_penalty
    if repetition == 1 and not (presence or frequency or wish.logit_bias):
        return {}
    counts = Counter(answer.tokens) if presence or frequency else Counter()
    read = {*answer.prompt_tokens, *answer.tokens} if repetition != 1 else set()
    changes = {}
    for token in {*read, *counts, *wish.logit_bias}:
        added = wish.logit_bias.get(token, 0.0) - (presence + frequency * counts[token] if counts[token] else 0.0)
        changes[token] = (repetition if token in read else 1.0), added
    return changes


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
