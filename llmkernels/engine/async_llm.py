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

from llmkernels.engine.llm import LLM, Prompt
from llmkernels.engine.output import Delta, Feed, Output
from llmkernels.engine.sampling import SamplingParams


class EngineStopped(RuntimeError):
    """The engine was closed, or a step failed; the cause says which."""


class Listener:
    """One or several requests' way back to their event loop: lists of (number of the answer, delta), one a step."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.feed = Feed(())
        self.outputs: dict[Output, int] = {}


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
        """The deltas of a request's params.n outputs, interleaved.  Leaving early aborts it.

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
        """What each step brings to params.n answers to each prompt: (number, delta), numbered in the prompts' order.

        Leaving early aborts all of them.  Errors as `stream`.
        """
        grammar = await asyncio.to_thread(self.llm.prepare, params)  # kept until the end: the engine never waits for it
        listener = Listener()
        self._order(lambda: self._admit(listener, prompts, params, salt, adapter))
        try:
            left = (self.llm.default_params if params is None else params).n * len(prompts)
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
        """The finished outputs of a request, in their order."""
        outputs: dict[int, Output] = {}
        async for delta in self.stream(prompt, params, salt=salt, adapter=adapter):
            outputs[delta.output.index] = delta.output
        return [outputs[index] for index in sorted(outputs)]

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

    def _admit(self, listener: Listener, prompts: Sequence[Prompt], *wishes: Any) -> None:
        params, salt, adapter = wishes
        try:
            for prompt in prompts:
                for output in self.llm.add(prompt, params, salt=salt, adapter=adapter):
                    listener.outputs[output] = len(listener.outputs)
        except ValueError as error:
            self._dismiss(listener)
            _tell(listener.loop, [(listener, error)])
            return
        listener.feed = Feed(listener.outputs)
        self._listeners.append(listener)

    def _dismiss(self, listener: Listener) -> None:
        for output in listener.outputs:
            self.llm.abort(output)
        if listener in self._listeners:
            self._listeners.remove(listener)

    def _publish(self) -> None:
        """Tell everybody what the step brought.  To wake an event loop takes longer than to say much: once a step."""
        deltas: list[Delta] = []
        letters: dict[asyncio.AbstractEventLoop, list[tuple[Listener, Any]]] = {}
        for listener in [*self._listeners]:
            news = [(listener.outputs[delta.output], delta) for delta in listener.feed.news()]
            if news:
                letters.setdefault(listener.loop, []).append((listener, news))
                deltas += [delta for _, delta in news]
            if not listener.feed:
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
