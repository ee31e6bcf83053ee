"""An LLM for many callers at once: one thread runs the steps, coroutines follow their requests.

    async with AsyncLLM(llm) as engine:
        async for delta in engine.stream("The ls command lists"):
            print(delta.text, end="")

The LLM belongs to that thread.  Callers leave orders in an inbox, which it empties between two steps, and deltas travel
back to the caller's event loop.  A caller that stops listening aborts its request, and its pages are free before the
next step.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import Any

from llmkernels.engine.beam import Beam, BeamParams, BeamSearch
from llmkernels.engine.intake import Prompt
from llmkernels.engine.llm import LLM
from llmkernels.engine.output import Delta, Feed, Output, best
from llmkernels.engine.sampling import SamplingParams


class EngineStopped(RuntimeError):
    """The engine was closed, or a step failed; the cause says which."""


class Listener:
    """The way back to the event loop of one or several requests.

    What they bring is put into `queue` as lists of (number of the answer, delta), one a step.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.feed = Feed(())
        self.outputs: dict[Output, int] = {}

    def news(self) -> list[Any]:
        """What the last step brought."""
        return [(self.outputs[delta.output], delta) for delta in self.feed.news()]

    def ended(self) -> bool:
        """Is there nothing more to tell?"""
        return not self.feed

    def abort(self, llm: LLM) -> None:
        """Nobody listens any more."""
        for output in self.outputs:
            llm.abort(output)


class BeamListener(Listener):
    """That of a beam search, which brings nothing but its beams, at its end."""

    search: BeamSearch | None = None

    def news(self) -> list[Any]:
        return (self.search and self.search.beams) or []

    def ended(self) -> bool:
        return self.search is None or self.search.beams is not None

    def abort(self, llm: LLM) -> None:
        if self.search:
            llm.abort_beams(self.search)


