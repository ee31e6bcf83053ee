"""What is known to work where: op x backend x dtype, from recorded runs only.

A record is one line of llmkernels/evidence/*.json, written by `llmkernels conformance --record FILE` on the machine
where it ran, or by the compile checks.  Nothing here is typed in by hand: a row without a record says so.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

from llmkernels import discovery

FOLDER = Path(__file__).parent / "evidence"
MODES = ("ran", "emulated", "compiled")  # the strongest first
KEY = ("op", "backend", "dtype", "mode", "device")
ISA = "isa"  # in records of backends that have kernels for several instruction sets: which of them ran
COUNTS = ("passed", "failed", "refused")
FIELDS = {*KEY, *COUNTS, "recorded", "versions"}
WATCHED = ("llmkernels", "torch", "triton", "jax", "jaxlib", "libtpu", "numpy")  # versions worth remembering


def records(folder: Path | None = None) -> list[dict[str, Any]]:
    """Every record in a folder.  ValueError names a file that holds something else."""
    found: list[dict[str, Any]] = []
    for file in sorted((folder or FOLDER).glob("*.json")):
        found += read(file)
    return found


def read(file: Path) -> list[dict[str, Any]]:
    """The records of one file."""
    try:
        value = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}; delete it, or record it again") from None
    found = value.get("records") if isinstance(value, dict) else None
    if not isinstance(found, list) or not all(isinstance(r, dict) and set(r) >= FIELDS for r in found):
        raise ValueError(f"{file} is not a file of records; each needs {', '.join(sorted(FIELDS))}")
    return found


def write(file: Path, new: Iterable[Mapping[str, Any]]) -> None:
    """Add records to a file; each replaces an older one of the same op, backend, dtype, mode, device and ISA."""
    known = {_key(r): r for r in (read(file) if file.exists() else [])} | {_key(r): dict(r) for r in new}
    lines = ",\n".join(json.dumps(known[key]) for key in sorted(known))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"records": [\n' + lines + "\n]}\n")


def summarize(results: Iterable[Any], mode: str, device: str, isa: str | None = None) -> Iterator[dict[str, Any]]:
    """Results of the conformance kit as records: how many cases passed, failed, were refused, per op and dtype.

    A call that the contract forbids never reaches a kernel, so it proves nothing about one and is left out.
    """
    from llmkernels.registry import OPS

    counts: dict[tuple[str, str, str], dict[str, int]] = {}
    for result in results:
        row = counts.setdefault((result.op, result.backend, result.dtype), dict.fromkeys(COUNTS, 0))
        if result.case not in {case.name for case in OPS[result.op].contract.cases if case.raises}:
            row[result.verdict] += 1
    facts = {"mode": mode, "device": device, "recorded": time.strftime("%Y-%m-%d"), "versions": versions()}
    facts |= {ISA: isa} if isa else {}
    for (op, backend, dtype), row in counts.items():
        yield {"op": op, "backend": backend, "dtype": dtype, **facts, **row}


def versions() -> dict[str, str]:
    """What is installed of the packages a result depends on."""
    found = {}
    for name in WATCHED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def rows(known: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each record, and one for each op x backend x dtype that has none."""
    known = list(known)
    table = []
    for op, dtypes in _ops(known).items():
        for backend in [*discovery.backends(), discovery.REFERENCE]:
            kernel = backend in has_kernel(op)
            for dtype in dtypes:
                mine = [r for r in known if (r["op"], r["backend"], r["dtype"]) == (op, backend, dtype)]
                cell = {"op": op, "backend": backend, "dtype": dtype}
                for r in sorted(mine, key=lambda r: (MODES.index(r["mode"]), r["device"], r.get(ISA) or "")):
                    known_of = {k: r.get(k) for k in ("device", ISA, "recorded", *COUNTS)}
                    table.append(cell | {"evidence": _word(r)} | known_of)
                if not mine:
                    word = "no record" if kernel else "no kernel"
                    table.append(cell | {"evidence": word} | dict.fromkeys(("device", ISA, "recorded", *COUNTS)))
    return table


def sentence(row: Mapping[str, Any]) -> str:
    """'ran on NVIDIA H200', 'emulated (40 of 51 cases)', 'compiled for gfx942', 'no record' ..."""
    return " ".join(filter(None, (_known(row), _place(row), _counted(row))))


def _known(row: Mapping[str, Any]) -> str:
    place = {"ran": " on", "failed": " on", "compiled": " for"}
    return str(row["evidence"]) + place.get(row["evidence"], "")


def _place(row: Mapping[str, Any]) -> str:
    """The device, and of its instruction sets the one that ran; where a row has an interpreter's, nothing."""
    if row["evidence"] not in ("ran", "failed", "compiled"):
        return ""
    return row["device"] + (f": {row[ISA]}" if row[ISA] else "")


def _counted(row: Mapping[str, Any]) -> str:
    """Of cases, where some were refused or failed; of what is compiled, of kernels' kinds of launch."""
    if not row["passed"] or not (row["refused"] or row["failed"]):
        return ""
    counted = "kinds" if row["evidence"] == "compiled" else "cases"
    return f"({row['passed']} of {sum(row[name] for name in COUNTS)} {counted})"


