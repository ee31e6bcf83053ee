"""The engine's side of the server: an LLM that runs steps and obeys what comes over a socket.

In a process of its own, for the HTTP side and the steps would otherwise take the interpreter's lock from each other at
every token:   python -m llmkernels.server.host FD   reads a Load from that socket first; or in a thread, for tests.

Orders wait in an inbox, which is emptied between two steps: who is dropped has no page in the next one.
"""

import gc
import os
import queue
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

from llmkernels import ledger
from llmkernels.engine.beam import BeamSearch
from llmkernels.engine.llm import LLM
from llmkernels.engine.output import Delta, Feed, Output
from llmkernels.server.snapshot import snapshot
from llmkernels.server.wire import (
    Drop,
    Facts,
    Failed,
    Generate,
    Grown,
    Load,
    Question,
    Refused,
    Search,
    Stage,
    Step,
    Stop,
    Told,
    frame,
    receive,
)

COMPILING = 4  # grammars at once
QUESTIONS: dict[str, Callable[..., Any]] = {
    "counters": lambda llm: llm.stats() | {"ops": ledger.read()},
    "status": lambda llm: snapshot(llm.scheduler) | llm.stats() | {"problem": problem(llm)},
    "load_adapter": lambda llm, name, path: llm.load_adapter(name, path) or llm.adapters,
    "unload_adapter": lambda llm, name: llm.unload_adapter(name) or llm.adapters,
}


def problem(llm: LLM) -> str | None:
    """What LLM.check says of the pages, if anything."""
    try:
        llm.check()
    except RuntimeError as error:
        return str(error)
    return None


class Compiled(NamedTuple):
    """An order to ourselves: the grammar of a request is there, or was refused; held so that `add` finds it."""

    order: Generate
    grammar: Any
    refusal: str | None


class Request:
    """A request that runs: its outputs with their numbers, and how much of them was told."""

    def __init__(self, outputs: list[Output]):
        self.outputs = {output: number for number, output in enumerate(outputs)}
        self.feed = Feed(outputs)


Inbox = queue.SimpleQueue[Any]


def orders(link: socket.socket, gone: Callable[[], None] = lambda: None) -> Inbox:
    """What comes over a link, as a thread of its own hears it; then a Stop, and gone() is called."""
    inbox = Inbox()

    def listen() -> None:
        try:
            while True:
                inbox.put(receive(link))
        except (EOFError, OSError):
            inbox.put(Stop())
            gone()

    threading.Thread(target=listen, name="llmkernels orders", daemon=True).start()
    return inbox


