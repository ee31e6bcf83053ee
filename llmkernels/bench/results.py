"""Where results are kept: bench/results/<device>.json of a source tree, one file a device."""

import json
import re
from pathlib import Path
from typing import Any

import llmkernels

KEY = ("op", "backend", "dtype", "case")


def place(device: str) -> Path | None:
    """The file for this device; None where llmkernels does not run from a source tree."""
    folder = Path(llmkernels.__file__).parent.parent / "bench" / "results"
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / f"{name}.json" if folder.is_dir() else None


def read(file: Path) -> dict[str, Any]:
    """A report that `write` wrote, or ValueError."""
    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}; run llmkernels bench --json {file} again") from None
    if not isinstance(found, dict) or not {"device", "ceilings", "rows"} <= set(found):
        raise ValueError(f"{file} is not a report of llmkernels bench; it needs device, ceilings and rows")
    return found


def write(file: Path, report: dict[str, Any]) -> None:
    """One row a line, so that a change of one time is a change of one line."""
    text = {name: json.dumps(value) for name, value in report.items() if name not in ("rows", "not_timed")}
    for name in ("rows", "not_timed"):
        text[name] = "[\n" + ",\n".join(json.dumps(row) for row in report[name]) + "\n]"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{" + ",\n".join(f"{json.dumps(name)}: {value}" for name, value in text.items()) + "}\n")


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new report, and of the old one what the new run did not measure.  Each row says when it was recorded.

    A report of another number of threads says nothing about this one and is left out.
    """
    if old["ceilings"].get("threads") != new["ceilings"].get("threads"):
        return new
    measured = {_key(row) for part in ("rows", "not_timed") for row in new[part]}
    merged = dict(new)
    for part in ("rows", "not_timed"):
        kept = [row for row in old.get(part, []) if _key(row) not in measured]
        merged[part] = sorted([*kept, *new[part]], key=_key)
    return merged


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)