def markdown(table: Iterable[Mapping[str, Any]]) -> str:
    """The README's table: of each backend what is known, and of which ops; places that tell the same share a line."""
    told: dict[tuple[str, str], dict[str, dict[str, str]]] = {}  # (backend, what is known) -> place -> op -> but
    for row in _shared(_joined(_of_all_dtypes(table))):
        but = " ".join(filter(None, (row["dtype"] and f"in {row['dtype']}", _counted(row))))
        told.setdefault((row["backend"], _known(row)), {}).setdefault(_place(row), {})[row["op"]] = but
    names = list(dict.fromkeys(op for places in told.values() for ops in places.values() for op in ops))
    lines: dict[tuple[str, str, str], list[str]] = {}
    for (backend, known), places in told.items():
        for place, ops in places.items():
            lines.setdefault((backend, known, _of_ops(ops, len(names))), []).append(place)
    text = ["| backend | what is known | of which ops |", "|---|---|---|"]
    for backend in dict.fromkeys(backend for backend, *_ in lines):
        mine = sorted((line for line in lines if line[0] == backend), key=lambda line: _strength(line[1]))
        for _, known, which in mine:
            where = "; ".join(lines[backend, known, which])
            text.append(f"| `{backend}` | {f'{known} {where}'.strip()} | {which} |")
    return "\n".join(text)


def _strength(known: str) -> int:
    """The strongest evidence first, then what is not known."""
    return [*MODES, "failed", "refuses", "no"].index(known.split()[0])


def _of_ops(ops: Mapping[str, str], count: int) -> str:
    """'all 11', 'all 11, of these `sample` (4 of 5 kinds)', or their names."""
    partly = [f"`{op}` {but}" for op, but in ops.items() if but]
    if len(ops) < count:
        return " ".join([*(f"`{op}`" for op, but in ops.items() if not but), *partly])
    return f"all {count}" + (f", of these {', '.join(partly)}" if partly else "")


def _of_all_dtypes(table: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ in nothing but dtype and counts made one; `dtype` names them where they are not all."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    dtypes: dict[str, dict[str, None]] = {}
    for row in table:
        key = tuple(row[name] for name in ("op", "backend", "evidence", "device", ISA))
        sums = found.setdefault(key, dict(row) | {"dtype": []} | dict.fromkeys(COUNTS, 0))
        sums["dtype"].append(row["dtype"])
        sums |= {name: sums[name] + (row[name] or 0) for name in COUNTS}
        dtypes.setdefault(row["op"], {})[row["dtype"]] = None
    for row in found.values():
        row["dtype"] = "" if len(row["dtype"]) == len(dtypes[row["op"]]) else " ".join(row["dtype"])
    return list(found.values())


def _joined(table: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table with rows that differ in nothing but the instruction set (and the day) made one: 'avx2, avx512'."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in table:
        key = tuple(row[name] for name in ("op", "backend", "dtype", "evidence", "device", *COUNTS))
        names = [found[key][ISA], row[ISA]] if key in found else [row[ISA]]
        found[key] = dict(row) | {ISA: ", ".join(filter(None, names)) or None}
    return list(found.values())


def _shared(table: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table, where targets that the same ops were compiled for tell the dtypes that all of them have.

    What is compiled is a sample, another one for each target: its dtypes would fill a line each.
    """
    rows = [dict(row) for row in table]
    compiled = [row for row in rows if row["evidence"] == "compiled"]
    ops: dict[tuple[str, str], set[str]] = {}
    for row in compiled:
        ops.setdefault((row["backend"], row["device"]), set()).add(row["op"])
    common: dict[tuple[Any, ...], list[str]] = {}
    for row in compiled:
        row["alike"] = (row["backend"], row["op"], *sorted(ops[row["backend"], row["device"]]))
        found = row["dtype"].split()
        known = common.setdefault(row["alike"], found)
        common[row["alike"]] = [name for name in known if name in found] if known and found else known or found
    for row in compiled:
        row["dtype"] = " ".join(common[row.pop("alike")]) or row["dtype"]
    return rows


def has_kernel(op: str) -> list[str]:
    """The backends with a file for `op`, whether or not this machine can use them; the reference always has one."""
    return [name for name in discovery.backends() if _file_exists(name, op)] + [discovery.REFERENCE]


def _file_exists(backend: str, op: str) -> bool:
    try:
        return util.find_spec(f"{discovery.backends()[backend]}.{op}") is not None
    except ImportError:  # a plug-in that cannot be imported; doctor says why
        return False


def _ops(known: list[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Op -> dtypes: of the contracts, or, where torch is missing, of whatever was recorded."""
    try:
        from llmkernels import ops as _declared  # noqa: F401
        from llmkernels.registry import OPS
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("llmkernels"):
            raise
    else:
        return {name: list(OPS[name].contract.dtypes) for name in sorted(OPS)}
    names: dict[str, list[str]] = {}
    for r in sorted(known, key=_key):
        if r["dtype"] not in names.setdefault(r["op"], []):
            names[r["op"]].append(r["dtype"])
    return names


def _word(record: Mapping[str, Any]) -> str:
    if record["failed"] and (record["mode"] != "compiled" or not record["passed"]):
        return "failed"
    return str(record["mode"]) if record["passed"] else "refuses"


def _key(record: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(record.get(name)) for name in (*KEY, ISA))
