"""Compile many launches in processes of their own, so that one that never ends can be stopped.

Triton's cache keeps what compiled; a second run only reads it again.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from llmkernels.crosscompile.launches import Launch
from llmkernels.crosscompile.resources import Resources, measure


@dataclass(frozen=True)
class Built:
    """A launch, and what it takes of its chip, or why it was not compiled."""

    launch: Launch
    seconds: float
    resources: Resources | None = None
    why: str = ""


def compile_all(launches: Sequence[Launch], jobs: int, patience: float, cache: Path) -> Iterator[Built]:
    """Every launch, compiled, in the order in which they end.

    Args:
        jobs: processes at once.
        patience: seconds that one may take; its process is killed then.
        cache: the folder that Triton keeps its results in.
    """
    os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())
    todo = list(reversed(range(len(launches))))
    busy: dict[Connection, _Worker] = {}
    idle: list[_Worker] = []
    try:
        while todo or busy:
            while todo and len(busy) < jobs:
                worker = idle.pop() if idle else _Worker(launches)
                worker.give(todo.pop())
                busy[worker.pipe] = worker
            ready = wait(list(busy), timeout=0.5)
            for pipe, worker in list(busy.items()):
                launch = launches[worker.number]
                if pipe in ready:
                    del busy[pipe]
                    built = worker.take(launch)
                    if worker.process.is_alive():
                        idle.append(worker)
                    yield built
                elif worker.seconds > patience:
                    del busy[pipe]
                    worker.kill()
                    yield Built(launch, worker.seconds, why=f"did not end in {patience:.0f} s")
    finally:
        for worker in [*idle, *busy.values()]:
            worker.kill()


class _Worker:
    """A forked process that compiles the launches whose numbers it is told.

    Forked, because what a launch holds cannot be pickled; kept, because loading a compiler takes half a second.
    """

    number: int
    since: float

    def __init__(self, launches: Sequence[Launch]):
        self.pipe, theirs = multiprocessing.Pipe()
        context: Any = multiprocessing.get_context("fork")
        self.process = context.Process(target=_work, args=(launches, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, number: int) -> None:
        self.number, self.since = number, time.perf_counter()
        self.pipe.send(number)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.since

    def take(self, launch: Launch) -> Built:
        try:
            resources, why = self.pipe.recv()
        except EOFError:  # LLVM aborts where it does not know what to do
            self.process.join()
            resources, why = None, f"the compiler died with exit code {self.process.exitcode}"
        return Built(launch, self.seconds, resources, why)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(launches: Sequence[Launch], pipe: Connection) -> None:
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        answer: tuple[Resources | None, str]
        try:
            answer = (_compiled(launches[number]), "")
        except Exception as error:  # whatever a compiler raises is why the kernel was not compiled
            answer = (None, _raised(error))
        pipe.send(answer)


def _raised(error: BaseException) -> str:
    """The innermost message, and the line of source that it is about: Triton prints the whole kernel around them."""
    line = ""
    while True:
        source, node = getattr(error, "src", None), getattr(error, "node", None)
        if source and node:
            line = f", in: {source.splitlines()[node.lineno - 1].strip()}"
        if not error.__cause__:
            break
        error = error.__cause__
    said = getattr(error, "error_message", None) or str(error)
    return f"{type(error).__name__}: {' '.join(str(said).split())[:300]}{line}"


def _compiled(launch: Launch) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chip = launch.chip
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    target = GPUTarget(chip.vendor, chip.arch, chip.wave)
    kernel = triton.compile(source, target=target, options=dict(launch.options))
    return measure(kernel, chip, launch.options["num_warps"])
