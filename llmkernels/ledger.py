"""What ran: op -> backend -> how often and why; and, while recording, the calls themselves.

    llmkernels.ledger.read()       {"rms_norm": {"vendor": {"calls": 12, "why": {"first in order": 12}}}}
    llmkernels.ledger.reset()
    with llmkernels.ledger.record("calls.jsonl"): engine.step()      then: llmkernels bench --replay calls.jsonl

Counts are kept where the memoised dispatch keeps its entries, so that counting costs one addition.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmkernels.settings import use
from llmkernels.shapes import dtype_name


class Tally:
    """How often one implementation answered one op for one reason."""

    __slots__ = ("backend", "calls", "op", "why")

    def __init__(self, op: str, backend: str, why: str):
        self.op, self.backend, self.why, self.calls = op, backend, why, 0


TALLIES: dict[tuple[str, str, str], Tally] = {}
LENGTHS = {"seq_lens", "cu_seqlens_q"}  # the arrays whose values decide how much work a call is


def tally(op: str, backend: str, why: str) -> Tally:
    return TALLIES.setdefault((op, backend, why), Tally(op, backend, why))


def read() -> dict[str, dict[str, dict[str, Any]]]:
    """Op -> backend -> {"calls": how often, "why": {reason: how often}}, since the start or the last reset."""
    book: dict[str, dict[str, dict[str, Any]]] = {}
    for t in TALLIES.values():
        if t.calls:
            row = book.setdefault(t.op, {}).setdefault(t.backend, {"calls": 0, "why": {}})
            row["calls"] += t.calls
            row["why"][t.why] = t.calls
    return book


def reset() -> None:
    for t in TALLIES.values():
        t.calls = 0


class Recorder:
    """Counts each distinct call, in the order they came: op; arrays' dtypes, shapes, strides; options; lengths."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}

    def note(self, op: str, call: Mapping[str, Any]) -> None:
        arguments = {name: _describe(name, value) for name, value in call.items() if value is not None}
        key = json.dumps([op, arguments])
        self.calls.setdefault(key, {"op": op, "arguments": arguments, "count": 0})["count"] += 1


def noted(contract: Any, recorder: Recorder, run: Callable) -> Callable:
    """`run`, noting every call."""

    def note_and_run(*args: Any, **options: Any) -> Any:
        recorder.note(contract.name, contract.bind(*args, **options))
        return run(*args, **options)

    return note_and_run


@contextmanager
def record(path: str | Path) -> Iterator[Recorder]:
    """Write every distinct call made inside the block to `path`, one JSON object a line, with how often it was made."""
    recorder = Recorder()
    with use(recorder=recorder):
        yield recorder
    Path(path).write_text("".join(json.dumps(call) + "\n" for call in recorder.calls.values()))


def _describe(name: str, value: Any) -> Any:
    if not hasattr(value, "shape"):
        return value
    text: dict[str, Any] = {"dtype": dtype_name(value), "shape": list(value.shape)}
    if text["dtype"] == "quantized":
        return text | {"scheme": str(value.scheme)}
    if hasattr(value, "stride"):
        text["strides"] = list(value.stride())
    if name in LENGTHS:
        text["values"] = value.tolist()
    return text
