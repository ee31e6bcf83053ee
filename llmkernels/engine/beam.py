"""Beam search: of all ways to go on, the `width` likeliest are followed at once; LLM.beam_search.

Each step forks the sequences that stay, so that beams share every page up to where they part: a fork costs no copy but
that of the last page, and none where only one beam goes on.  What is kept, when it ends and how lengths are weighed is
as in transformers' GenerationMixin.generate(num_beams=width), the oracle of its tests.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import InitVar, dataclass, replace

from llmkernels.engine.output import Output
from llmkernels.engine.params import MOST_LOGPROBS, check
from llmkernels.engine.scheduler import Scheduler
from llmkernels.models.tokenizer import StopStrings


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
        check("width", self.width, int, 1, MOST_LOGPROBS - 1)
        check("max_tokens", self.max_tokens, int, 1, 2**31 - 1)
        check("length_penalty", self.length_penalty, float, -10, 10)
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ValueError(f"early_stopping is {self.early_stopping!r}; give True, False or 'never'")


@dataclass(frozen=True)
class Beam:
    """A way to go on.

    tokens: the ids generated, a stop token included.
    score: the sum of their ln p while it is followed; that over length ** length_penalty once it has ended.
    text, finish_reason: as those of an Output, once it has ended.
    """

    tokens: list[int]
    score: float
    finish_reason: str | None = None
    text: str = ""


Ways = list[tuple[int, int]]  # how beams go on: (index among those before, new token)


def search(
    params: BeamParams, length: int, stop: frozenset[int]
) -> Generator[Ways, Sequence[Mapping[int, float]], list[Beam]]:
    """The answers, the best first.

    Yields which beams are followed from now on; the first time there is one, with nothing behind the prompt, and no
    way.  Is sent the likeliest next tokens of each and their ln p: width + len(stop) of them, so that enough are left
    that do not end it.

    Args:
        length: tokens to generate at most.
        stop: tokens that end an answer.
    """
    beams, finished = [Beam([], 0.0)], [Beam([], -1e9)] * params.width
    likeliest, full = (yield []), False
    while True:
        count = len(beams[0].tokens) + 1
        ways = sorted(
            ((beam.score + p, i, token) for i, beam in enumerate(beams) for token, p in likeliest[i].items()),
            key=lambda way: -way[0],
        )
        ended = [count == length or token in stop for _, _, token in ways]
        for (score, i, token), end in [*zip(ways, ended, strict=True)][: params.width]:
            if end and not (full and params.early_stopping is True):
                reason = "stop" if token in stop else "length"
                finished.append(Beam([*beams[i].tokens, token], score / count**params.length_penalty, reason))
        finished = sorted(finished, key=lambda beam: -beam.score)[: params.width]
        ways = [way for way, end in zip(ways, ended, strict=True) if not end][: params.width]
        if not ways:
            break
        full = bool(finished[-1].tokens)
        reach = length if params.early_stopping == "never" and params.length_penalty > 0 else count
        if full and (params.early_stopping is True or ways[0][0] / reach**params.length_penalty <= finished[-1].score):
            break
        beams = [Beam([*beams[i].tokens, token], score) for score, i, token in ways]
        likeliest = yield [(i, token) for _, i, token in ways]
    return [beam for beam in finished if beam.tokens]


@dataclass(eq=False)
class BeamSearch:
    """A search on its way: sequences of a scheduler that fork at every step of theirs.

    first: the request, not queued yet, with the top_logprobs that `search` asks for.
    beams: what it found, the best first; None until it has ended.

    ValueError where its beams find no room, even alone.
    """

    params: BeamParams
    first: InitVar[Output]
    scheduler: Scheduler
    stop: frozenset[int]
    decode: Callable[[list[int]], str]
    beams: list[Beam] | None = None

    def __post_init__(self, first: Output) -> None:
        params, scheduler, self._outputs = self.params, self.scheduler, [first]
        sequence = first._sequence
        sequence.plain = True
        self._length = len(sequence.tokens)  # behind so many tokens the beams part
        shared = self._length // scheduler.page_size
        pages = shared + params.width * (-(-sequence.limit // scheduler.page_size) - shared)
        if params.width > scheduler.max_sequences or pages > scheduler.pool.pages:
            raise ValueError(
                f"width is {params.width}: {pages} pages and as many sequences at once; this LLM has "
                f"{scheduler.pool.pages} and max_sequences={scheduler.max_sequences}: give fewer beams, or fewer tokens"
            )
        self._search = search(params, sequence.limit - self._length, self.stop)
        next(self._search)

    def advance(self) -> bool:
        """After a step: part the beams anew where all of them have had theirs.  False once it has ended."""
        if self.beams is None and all(output.top_logprobs for output in self._outputs):
            try:
                ways = self._search.send([output.top_logprobs[0] for output in self._outputs])
            except StopIteration as end:
                self.abort()
                self.beams = [replace(beam, text=self.decode(beam.tokens)) for beam in end.value]
                return False
            forks = [self._fork(self._outputs[i], token) for i, token in ways]
            self.abort()
            self._outputs, self._length = forks, self._length + 1
        return self.beams is None

    def abort(self) -> None:
        """Forget the sequences that it follows."""
        for output in self._outputs:
            self.scheduler.end(output._sequence)

    def _fork(self, parent: Output, token: int) -> Output:
        sequence = self.scheduler.fork(parent._sequence, self._length, token)
        fork = Output(parent.prompt_tokens, parent.params, parent.seed, _sequence=sequence, _stops=StopStrings(()))
        sequence.payload = fork
        return fork
