"""What was compiled, as JSON that is kept; what is wrong with it; and what became worse since."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from llmkernels import status
from llmkernels.crosscompile.build import Built
from llmkernels.crosscompile.chips import CHIPS
from llmkernels.crosscompile.resources import Resources

SLACK, SLACK_REGISTERS = 1.1, 8  # registers may rise by a tenth and a granule before it is called worse
NUMBERS = [field.name for field in fields(Resources)]
ROW = {"kernel", "target", "launch", "ops", "timed", "why", *NUMBERS}


def row(built: Built) -> dict[str, Any]:
    """One compiled launch, as it is kept.  Numbers are null where it was not compiled."""
    launch = built.launch
    numbers = asdict(built.resources) if built.resources else dict.fromkeys(NUMBERS)
    ops: dict[str, list[str]] = {}
    for op, dtype in sorted(launch.users):
        ops.setdefault(op, []).append(dtype)
    words = {"kernel": launch.kernel, "target": launch.chip.name, "launch": launch.name, "ops": ops}
    return words | {"timed": launch.timed} | numbers | {"why": built.why}


def faults(one: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a compiled launch."""
    if one["why"]:
        yield one["why"]
        return
    limit = CHIPS[one["target"]].shared_block
    if one["shared"] > limit:
        yield f"takes {one['shared']} bytes of shared memory; {one['target']} has {limit}"
    if one["spills"]:
        yield f"spills {one['spills']} registers to memory"
    if one["products"] and not one["matrix"]:
        yield f"multiplies {', '.join(one['products'])} without a matrix instruction"
    if not one["programs"]:
        yield "no program of it fits a unit"


def worse(rows: Iterable[dict[str, Any]], kept: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows that take more registers, or resident programs fewer, than the same launch did when it was kept.

    Nothing is compared across versions of Triton: another compiler is another answer.
    """
    if kept.get("triton") != version():
        return
    before = {_key(one): one for one in kept["rows"]}
    for one in rows:
        old = before.get(_key(one))
        if old is None or one["registers"] is None or old["registers"] is None:
            continue
        if one["registers"] > SLACK * old["registers"] + SLACK_REGISTERS:
            yield one, f"takes {one['registers']} registers; it took {old['registers']}"
        if one["programs"] < old["programs"] and one["shared"] > SLACK * old["shared"]:
            yield (
                one,
                f"takes {one['shared']} bytes of shared memory, so that fewer programs fit; it took {old['shared']}",
            )


def read(file: Path, columns: set[str] = ROW) -> dict[str, Any]:
    """A kept report.  ValueError where the file holds something else."""
    try:
        value = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}; delete it, or record it again") from None
    rows = value.get("rows") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not all(isinstance(one, dict) and set(one) >= columns for one in rows):
        raise ValueError(f"{file} is not a report of `llmkernels compile`; record it again")
    return value


def write(file: Path, report: Mapping[str, Any], key: Callable[[Mapping[str, Any]], Any] | None = None) -> None:
    """One line a row, so that a difference can be read; ordered by `key`, otherwise kernel, target and launch."""
    rows = ",\n".join(json.dumps(one) for one in sorted(report["rows"], key=key or _key))
    head = {name: value for name, value in report.items() if name not in ("rows", "problems")}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(head)[:-1] + ', "rows": [\n' + rows + "\n]}\n")


def report(backend: str, rows: Iterable[Mapping[str, Any]], problems: Iterable[str]) -> dict[str, Any]:
    return {
        "backend": backend,
        "triton": version(),
        "recorded": time.strftime("%Y-%m-%d"),
        "rows": list(rows),
        "problems": list(problems),
    }


def markdown(rows: Iterable[Mapping[str, Any]], chips: Iterable[str]) -> str:
    """The table of docs/triton.md: what limits each kernel in the calls of the benchmarks, by what was compiled."""
    timed, chips = [one for one in rows if one["timed"] and one["registers"]], list(chips)
    lines = [f"| kernel | {' | '.join(chips)} |", "|---|" + "---|" * len(chips)]
    for kernel in sorted({one["kernel"] for one in timed}):
        cells = [_limits([one for one in timed if (one["kernel"], one["target"]) == (kernel, chip)]) for chip in chips]
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _limits(rows: list[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    share = min(100 * one["in_flight"] / CHIPS[one["target"]].in_flight_needed for one in rows)
    words = [f"{share:.0f} %", f"{100 * min(one['occupancy'] for one in rows):.0f} %"]
    words += [" ".join(sorted({name for one in rows for name in one["matrix"]}))]
    words += [f"spills {max(one['spills'] for one in rows)}" if any(one["spills"] for one in rows) else ""]
    return ", ".join(word for word in words if word)


def evidence(backend: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """For `llmkernels status`: how many launches of each op and dtype were compiled for each chip."""
    counts: dict[tuple[str, str, str], dict[str, int]] = {}
    for one in rows:
        for op, dtypes in one["ops"].items():
            for dtype in dtypes:
                cell = counts.setdefault((op, dtype, one["target"]), dict.fromkeys(status.COUNTS, 0))
                cell["failed" if any(faults(one)) else "passed"] += 1
    facts = {"mode": "compiled", "recorded": time.strftime("%Y-%m-%d"), "versions": status.versions()}
    for (op, dtype, target), cell in counts.items():
        yield {"op": op, "backend": backend, "dtype": dtype, "device": target, **facts, **cell}


def version() -> str:
    return status.versions().get("triton", "")


def _key(one: Mapping[str, Any]) -> tuple[str, str, str]:
    return one["kernel"], one["target"], one["launch"]
