"""The HTTP side's hold on an engine that runs elsewhere; host.py is the other end of the link.

    async with Engine(link) as engine:
        async for news in engine.generate([[5, 6, 7]], SamplingParams(max_tokens=20)):
            for delta in news:
                print(delta.text, end="")

A caller that stops listening drops its request, whose pages are free before the engine's next step.
"""

import asyncio
import itertools
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llmkernels.engine.beam import Beam, BeamParams
from llmkernels.engine.llm import LLM
from llmkernels.engine.params import SamplingParams
from llmkernels.models import shipped_model
from llmkernels.models.tokenizer import read_tokenizer
from llmkernels.server import wire
from llmkernels.server.host import in_thread

STOP_SECONDS = 5.0  # until a process that was asked to end is killed


class EngineStopped(RuntimeError):
    """The engine was closed, or it failed."""


@dataclass(eq=False)
class Answer:
    """One answer as far as it has come: engine.Output, as the HTTP side has it.

    prompt: tokens of its prompt.
    index: which of the params.answers answers to the prompt it is.
    arrived, last: time.monotonic() of the request, and of the last news.
    """

    params: SamplingParams
    prompt: int
    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Mapping[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    score: float = 0.0
    cached_tokens: int = 0
    embedding: list[float] | None = None
    error: str = ""
    arrived: float = field(default_factory=time.monotonic)
    last: float | None = None


class Delta(NamedTuple):
    """What an answer has grown by; `number` is its number among its request's, `start` where its tokens begin."""

    number: int
    answer: Answer
    start: int
    text: str
    tokens: list[int]
    finish_reason: str | None


class Process:
    """An engine in a process of its own, ready when this object is.

    Args:
        arguments, adapters: as wire.Load has them.
        seen: told what it does meanwhile.

    Raises:
        ValueError: LLM refuses the arguments.  EngineStopped: the process ended.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        adapters: Sequence[tuple[str, str]] = (),
        seen: Callable[[str], None] = lambda words: None,
    ):
        self.link, theirs = socket.socketpair()
        command = [sys.executable, "-m", "llmkernels.server.host", str(theirs.fileno())]
        # In a process group of its own, so that Ctrl-C in a terminal reaches the HTTP side alone, which ends both.
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], process_group=0, stdin=subprocess.DEVNULL)
        theirs.close()
        try:
            self.link.sendall(wire.frame(wire.Load(arguments, [*adapters])))
            while not isinstance(word := wire.receive(self.link), wire.Facts):
                if isinstance(word, wire.Failed):
                    raise ValueError(word.words)
                seen(word.words)
        except (EOFError, OSError):
            self.end(STOP_SECONDS)
            raise EngineStopped(self.epitaph()) from None
        except BaseException:  # Ctrl-C while it loads is one of them
            self.end(0)
            raise
        self.facts: wire.Facts = word
        place = arguments.get("model_path")
        self.tokenizer = read_tokenizer(shipped_model() if place is None else Path(place), True)

    def end(self, seconds: float = STOP_SECONDS) -> None:
        """Wait so long for it to end by itself, since it was asked to, and no longer."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def epitaph(self) -> str:
        """How it ended, for people."""
        code = self._process.wait()
        if code < 0:
            hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
            return f"the engine's process was ended by {signal.Signals(-code).name}{hint}"
        return f"the engine's process ended with code {code}; what it printed says why"


@asynccontextmanager
async def running(
    source: "LLM | Process", observe: Callable[[list[Delta]], None], lost: Callable[[], None]
) -> AsyncIterator["Engine"]:
    """The engine of a process, which ends with it, or of an LLM, which runs in a thread meanwhile."""
    end: Callable[[], None]
    if isinstance(source, Process):
        link, facts, end = source.link, source.facts, source.end
    else:
        link, thread = in_thread(source)
        facts, end = await asyncio.to_thread(wire.receive, link), thread.join
    try:
        async with Engine(link, facts, observe, lost) as engine:
            yield engine
    finally:
        await asyncio.to_thread(end)


class Engine:
    """Requests to an engine, for the routes.

    Args:
        link: the socket to a Host.
        facts: what it said first.
        observe: called with the deltas of each step, for metrics.
        lost: called when the engine has gone without having been asked to.
    """

    def __init__(
        self,
        link: socket.socket,
        facts: wire.Facts,
        observe: Callable[[list[Delta]], None] = lambda deltas: None,
        lost: Callable[[], None] = lambda: None,
    ):
        self.facts, self.adapters = facts, facts.adapters
        self.alive = True
        self._link, self._observe, self._lost = link, observe, lost
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Queue[Any]] = {}
        self._answers: dict[int, list[Answer]] = {}

    async def __aenter__(self) -> "Engine":
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._link)
        self._listening = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        alive, self.alive = self.alive, False
        if alive:
            with suppress(ConnectionError):
                self._writer.write(wire.frame(wire.Stop()))
                await self._writer.drain()
                await asyncio.wait([self._listening], timeout=STOP_SECONDS)
        self._listening.cancel()
        self._writer.close()

    async def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        salt: str | None = None,
        adapter: str | None = None,
    ) -> AsyncGenerator[list[Delta], None]:
        """What each step brings to params.answers answers to each prompt, numbered in the prompts' order.

        Leaving early drops all of them.

        Raises:
            ValueError: as LLM.add.  EngineStopped: there is no engine any more.
        """
        answers = [Answer(params, len(prompt), index) for prompt in prompts for index in range(params.answers)]
        async with self._order(
            lambda number: wire.Generate(number, [*prompts], params, salt, adapter), answers
        ) as news:
            left = len(answers)
            while left:
                deltas = await _next(news)
                left -= sum(delta.finish_reason is not None for delta in deltas)
                yield deltas

    async def beams(
        self, prompt: list[int], params: BeamParams, salt: str | None = None, adapter: str | None = None
    ) -> list[Beam]:
        """As LLM.beam_search; leaving early ends it.  Errors as `generate`."""
        async with self._order(lambda number: wire.Search(number, prompt, params, salt, adapter)) as news:
            found: list[Beam] = await _next(news)
            return found

    async def ask(self, name: str, *arguments: Any) -> Any:
        """What one of host.QUESTIONS is answered between two steps, when nothing moves; errors as `generate`."""
        async with self._order(lambda number: wire.Question(number, name, arguments)) as news:
            return await _next(news)

    @asynccontextmanager
    async def _order(
        self, order: Callable[[int], Any], answers: Sequence[Answer] = ()
    ) -> AsyncIterator["asyncio.Queue[Any]"]:
        if not self.alive:
            raise EngineStopped("the engine has stopped")
        number, news = next(self._numbers), asyncio.Queue[Any]()
        self._waiting[number] = news
        self._answers[number] = [*answers]
        self._writer.write(wire.frame(order(number)))
        try:
            yield news
        finally:
            del self._waiting[number]
            answers = self._answers.pop(number)
            if self.alive and not (answers and all(answer.finish_reason for answer in answers)):
                self._writer.write(wire.frame(wire.Drop(number)))

    async def _listen(self) -> None:
        """Hand on what comes, until nothing can come any more."""
        try:
            while True:
                head = await self._reader.readexactly(wire.HEAD)
                self._hear(wire.message(await self._reader.readexactly(wire.size(head))))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            lost, self.alive = self.alive, False
            for news in self._waiting.values():
                news.put_nowait(EngineStopped("the engine has stopped"))
            if lost:
                self._lost()

    def _hear(self, message: Any) -> None:
        match message:
            case wire.Refused(number, words):
                self._tell(number, ValueError(words))
            case wire.Told(number, value):
                self._tell(number, value)
            case list():
                seen: list[Delta] = []
                for number, grown in message:
                    if number in self._waiting:  # or it left, and the engine does not know yet
                        deltas = [_delta(self._answers[number][one.answer], one) for one in grown]
                        seen += deltas
                        self._waiting[number].put_nowait(deltas)
                self._observe(seen)

    def _tell(self, number: int, value: Any) -> None:
        if news := self._waiting.get(number):
            news.put_nowait(value)


async def _next(news: "asyncio.Queue[Any]") -> Any:
    value = await news.get()
    if isinstance(value, BaseException):
        raise value
    return value


def _delta(answer: Answer, grown: wire.Grown) -> Delta:
    """Let the answer grow."""
    start = len(answer.tokens)
    answer.text += grown.text
    answer.tokens += grown.tokens
    answer.logprobs += grown.logprobs
    answer.top_logprobs += grown.top_logprobs
    answer.finish_reason, answer.score = grown.finish_reason, grown.score
    answer.cached_tokens, answer.embedding, answer.error = grown.cached_tokens, grown.embedding, grown.error
    return Delta(grown.answer, answer, start, grown.text, grown.tokens, grown.finish_reason)
