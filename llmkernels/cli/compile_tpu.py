"""The part of `llmkernels compile` that is for backends of Pallas kernels."""

from pathlib import Path
from typing import Any

import typer

from llmkernels.cli.screen import console, progress, show_json


def compile_tpu(
    backend: str, target: list[str] | None, op: str | None, call: str | None, every: bool, jobs: int,
    against: Path | None, load: Path | None, keep: Path | None, record: Path | None, json: bool,
) -> None:  # fmt: skip
    """Compile for TPUs, print the table, and exit with 1 where something does not compile, spills or became worse."""
    from llmkernels import status
    from llmkernels.crosscompile import record as kept
    from llmkernels.crosscompile import tpu
    from llmkernels.crosscompile.tpu_calls import calls, chosen

    known = tpu.chips(backend)
    for name in target or ():
        if name not in known:
            raise ValueError(f"--target is {name!r}; the targets of {backend} are {', '.join(known)}")
    targets = target or list(known)
    if load:
        rows = [row for row in kept.read(load, tpu.ROW)["rows"] if row["target"] in targets]
        show_json({"rows": rows}) if json else _show(rows, targets, [])
        return
    old = kept.read(against, tpu.ROW) if against else None
    pairs = ((one, name) for one in calls() for name in targets) if every or call else chosen(targets)
    asked = [(one, name) for one, name in pairs if op in (None, one.op) and (call or "") in one.name]
    if not asked:
        names = ", ".join(dict.fromkeys(one.name if op == one.op else one.op for one in calls()))
        raise ValueError(f"--op is {op!r}, --call is {call!r}; compiled are calls of {names}")
    rows = []
    with progress("compiling", len(asked)) as (bar, task):
        for row in tpu.compile_all(backend, asked, tpu.FOLDER, jobs):
            rows.append(row)
            bar.update(task, advance=1, description=f"{row['launch']} {row['target']}")
    told = [(one, what) for one in rows for what in tpu.faults(one)]
    told += list(tpu.worse(rows, old)) if old else []
    problems = [f"{one['kernel']}, {one['launch']}, on {one['target']}: {what}" for one, what in told]
    report = tpu.report(backend, rows, problems)
    if keep:
        kept.write(keep, report)
    if record:
        status.write(record, tpu.evidence(backend, rows))
    show_json(report) if json else _show(rows, targets, problems)
    if problems:
        raise typer.Exit(1)


def _show(rows: list[dict[str, Any]], targets: list[str], problems: list[str]) -> None:
    """A line a call: what its program takes of each generation."""
    from rich.table import Table

    screen = console()
    grid = Table("op", "call", *targets, box=None, header_style="bold")
    last = ""
    for kernel, call in dict.fromkeys((row["kernel"], row["launch"]) for row in rows):
        mine = {row["target"]: row for row in rows if (row["kernel"], row["launch"]) == (kernel, call)}
        grid.add_row("" if kernel == last else kernel, call, *(_cell(mine.get(name)) for name in targets))
        last = kernel
    screen.print(grid)
    for text in problems:
        screen.print(f"[red]failed[/] {text}", soft_wrap=True)
    screen.print(
        "bundles of the program, MiB of VMEM, share of the matrix unit's slots; spills: vector registers stored"
    )
    screen.print(f"{len(rows)} programs for {', '.join(targets)}: {len(problems)} problems")


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "[dim]not asked[/]"
    if row["why"]:
        return "[red]not compiled[/]"
    words = [str(row["bundles"]), f"{row['vmem'] / 2**20:.1f}M", f"{100 * row['matrix']:.0f}%"]
    return " ".join(words) + (f" [red]spills {row['spills']}[/]" if row["spills"] else "")