class Host:
    """Runs `llm` for whoever holds the other end of `link`, by the orders in `inbox`.

    Nobody else may use the LLM meanwhile.
    """

    def __init__(self, llm: LLM, link: socket.socket, inbox: Inbox):
        self._llm, self._link, self._inbox = llm, link, inbox
        self._requests: dict[int, Request] = {}
        self._searches: dict[int, BeamSearch] = {}
        self._compiling: set[int] = set()
        self._compilers = ThreadPoolExecutor(COMPILING, "llmkernels grammar")

    def run(self) -> None:
        """Until the other side says Stop, or is gone; what a step raises goes on to the caller."""
        try:
            self._send(Facts(self._llm.max_length, self._llm.config.hidden, self._llm.adapters))
            while self._obey():
                self._llm.step()
                self._publish()
        except ConnectionError:
            pass  # nobody is there to be told
        finally:
            for number in [*self._requests, *self._searches]:
                self._drop(number)
            self._compilers.shutdown(wait=False, cancel_futures=True)
            close(self._link)

    def _obey(self) -> bool:
        """Carry out what is in the inbox, waiting for it while there is nothing else to do; False: stop."""
        while True:
            try:
                order = self._inbox.get(block=not (self._requests or self._searches))
            except queue.Empty:
                return True
            match order:
                case Stop():
                    return False
                case Drop(number):
                    self._drop(number)
                case Compiled(given, _, refusal):
                    if given.number in self._compiling:  # or nobody waits any more
                        self._compiling.remove(given.number)
                        self._refuse(given.number, refusal) if refusal else self._admit(given)
                case Generate() if order.params.structure:
                    self._compiling.add(order.number)
                    self._compilers.submit(self._compile, order)
                case Generate():
                    self._admit(order)
                case Search():
                    self._begin(order)
                case Question(number, name, arguments):
                    self._answer(number, name, arguments)

    def _compile(self, order: Generate) -> None:
        """On a thread of its own: some grammars take seconds, and nobody else is to wait for them."""
        try:
            self._inbox.put(Compiled(order, self._llm.prepare(order.params), None))
        except ValueError as error:
            self._inbox.put(Compiled(order, None, str(error)))

    def _admit(self, order: Generate) -> None:
        outputs: list[Output] = []
        try:
            for prompt in order.prompts:
                outputs += self._llm.add(prompt, order.params, salt=order.salt, adapter=order.adapter)
        except ValueError as error:
            for output in outputs:
                self._llm.abort(output)
            self._refuse(order.number, str(error))
        else:
            self._requests[order.number] = Request(outputs)

    def _begin(self, order: Search) -> None:
        try:
            search = self._llm.add_beams(order.prompt, order.params, salt=order.salt, adapter=order.adapter)
        except ValueError as error:
            self._refuse(order.number, str(error))
        else:
            self._searches[order.number] = search

    def _drop(self, number: int) -> None:
        self._compiling.discard(number)
        if request := self._requests.pop(number, None):
            for output in request.outputs:
                self._llm.abort(output)
        if search := self._searches.pop(number, None):
            self._llm.abort_beams(search)

    def _answer(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        try:
            self._send(Told(number, QUESTIONS[name](self._llm, *arguments)))
        except ValueError as error:
            self._refuse(number, str(error))

    def _publish(self) -> None:
        """Tell what the step brought, to all of them in one frame; and what searches have found."""
        news: Step = []
        for number, request in [*self._requests.items()]:
            if some := [grown(request.outputs[delta.output], delta) for delta in request.feed.news()]:
                news.append((number, some))
            if not request.feed:
                del self._requests[number]
        if news:
            self._send(news)
        for number, search in [*self._searches.items()]:
            if search.beams is not None:
                del self._searches[number]
                self._send(Told(number, search.beams))

    def _refuse(self, number: int, words: str) -> None:
        self._send(Refused(number, words))

    def _send(self, message: Any) -> None:
        self._link.sendall(frame(message))


def grown(number: int, delta: Delta) -> Grown:
    """A delta as it travels."""
    output, start, end = delta.output, delta.start, delta.start + len(delta.tokens)
    return Grown(
        number,
        delta.text,
        delta.tokens,
        output.logprobs[start:end],
        [dict(top) for top in output.top_logprobs[start:end]],
        delta.finish_reason,
        output.score,
        output.cached_tokens,
        output.embedding if output.params.embed else None,
        output.error,
    )


def in_thread(llm: LLM) -> tuple[socket.socket, threading.Thread]:
    """A Host of `llm` in a thread, which ends when the other end of its link, the socket returned, is closed."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=Host(llm, theirs, orders(theirs)).run, name="llmkernels engine", daemon=True)
    thread.start()
    return ours, thread


def close(link: socket.socket) -> None:
    """Close, and wake whoever reads from it."""
    with suppress(OSError):  # the other end was closed before
        link.shutdown(socket.SHUT_RDWR)
    link.close()


def main() -> None:
    """The engine's process.  Its end is the socket's end: it ignores Ctrl-C, which the HTTP side hears as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.showwarning, sys.excepthook = _note, _die
    try:
        code = _serve(socket.socket(fileno=int(sys.argv[1])))
    except (EOFError, ConnectionError):
        code = 0  # nobody is there to be told
    os._exit(code)  # at once, whatever other threads do


def _serve(link: socket.socket) -> int:
    """Load what is asked for and run it; the process's exit code."""
    order: Load = receive(link)
    inbox = orders(link, gone=lambda: os._exit(0))  # from now on: to load can take minutes
    link.sendall(frame(Stage("loading the checkpoint")))
    try:
        llm = LLM(**order.arguments)
        for name, path in order.adapters:
            link.sendall(frame(Stage(f"loading the adapter {name}")))
            llm.load_adapter(name, path)
    except (ValueError, NotImplementedError, OSError) as error:
        link.sendall(frame(Failed(" ".join(str(error).split()))))
        return 2
    gc.freeze()  # the collector need not look through what stays anyway
    Host(llm, link, inbox).run()
    return 0


def _die(kind: type[BaseException], failure: BaseException, trace: TracebackType | None) -> None:
    """What nobody expected is told in full, and ends the process."""
    sys.__excepthook__(kind, failure, trace)
    sys.stderr.flush()
    os._exit(1)


def _note(message: Any, *_: Any, **__: Any) -> None:
    """A warning as one line, as the command line prints it."""
    print(f"llmkernels: note: {str(message).splitlines()[0]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
