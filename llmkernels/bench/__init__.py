"""How fast: every backend's time for a call, beside what the device could do and what other libraries take.

    for line in bench.measure("cpu", op="rms_norm", peers=True):
        print(line)

A call is timed only after its answer was checked against the float64 oracle, and so is a peer's.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from llmkernels import ops as _ops  # noqa: F401  declares them
from llmkernels import registry, status
from llmkernels.bench import peers as others
from llmkernels.bench.cases import timed
from llmkernels.bench.dispatch import overhead
from llmkernels.bench.subject import PEER_SLACK, Call, Subject, as_jax, bound
from llmkernels.bench.timing import Time, clocked, copies
from llmkernels.discovery import REFERENCE, Unsupported, absent, backends, emulating, implementation, package
from llmkernels.inputs import inputs
from llmkernels.roofline import Ceilings
from llmkernels.settings import use

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}  # timed where none is named
BUDGET, GPU_BUDGET, QUICK_BUDGET = 0.6, 0.15, 0.1  # seconds spent on each time; graphs of calls settle soon
PLATFORM = "vendor"  # what the platform's own libraries take is every other backend's peer


@dataclass(frozen=True)
class Row:
    """One call on one backend.  Times are seconds; ratio_to_best_peer above 1 means faster than every peer.

    launched: of the backend and the peers, those that no CUDA graph could hold, so that their times include launches.
    """

    op: str
    backend: str
    dtype: str
    case: str
    seconds: float
    limit_seconds: float
    percent_of_limit: float
    peers: dict[str, float]
    ratio_to_best_peer: float | None
    dispatch_seconds: float
    parity_error: float
    tolerance: float
    bytes: float
    operations: float
    arithmetic: str
    launched: list[str] = field(default_factory=list)
    recorded: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))


@dataclass(frozen=True)
class NotTimed:
    """A call that was refused, or answered wrongly, and so was not timed."""

    op: str
    backend: str
    dtype: str
    case: str
    why: str


def subjects(
    device: str,
    op: str | None = None,
    dtype: str | None = None,
    quick: bool = False,
    seen: Callable = lambda text: None,
    part: str = "",
) -> Iterator[Subject]:
    """The calls worth timing on this device whose names contain `part`.  ValueError for an op or dtype unknown."""
    for entry in [registry.get(op)] if op else registry.OPS.values():
        contract = entry.contract
        if dtype not in (None, *contract.dtypes):
            raise ValueError(f"dtype is {dtype!r}; {contract.name} takes {', '.join(contract.dtypes)}")
        for case in (case for case in timed(contract.name, device, quick) if part in case.name):
            for kind in [dtype] if dtype else DTYPES["cuda" if device.startswith("cuda") else "cpu"]:
                seen(f"{contract.name} {kind} {case.name}")
                yield Subject(contract, case.name, kind, inputs(contract, case, kind, device), device)


def measure(
    ceilings: Ceilings, calls: Iterable[Subject], backend: str | None = None, peers: bool = False, quick: bool = False
) -> Iterator[Row | NotTimed]:
    """Time each call on `backend`, or on every backend with a kernel for it; with `peers`, on other libraries too."""
    for subject in calls:
        budget = QUICK_BUDGET if quick else GPU_BUDGET if subject.device.startswith("cuda") else BUDGET
        times: dict[str, tuple[Time, float, float]] = {}
        try:
            _ = subject.oracle, subject.near
        except torch.OutOfMemoryError as error:  # attention in float64 takes room for every pair
            yield NotTimed(subject.contract.name, REFERENCE, subject.dtype, subject.case, _raised(error))
            continue
        for name in [backend] if backend else candidates(subject.contract.name):
            told = _time(subject, name, budget)
            if isinstance(told, str):
                yield NotTimed(subject.contract.name, name, subject.dtype, subject.case, told)
            else:
                times[name] = told
        rivals: dict[str, Time] = {}
        for name, prepare in others.peers(subject.contract.name, quick) if peers and times else ():
            answer = _time_peer(subject, name, prepare, budget)
            if isinstance(answer, str):
                yield NotTimed(subject.contract.name, name, subject.dtype, subject.case, answer)
            elif answer is not None:
                rivals[name] = answer
        for name, took in times.items():
            yield _row(subject, name, took, rivals | _platform(times, name), ceilings)


def candidates(op: str) -> list[str]:
    """The backends that have a kernel for `op` and can be used here; the reference where there is none."""
    here = [b for b in backends() if not absent(b) and not emulating(b) and implementation(b, op)]
    return here or [REFERENCE]


def report(ceilings: Ceilings, lines: Iterable[Row | NotTimed]) -> dict[str, Any]:
    """What `llmkernels bench --json` writes."""
    lines = list(lines)
    return {
        "device": ceilings.device,
        "ceilings": ceilings.json(),
        "versions": status.versions(),
        "rows": [asdict(line) for line in lines if isinstance(line, Row)],
        "not_timed": [asdict(line) for line in lines if isinstance(line, NotTimed)],
    }


def _time(subject: Subject, backend: str, budget: float) -> tuple[Time, float, float] | str:
    """(time, parity error, tolerance), or why the call was not timed."""
    arrays = "torch" if backend == REFERENCE else package(backend).ARRAYS[0]

    def fresh() -> Call:
        return as_jax(subject.copy()) if arrays == "jax" else subject.copy()

    call = fresh()
    try:
        with use(policy="silent", verify=False):
            run = registry.get(subject.contract.name).choose(call, backend).run
    except Unsupported as error:
        return "refused: " + "; ".join(str(reason) for reason in error.refusals[backend])
    try:
        wrong, error_, tolerance = subject.judge(subject.answers(run, call, arrays))
    except Exception as error:  # whatever an implementation raises is told, and the others are still timed
        return _raised(error)
    if wrong:
        return f"fails parity: {wrong}"
    runs = [bound(subject.contract, run, fresh()) for _ in range(copies(subject))]
    if arrays == "jax":
        import jax

        runs = [partial(_wait, jax, run) for run in runs]
    return clocked(runs, "cpu" if arrays == "jax" else subject.device, budget), error_, tolerance


def _wait(jax: Any, run: Callable[[], Any]) -> Any:
    """jax returns before it has computed, and no event of ours sees its streams: the wall clock times it."""
    return jax.block_until_ready(run())


def _time_peer(subject: Subject, name: str, prepare: others.Prepare, budget: float) -> Time | str | None:
    """Its time, or why a peer that tried was not timed; None for a peer that has no answer to this call."""
    call = subject.copy()
    try:
        run = prepare(call)
        if run is None:
            return None
        got = subject.answers(lambda *_, **__: run(), call)
        wrong = subject.judge_own_rounding(got) if name in others.OWN_ROUNDING else subject.judge(got, PEER_SLACK)[0]
    except Exception as error:  # as above; peers are other people's code
        return _raised(error)
    if wrong:
        return f"fails parity: {wrong}"
    runs = [made for _ in range(copies(subject)) if (made := prepare(subject.copy()))]
    return clocked(runs, subject.device, budget)


def _raised(error: Exception) -> str:
    """The first line: torch's errors go on for pages."""
    return f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _platform(times: dict[str, tuple[Time, float, float]], backend: str) -> dict[str, Time]:
    return {f"backend {PLATFORM}": times[PLATFORM][0]} if PLATFORM in times and backend != PLATFORM else {}


def _row(
    subject: Subject,
    backend: str,
    took: tuple[Time, float, float],
    rivals: dict[str, Time],
    ceilings: Ceilings,
) -> Row:
    own, error, tolerance = took
    time_, peers = own.seconds, {name: found.seconds for name, found in rivals.items()}
    limit = ceilings.seconds(subject.cost, subject.arithmetic)
    ratio = min(peers.values()) / time_ if peers else None
    return Row(
        op=subject.contract.name,
        backend=backend,
        dtype=subject.dtype,
        case=subject.case,
        seconds=time_,
        limit_seconds=limit,
        percent_of_limit=100 * limit / time_,
        peers=peers,
        ratio_to_best_peer=ratio,
        dispatch_seconds=overhead(subject.contract.name, subject.dtype, subject.device).dispatch_seconds,
        parity_error=error,
        tolerance=tolerance,
        bytes=subject.cost.bytes,
        operations=subject.cost.operations,
        arithmetic=subject.arithmetic,
        launched=[name for name, found in {backend: own, **rivals}.items() if found.launched],
    )
