"""What the registry costs: the public function of an op around a `run` that returns at once, less that run itself.

A real kernel's own time varies by more than dispatch costs, so the cost is measured where nothing else is; it does not
depend on the backend.  The fastest batch of each counts: whatever else the machine does only ever adds time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from llmkernels import registry
from llmkernels.bench.subject import Subject, bound
from llmkernels.dispatch import function_for
from llmkernels.inputs import inputs
from llmkernels.settings import use

BATCH_SECONDS = 2e-4  # calls timed at once


@dataclass(frozen=True)
class Overhead:
    """Seconds a call."""

    op: str
    run_seconds: float
    call_seconds: float
    dispatch_seconds: float


@cache
def overhead(op: str, dtype: str, device: str = "cpu", budget: float = 0.05) -> Overhead:
    """The cost of dispatching a repeated call of `op`, on the first of the contract's cases.

    Index arrays are not read (checked=False): whoever reads them on the host pays for that, not for dispatch.
    """
    entry = registry.get(op)
    case = entry.contract.cases[0]
    call = Subject(entry.contract, case.name, dtype, inputs(entry.contract, case, dtype, device), device).call
    chosen = registry.Choice("nobody", _nothing, "measured")
    probe: Any = SimpleNamespace(
        name=op, contract=entry.contract, checks=entry.checks, choose=lambda call, backend: chosen
    )
    with use(checked=False):
        run, public = (bound(entry.contract, f, call) for f in (_nothing, function_for(probe)))
        return Overhead(op, *_compare(run, public, budget))


def _nothing(*args: Any, **options: Any) -> None:
    """A kernel that takes no time."""


def _compare(run: Callable[[], Any], public: Callable[[], Any], budget: float) -> tuple[float, float, float]:
    """(seconds of run, seconds of public, their difference)."""
    for warm in (run, public, run, public):
        warm()
    count = max(10, round(BATCH_SECONDS / _batch(public, 100)))
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(pairs) < 5:
        pairs.append((_batch(run, count), _batch(public, count)))
    fastest_run, fastest_call = (min(times) for times in zip(*pairs, strict=True))
    return fastest_run, fastest_call, fastest_call - fastest_run


def _batch(run: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count
