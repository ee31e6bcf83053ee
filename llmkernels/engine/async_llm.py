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
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

from llmkernels.engine.llm import LLM, Prompt
from llmkernels.engine.output import Delta, Feed, Output
from llmkernels.engine.sampling import SamplingParams


class EngineStopped(RuntimeError):
    """The engine was closed, or a step failed; the cause says which."""


class Listener:
    """A request's way back to its event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.feed = Feed(())
        self.outputs: list[Output] = []

    def tell(self, item: Any) -> None:
        """Called on the engine's thread; nobody hears it once the loop is closed."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


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
        self, prompt: Prompt, params: SamplingParams | None = None, *, salt: str | None = None
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of a request's params.n outputs, interleaved.  Leaving early aborts it.

        Raises:
            ValueError: as LLM.add.  EngineStopped: there is no engine any more.
        """
        listener = Listener()
        self._order(lambda: self._admit(listener, prompt, params, salt))
        try:
            left = (self.llm.default_params if params is None else params).n
            while left:
                item = await listener.queue.get()
                if isinstance(item, BaseException):
                    raise item
                left -= item.finish_reason is not None
                yield item
        finally:
            with suppress(EngineStopped):
                self._order(lambda: self._dismiss(listener))

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, salt: str | None = None
    ) -> list[Output]:
        """The finished outputs of a request, in their order."""
        outputs: dict[int, Output] = {}
        async for delta in self.stream(prompt, params, salt=salt):
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
                listener.tell(stopped)

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

    def _admit(self, listener: Listener, *request: Any) -> None:
        prompt, params, salt = request
        try:
            listener.outputs = self.llm.add(prompt, params, salt=salt)
        except ValueError as error:
            listener.tell(error)
            return
        listener.feed = Feed(listener.outputs)
        self._listeners.append(listener)

    def _dismiss(self, listener: Listener) -> None:
        for output in listener.outputs:
            self.llm.abort(output)
        if listener in self._listeners:
            self._listeners.remove(listener)

    def _publish(self) -> None:
        deltas = []
        for listener in [*self._listeners]:
            for delta in listener.feed.news():
                listener.tell(delta)
                deltas.append(delta)
            if not listener.feed:
                self._listeners.remove(listener)
        self._observe(deltas)
