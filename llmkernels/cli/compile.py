"""`llmkernels compile`: what a backend's kernels take of chips that are not here.  For its author, and for CI."""

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkernels.cli import app
from llmkernels.cli.screen import console, progress, show_json

if TYPE_CHECKING:
    from llmkernels.crosscompile.chips import Chip

CACHE = Path("build") / "triton"
MOST = 8
SHOWN = 60  # problems on the screen; --json has them all


@app.command("compile")
def compile_(
    backend: Annotated[str, typer.Option(help="A backend of Triton or Pallas kernels.")] = "triton",
    target: Annotated[
        list[str] | None, typer.Option(help="A chip: sm_90, gfx942, v6e ...; may be given again.  Otherwise all.")
    ] = None,
    op: Annotated[str | None, typer.Option(help="Only this op.")] = None,
    call: Annotated[
        str | None,
        typer.Option(help="Of Pallas kernels, and with --limits: only calls whose name contains this."),
    ] = None,
    limits: Annotated[
        bool, typer.Option("--limits", help="Of the benchmarks' calls: how long each takes at least, and why.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--every", help="Every specialisation, not a choice that has each constant and type once.")
    ] = False,
    most: Annotated[int, typer.Option(min=1, help="At most so many of a kernel on a chip.")] = MOST,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once.")] = min(2, os.cpu_count() or 1),
    patience: Annotated[float, typer.Option(min=1, help="Seconds that one kernel may take to compile.")] = 60,
    cache: Annotated[Path, typer.Option(help="Where Triton keeps what it compiled.")] = CACHE,
    against: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Fail on what is worse than in this report.")
    ] = None,
    load: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Compile nothing: show this report.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Of --load or --limits, print the table of docs/triton.md.")
    ] = False,
    keep: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report there.")] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Add what compiled to this file; `llmkernels status` shows llmkernels/evidence/*.json."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile a backend's kernels for chips that are not here: registers, spills, shared memory, matrix instructions.

    Exit code 1: a kernel that does not compile, is never launched, spills, takes too much
    shared memory, lacks matrix instructions, or is otherwise worse than --against says.
    """
    if backend == "xla":
        from llmkernels.cli.compile_tpu import compile_tpu

        compile_tpu(backend, target, op, call, every, jobs, against, load, keep, record, json)
        return
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default; unset, Triton 3.9 warns of another to come
    from llmkernels import discovery, status
    from llmkernels.crosscompile import chips, launches
    from llmkernels.crosscompile import record as kept
    from llmkernels.crosscompile.build import compile_all

    discovery.check_name(backend, "--backend")
    wanted = [chips.find(name) for name in target or chips.CHIPS]
    if limits:
        _limits(backend, wanted, op, call or "", jobs, patience, cache, load, markdown, keep, json)
        return
    if load:
        names = [chip.name for chip in wanted]
        loaded = [row for row in kept.read(load)["rows"] if row["target"] in names]
        if markdown:
            print(kept.markdown(loaded, names))
        elif json:
            show_json({"rows": loaded})
        else:
            wrong = _sentences([(one, what) for one in loaded for what in kept.faults(one)])
            _show(loaded, wanted, wrong, f"{len(loaded)} specialisations, as kept,")
        return
    if backend == discovery.REFERENCE or not launches.compiles(backend):
        raise ValueError(f"--backend is {backend!r}, which has no Triton kernels")
    old = kept.read(against) if against else None
    with progress("asking what is launched") as (bar, task):
        recorded = launches.record(backend, wanted, cache, op, lambda text: bar.update(task, description=text))
    found, problems = recorded.launches, recorded.problems
    if not op:
        problems += [f"{name} is launched by no call" for name in launches.unreached(backend, found)]
    selected = found if every else launches.chosen(found, most)
    rows = []
    with progress("compiling", len(selected)) as (bar, task):
        for built in compile_all(selected, jobs, patience, cache):
            rows.append(kept.row(built))
            bar.update(task, advance=1, description=f"{built.launch.kernel} {built.launch.chip.name}")
    told = [(one, what) for one in rows for what in kept.faults(one)]
    told += kept.worse(rows, old) if old else []
    problems += _sentences(told)
    report = kept.report(backend, rows, problems)
    if keep:
        kept.write(keep, report)
    if record:
        status.write(record, kept.evidence(backend, rows))
    if json:
        show_json(report)
    else:
        _show(rows, wanted, problems, f"{len(selected)} of {len(found)} specialisations")
    if problems:
        raise typer.Exit(1)


def _limits(
    backend: str,
    wanted: list["Chip"],
    op: str | None,
    call: str,
    jobs: int,
    patience: float,
    cache: Path,
    load: Path | None,
    markdown: bool,
    keep: Path | None,
    json: bool,
) -> None:
    """`llmkernels compile --limits`: the options of compile_.  Exit code 1 where a call's kernels did not compile."""
    from rich.table import Table

    from llmkernels.crosscompile import launches
    from llmkernels.crosscompile import limits as limit
    from llmkernels.crosscompile import record as kept
    from llmkernels.crosscompile.build import compile_all

    if load:
        names = [chip.name for chip in wanted]
        rows = [one for one in limit.read(load)["rows"] if one["target"] in names and op in (None, one["op"])]
        rows, problems = [one for one in rows if call in one["case"]], []
    else:
        with progress("asking what is launched") as (bar, task):
            recorded = launches.record(
                backend, wanted, cache, op, lambda text: bar.update(task, description=text), only_bench=True
            )
        planned = [one for one in recorded.planned if call in one.case]
        selected = list({id(launch): launch for one in planned for launch, _ in one.launches}.values())
        measured, problems = {}, recorded.problems
        with progress("compiling", len(selected)) as (bar, task):
            for built in compile_all(selected, jobs, patience, cache):
                bar.update(task, advance=1, description=f"{built.launch.kernel} {built.launch.chip.name}")
                if built.resources:
                    measured[built.launch] = built.resources
                else:
                    problems.append(f"{built.launch.kernel} on {built.launch.chip.name}: {built.why}")
        rows = sorted(limit.rows(planned, measured), key=limit.key)
    report = limit.report(backend, rows)
    if keep:
        kept.write(keep, report, limit.key)
    if json:
        show_json(report | {"problems": problems})
    elif markdown:
        print(limit.markdown(rows))
    else:
        heads, *lines = limit.table(rows)
        grid = Table(*heads, box=None, header_style="bold")
        for cells in lines:
            grid.add_row(*cells)
        console().print(grid)
        for text in problems:
            console().print(f"[red]failed[/] {text}", soft_wrap=True)
    if problems:
        raise typer.Exit(1)


