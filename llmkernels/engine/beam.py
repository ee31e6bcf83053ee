"""Beam search: of all ways to go on, the `width` likeliest are followed at once; LLM.beam_search.

Each step forks the sequences that stay, so that beams share every page up to where they part: a fork costs no copy but
that of the last page, and none where only one beam goes on.  What is kept, when it ends and how lengths are weighed is
as in transformers' GenerationMixin.generate(num_beams=width), the oracle of its tests.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkernels.engine.sampling import MOST_LOGPROBS


@dataclass(frozen=True)
class BeamParams:
    """What a beam search asks for.  Wrong values raise ValueError.

    width: how many beams are followed, and how many answers come back.
    max_tokens: how many tokens to generate at most; the context may end it earlier.
    length_penalty: an answer's score is its ln p divided by length ** length_penalty; above 0 favours longer ones.
    early_stopping: True ends at `width` finished answers; False when the best beam, at its present length, scores less
        than the worst of them; 'never' when no beam of whatever length could score more (exact for a penalty of 0 and
        for more).
    """

    width: int = 4
    max_tokens: int = 128
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        for name, most in (("width", MOST_LOGPROBS - 1), ("max_tokens", 2**31 - 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} is {value!r}; give an integer from 1 to {most}")
        penalty: Any = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not -10 <= penalty <= 10:
            raise ValueError(f"length_penalty is {penalty!r}; give a number from -10 to 10")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ValueError(f"early_stopping is {self.early_stopping!r}; give True, False or 'never'")


@dataclass(frozen=True)
class Beam:
    """A way to go on.

    tokens: the ids generated, a stop token included.
    score: the sum of their ln p while it is followed; that over length ** length_penalty once it has ended.
    text: as Output.text, once it has ended.
    """

    tokens: list[int]
    score: float
    text: str = ""


Follow = Callable[[list[tuple[int, int]]], Sequence[Mapping[int, float]]]


def search(params: BeamParams, length: int, stop: frozenset[int], follow: Follow) -> list[Beam]:
    """The answers, the best first.

    Args:
        length: tokens to generate at most.
        stop: tokens that end an answer.
        follow: gives the likeliest next tokens of each beam and their ln p: width + len(stop) of them, so that enough
            are left that do not end it.  Told which beams these are, as (index among those before, new token); the
            first time there is one, with nothing behind the prompt.
    """
    beams, finished = [Beam([], 0.0)], [Beam([], -1e9)] * params.width
    likeliest, full = follow([]), False
    while True:
        count = len(beams[0].tokens) + 1
        ways = sorted(
            ((beam.score + p, i, token) for i, beam in enumerate(beams) for token, p in likeliest[i].items()),
            key=lambda way: -way[0],
        )
        ended = [count == length or token in stop for _, _, token in ways]
        for (score, i, token), end in [*zip(ways, ended, strict=True)][: params.width]:
            if end and not (full and params.early_stopping is True):
                finished.append(Beam([*beams[i].tokens, token], score / count**params.length_penalty))
        finished = sorted(finished, key=lambda beam: -beam.score)[: params.width]
        ways = [way for way, end in zip(ways, ended, strict=True) if not end][: params.width]
        if not ways:
            break
        full = bool(finished[-1].tokens)
        reach = length if params.early_stopping == "never" and params.length_penalty > 0 else count
        if full and (params.early_stopping is True or ways[0][0] / reach**params.length_penalty <= finished[-1].score):
            break
        beams = [Beam([*beams[i].tokens, token], score) for score, i, token in ways]
        likeliest = follow([(i, token) for _, i, token in ways])
    return [beam for beam in finished if beam.tokens]
