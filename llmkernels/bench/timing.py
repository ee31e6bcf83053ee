"""How long a call takes: cold caches, real data, medians, or the best where threads wait for one another.

The same call is made on several copies of its arguments in turn, together larger than the last cache; what is so small
that even MOST_COPIES are not stays in it.  On a GPU the calls are captured in a CUDA graph, as an engine replays steps:
what it costs the host to launch them is another number (dispatch.py).  A call that no graph can hold, since it reads an
answer back, is launched one by one, and Time.launched says so; a buffer larger than L2 is then read before each call.
(Written, its dirty lines would go back to memory while the clock runs: as many bytes again as the L2 holds.)
"""

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

from llmkernels.bench.subject import Subject

ROUNDS = 12  # the best round counts: another program's work only ever adds time, and it comes and goes
LEAST = 3  # calls in a round, however long they take
PATIENCE = 4  # times the budget that a busy machine may cost
LAUNCHES = 10  # calls between two synchronisations of a GPU
MOST_COPIES, MOST_BYTES = 128, 1 << 30
FLUSH_BYTES = 1 << 29  # larger than any GPU's L2; reading it takes about 150 us, longer than a launch
GPU_BYTES = 1 << 28  # all copies of a call on a GPU: five times the L2 of an H100
UNKNOWN_CACHE = 64 << 20


@dataclass(frozen=True)
class Time:
    """seconds of one call; launched: on a GPU, one by one by the host, since no CUDA graph could hold the call."""

    seconds: float
    launched: bool = False


def copies(subject: Subject) -> int:
    """How many copies of the arguments it takes to outgrow the caches."""
    total = GPU_BYTES if subject.device.startswith("cuda") else 2 * last_cache()
    wanted = -(-total // max(subject.nbytes, 1))
    return max(1, min(wanted, MOST_COPIES, MOST_BYTES // max(subject.nbytes, 1)))


def clocked(runs: Sequence[Callable[[], Any]], device: str, budget: float) -> Time:
    """The time of one call: the median on a GPU and on one CPU thread, the best on several.

    Threads wait for one another by spinning, and one that another program has pushed aside keeps all of them waiting
    for its next turn, tens of milliseconds: on a shared machine the median of such calls says nothing.

    Args:
        runs: the call on each copy of its arguments.  Each is made once before the clock starts.
        budget: seconds to spend, more or less.
    """
    import torch

    runs[0]()  # packs, compiles, plans
    once = min(_once(runs[0]) for _ in range(LEAST))
    runs = runs[: max(2, int(budget / once))]  # what is that slow needs no cold caches
    for run in runs[1:]:
        run()
    if device.startswith("cuda"):
        return _gpu_time(runs, device, budget)
    middle = statistics.median if torch.get_num_threads() == 1 else min
    turns = cycle(runs)
    found: list[float] = []
    start = time.perf_counter()
    while not found or (len(found) < ROUNDS and time.perf_counter() - start < PATIENCE * budget):
        found.append(middle(_cpu_times(turns, budget / ROUNDS)))
    return Time(min(found))


def _cpu_times(turns: Iterator[Callable[[], Any]], budget: float) -> list[float]:
    times: list[float] = []
    while sum(times) < budget or len(times) < LEAST:
        times.append(_once(next(turns)))
    return times


def _once(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _gpu_time(runs: Sequence[Callable[[], Any]], device: str, budget: float) -> Time:
    import torch

    if graph := _captured(runs):
        return Time(_gpu_median(lambda: None, graph.replay, budget) / len(runs))
    scratch = torch.ones(FLUSH_BYTES // 4, device=device)
    turns = cycle(runs)
    return Time(_gpu_median(scratch.sum, lambda: next(turns)(), budget), launched=True)


def _captured(runs: Sequence[Callable[[], Any]]) -> Any:
    """A CUDA graph of all the calls, one after the other; None where one of them waits for the GPU."""
    import torch

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for run in runs:
                run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    return graph


def _gpu_median(before: Callable[[], Any], run: Callable[[], Any], budget: float) -> float:
    import torch

    times: list[float] = []
    end = time.perf_counter() + budget
    while not times or time.perf_counter() < end:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(LAUNCHES)]
        for start, stop in marks:
            before()
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(stop) / 1e3 for start, stop in marks]
    return statistics.median(times)


@cache
def last_cache() -> int:
    """Bytes of the last-level caches of all cores."""
    found: dict[tuple[str, str], int] = {}
    for entry in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            size = (entry / "size").read_text().strip()
            level = (entry / "level").read_text().strip()
            shared = (entry / "shared_cpu_list").read_text().strip()
        except OSError:  # a core that is off
            continue
        if number := re.fullmatch(r"(\d+)K", size):
            found[level, shared] = int(number[1]) << 10
    last = max((level for level, _ in found), default="")
    return sum(size for (level, _), size in found.items() if level == last) or UNKNOWN_CACHE