def _sentences(told: list[tuple[dict[str, Any], str]]) -> list[str]:
    """One sentence for each thing that is wrong with a kernel: where, and for which of its specialisations first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one, what in told:
        groups.setdefault((one["kernel"], what), []).append(one)
    return [
        f"{kernel} on {', '.join(dict.fromkeys(one['target'] for one in ones))}: {what}  "
        f"[{len(ones)} specialisations; {ones[0]['launch']}]"
        for (kernel, what), ones in groups.items()
    ]


def _show(rows: list[dict[str, Any]], chips: list["Chip"], problems: list[str], what: str) -> None:
    """A line a kernel and chip: the worst of its specialisations."""
    from rich.table import Table

    screen = console()
    grid = Table(
        "kernel", "target", "kinds", "registers", "spills", "shared", "matrix", "occupancy", "in flight",
        box=None, header_style="bold",
    )  # fmt: skip
    last = ""
    for kernel in sorted({row["kernel"] for row in rows}):
        for chip in chips:
            mine = [row for row in rows if (row["kernel"], row["target"]) == (kernel, chip.name)]
            good = [row for row in mine if row["registers"] is not None]
            name, last = ("" if kernel == last else kernel), kernel
            if not good:
                grid.add_row(
                    name, chip.name, str(len(mine)), "[red]not compiled[/]" if mine else "[dim]not launched[/]"
                )
                continue
            spills, matrix = max(row["spills"] for row in good), Counter(k for row in good for k in row["matrix"])
            grid.add_row(
                name,
                chip.name,
                str(len(mine)),
                _range(row["registers"] for row in good),
                f"[red]{spills}[/]" if spills else "0",
                f"{max(row['shared'] for row in good) / 1024:.0f} of {chip.shared_block // 1024} KiB",
                " ".join(matrix) or ("[red]none[/]" if any(row["products"] for row in good) else ""),
                f"{100 * min(row['occupancy'] for row in good):.0f}%",
                _range(100 * row["in_flight"] / chip.in_flight_needed for row in good if row["timed"]),
            )
    screen.print(grid)
    for text in problems[:SHOWN]:
        screen.print(f"[red]failed[/] {text}", soft_wrap=True)
    if len(problems) > SHOWN:
        screen.print(f"       and {len(problems) - SHOWN} more: --json lists them")
    screen.print(
        "registers: of a lane; in flight: bytes that the resident programs of benchmarks' calls can have asked for,\n"
        "in percent of what keeps memory busy: below 100, latency is the limit"
    )
    screen.print(f"{what} compiled for {', '.join(chip.name for chip in chips)}: {len(problems)} problems")


def _range(numbers: Any) -> str:
    values = sorted(round(number) for number in numbers)
    return "" if not values else str(values[0]) if values[0] == values[-1] else f"{values[0]}-{values[-1]}"