class AsyncLLM:
    """Runs an LLM in a thread of its own until it is closed.  Not to be used beside it: the LLM's own methods.

    Args:
        observe: called on that thread after each step and with the deltas it brought, for metrics.
    """

    def __init__(self, llm: LLM, observe: Callable[[list[Delta]], None] = lambda deltas: None):
        self.llm = llm
        self._observe = observe
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: list[Listener] = []
        self._failure: BaseException | None = None
        self._closing = threading.Lock()  # nothing enters the inbox once it has been emptied for the last time
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="llmkernels engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        salt: str | None = None,
        adapter: str | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of a request's params.answers outputs, interleaved.  Leaving early aborts it.

        Raises:
            ValueError: as LLM.add.  EngineStopped: there is no engine any more.
        """
        async for news in self.batches([prompt], params, salt=salt, adapter=adapter):
            for _, delta in news:
                yield delta

    async def batches(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        salt: str | None = None,
        adapter: str | None = None,
    ) -> AsyncGenerator[list[tuple[int, Delta]], None]:
        """What each step brings to the params.answers answers to each prompt: (number, delta), in the prompts' order.

        Leaving early aborts all of them.  Errors as `stream`.
        """
        grammar = await asyncio.to_thread(self.llm.prepare, params)  # kept until the end: the engine never waits for it
        listener = Listener()

        def add() -> None:
            for prompt in prompts:
                for output in self.llm.add(prompt, params, salt=salt, adapter=adapter):
                    listener.outputs[output] = len(listener.outputs)
            listener.feed = Feed(listener.outputs)

        self._order(lambda: self._admit(listener, add))
        try:
            left = (self.llm.default_params if params is None else params).answers * len(prompts)
            while left:
                news = await listener.queue.get()
                if isinstance(news, BaseException):
                    raise news
                left -= sum(delta.finish_reason is not None for _, delta in news)
                yield news
        finally:
            del grammar
            with suppress(EngineStopped):
                self._order(lambda: self._dismiss(listener))

    async def beam_search(
        self,
        prompt: Prompt,
        params: BeamParams | None = None,
        *,
        salt: str | None = None,
        adapter: str | None = None,
    ) -> list[Beam]:
        """LLM.beam_search, beside the other requests; cancelling it aborts it.  Errors as `stream`."""
        listener = BeamListener()

        def add() -> None:
            listener.search = self.llm.add_beams(prompt, params, salt=salt, adapter=adapter)

        self._order(lambda: self._admit(listener, add))
        try:
            found: list[Beam] | BaseException = await listener.queue.get()
            if isinstance(found, BaseException):
                raise found
            return found
        finally:
            with suppress(EngineStopped):
                self._order(lambda: self._dismiss(listener))

    async def ask(self, question: Callable[[LLM], Any]) -> Any:
        """What `question` says of the LLM between two steps, when nothing moves; EngineStopped where there is none."""
        loop, answer = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def tell(result: Any, failure: BaseException | None) -> None:
            if not answer.done():  # or nobody waits any more
                answer.set_result(result) if failure is None else answer.set_exception(failure)

        def order() -> None:
            result, failure = None, None
            try:
                result = question(self.llm)
            except (RuntimeError, ValueError) as error:
                failure = error
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(tell, result, failure)

        self._order(order)
        return await answer

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        salt: str | None = None,
        adapter: str | None = None,
    ) -> list[Output]:
        """The finished outputs of a request, as LLM.generate returns them."""
        outputs: dict[int, Output] = {}
        async for delta in self.stream(prompt, params, salt=salt, adapter=adapter):
            outputs[delta.output.index] = delta.output
        return best([outputs[index] for index in sorted(outputs)])

    def close(self) -> None:
        """End all requests and the thread; returns when it has ended."""
        with suppress(EngineStopped):
            self._order(None)
        self._thread.join()

    def _order(self, order: Callable[[], None] | None) -> None:
        with self._closing:
            if self._closed:
                raise EngineStopped("the engine has stopped") from self._failure
            self._inbox.put(order)

    def _run(self) -> None:
        try:
            while self._obey():
                self.llm.step()
                self._publish()
        except BaseException as failure:
            self._failure = failure
            raise
        finally:
            with self._closing:
                self._closed = True
            while not self._inbox.empty():
                if order := self._inbox.get():
                    order()
            for listener in [*self._listeners]:  # the thread's last words go to everybody who waits
                stopped = EngineStopped("the engine has stopped")
                stopped.__cause__ = self._failure
                self._dismiss(listener)
                _tell(listener.loop, [(listener, stopped)])

    def _obey(self) -> bool:
        """Carry out what is in the inbox, waiting for it while there is nothing else to do; False: stop."""
        while True:
            try:
                order = self._inbox.get(block=not self._listeners)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _admit(self, listener: Listener, add: Callable[[], None]) -> None:
        try:
            add()
        except ValueError as error:
            self._dismiss(listener)
            _tell(listener.loop, [(listener, error)])
            return
        self._listeners.append(listener)

    def _dismiss(self, listener: Listener) -> None:
        listener.abort(self.llm)
        if listener in self._listeners:
            self._listeners.remove(listener)

    def _publish(self) -> None:
        """Tell everybody what the step brought.  To wake an event loop takes longer than to say much: once a step."""
        deltas: list[Delta] = []
        letters: dict[asyncio.AbstractEventLoop, list[tuple[Listener, Any]]] = {}
        for listener in [*self._listeners]:
            if news := listener.news():
                letters.setdefault(listener.loop, []).append((listener, news))
                if not isinstance(listener, BeamListener):
                    deltas += [delta for _, delta in news]
            if listener.ended():
                self._listeners.remove(listener)
        for loop, its in letters.items():
            _tell(loop, its)
        self._observe(deltas)


def _tell(loop: asyncio.AbstractEventLoop, letters: list[tuple[Listener, Any]]) -> None:
    """Called on the engine's thread; nobody hears it once the loop is closed."""

    def deliver() -> None:
        for listener, news in letters:
            listener.queue.put_nowait(news)

    with suppress(RuntimeError):
        loop.call_soon_threadsafe(deliver)
