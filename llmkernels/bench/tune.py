"""Which tiles are fastest on this device: a search around a backend's own choice, one parameter at a time.

A backend that can be tuned has a module `_tuned` whose `choose` every launch asks.  While a call is tuned, `choose`
asks the search instead, which first sees what the call's kernels choose by themselves, and then tries other values.  A
candidate is timed only after its answer was checked against the float64 oracle, like every other timing here.
"""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from llmkernels import registry
from llmkernels.bench.subject import Subject, bound
from llmkernels.bench.timing import clocked, copies
from llmkernels.discovery import Unsupported, backends
from llmkernels.settings import use

Tiles = dict[str, Any]
Clock = Callable[[Subject, Callable], float | str]  # seconds of a call, or why there is nothing to time
MARGIN = 0.03  # a choice that gains less than this is noise, and stays what it was
BUDGET = 0.05  # seconds spent on timing a candidate
REPEATS = 5  # times that the winner and the backend's own choice are timed in turn, at the end


@dataclass(frozen=True)
class Choice:
    """One kernel's tiles for one kind of call: the backend's own, the best that was found, and what a call takes."""

    key: str
    op: str
    dtype: str
    case: str
    own: Tiles
    best: Tiles
    own_seconds: float
    best_seconds: float
    tried: int
    refused: int  # candidates that did not compile or answered wrongly
    candidates: list[tuple[Tiles, float | str]]  # each that was tried, with its seconds or why it has none

    @property
    def gained(self) -> bool:
        return self.best != self.own


@dataclass(frozen=True)
class Skipped:
    """A kind of call that was not tuned, because the backend's own tiles gave no right answer to time."""

    key: str
    op: str
    dtype: str
    case: str
    why: str


def module(backend: str) -> ModuleType:
    """The module that answers for the backend's tiles.  ValueError where it has none."""
    name = f"{backends()[backend]}._tuned" if backend in backends() else ""
    if not name or not util.find_spec(name):
        raise ValueError(f"--backend is {backend!r}, whose kernels have nothing to tune")
    return import_module(name)


def tune(
    backend: str,
    calls: Iterable[Subject],
    seen: Callable[[str], None] = lambda text: None,
    clock: Clock | None = None,
    most: int = 40,
) -> Iterator[Choice | Skipped]:
    """The best tiles for every kernel that each call launches; a kind of call is tuned once.

    Args:
        seen: told what is being tried.
        clock: what times a candidate, if not this device.
        most: candidates tried for a kernel and kind of call, at most.

    Raises:
        RuntimeError: a candidate broke the device, so that nothing more can be measured in this process.
    """
    tuned, done = module(backend), set[str]()
    for subject in calls:
        try:
            with use(policy="silent", verify=False):
                run = registry.get(subject.contract.name).choose(subject.call, backend).run
        except Unsupported:
            continue
        own: dict[str, Tiles] = {}
        with tuned.answered_by(lambda key, tiles, own=own: own.setdefault(key, dict(tiles))):
            bound(subject.contract, run, subject.copy())()
        for key in [key for key in own if key not in done]:
            done.add(key)
            yield _search(tuned, subject, run, key, own, seen, clock or _time, most)


def _search(
    tuned: ModuleType,
    subject: Subject,
    run: Callable,
    key: str,
    own: dict[str, Tiles],
    seen: Callable[[str], None],
    clock: Clock,
    most: int,
) -> Choice | Skipped:
    """Walk from the backend's own tiles to a neighbour that is faster, as long as there is one."""
    times: dict[str, float | str] = {}
    heuristic = own[key]

    def took(tiles: Tiles) -> float | str:
        name = json.dumps(tiles)
        if name not in times:
            seen(f"{key}: {name}")
            with tuned.answered_by(lambda asked, was: tiles if asked == key else was):
                times[name] = clock(subject, run)
        return times[name]

    best, best_seconds = heuristic, took(heuristic)
    about = (subject.contract.name, subject.dtype, subject.case)
    if isinstance(best_seconds, str):
        return Skipped(key, *about, best_seconds)
    own_seconds = best_seconds
    moved = True
    while moved:
        moved = False
        for candidate in neighbours(best):
            if len(times) >= most or not tuned.sound(candidate, heuristic):
                continue
            if not isinstance(t := took(candidate), str) and t < best_seconds * (1 - MARGIN):
                best, best_seconds, moved = candidate, t, True
    tried, refused = len(times), sum(isinstance(t, str) for t in times.values())
    candidates = [(json.loads(name), seconds) for name, seconds in times.items()]
    if best != heuristic:
        rounds = []
        for _ in range(REPEATS):  # in turn, so that a clock that drifts favours neither
            times.clear()
            rounds.append((took(heuristic), took(best)))
        whole = [pair for pair in rounds if not any(isinstance(t, str) for t in pair)]
        if len(whole) < REPEATS:  # an answer that is wrong now and then is wrong
            return Skipped(key, *about, f"not always right: {next(t for p in rounds for t in p if isinstance(t, str))}")
        own_seconds, best_seconds = (statistics.median(column) for column in zip(*whole, strict=True))
        if best_seconds > own_seconds * (1 - MARGIN):
            best, best_seconds = heuristic, own_seconds
    return Choice(key, *about, heuristic, best, own_seconds, best_seconds, tried, refused, candidates)


def neighbours(tiles: Tiles) -> Iterator[Tiles]:
    """Tiles with one parameter changed: twice, half, one stage more or less, the other of two."""
    for name, value in tiles.items():
        if isinstance(value, bool):
            yield tiles | {name: not value}
        elif isinstance(value, int):
            steps = (value + 1, value - 1) if name == "num_stages" else (2 * value, value // 2)
            yield from (tiles | {name: step} for step in steps if step > 0)


def _time(subject: Subject, run: Callable) -> float | str:
    try:
        wrong, _, _ = subject.judge(subject.answers(run, subject.copy()))
        if wrong:
            return f"fails parity: {wrong}"
        runs = [bound(subject.contract, run, subject.copy()) for _ in range(copies(subject))]
        return clocked(runs, subject.device, BUDGET).seconds
    except Exception as error:  # tiles that do not compile, or do not fit, are no candidates
        if subject.device.startswith("cuda"):
            _raise_if_broken(subject.device)
        return f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _raise_if_broken(device: str) -> None:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise RuntimeError(f"a candidate broke the device ({said}); what was found before it is kept") from None


def merge(tables: Iterable[Mapping[str, Tiles]]) -> dict[str, Tiles]:
    """One table of several; of two entries for one kind of call the later one stays."""
    merged: dict[str, Tiles] = {}
    for table in tables:
        merged |= table
    return dict(sorted(merged.items()))


def read(file: Path) -> dict[str, Tiles]:
    """A table.  ValueError where the file holds something else."""
    try:
        value = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON: {error}; delete it, or tune again") from None
    if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
        raise ValueError(f"{file} is no table of tuned tiles; `llmkernels tune` writes one")
    return value


def write(file: Path, table: Mapping[str, Tiles]) -> None:
    """One entry a line.  Written aside and renamed, so that a reader never sees half of it."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(tiles)}" for key, tiles in table.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text("{\n" + lines + "\n}\n")
    aside.replace(file)
