"""`llmkernels bench`: how fast, how near the device's limit, and how much faster or slower than others."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkernels.cli import app
from llmkernels.cli.screen import console, progress, show_json
from llmkernels.roofline import with_unit

if TYPE_CHECKING:
    from llmkernels.roofline import Ceilings

COLUMNS = f"{'op':22} {'backend':10} {'dtype':9} {'case':38} {'time':>8} {'of limit':>8}  {'best peer':24} {'speed':>6}"
BEYOND = 105  # percent of the limit that noise does not explain
FASTER, SLOWER = 1.05, 0.95  # what a ratio must differ from 1 by to be coloured


bench_app = typer.Typer(invoke_without_command=True)
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def bench(
    ctx: typer.Context,
    op: Annotated[str | None, typer.Option(help="Only this op.")] = None,
    backend: Annotated[str | None, typer.Option(help="Only this backend; otherwise all that are here.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Only this dtype.")] = None,
    case: Annotated[str, typer.Option(help="Only calls whose name contains this.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    peers: Annotated[bool, typer.Option("--peers", help="Time other libraries on the same calls.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small calls, a minute in all; kept only with --json.")
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Time the calls that llmkernels.ledger.record wrote."),
    ] = None,
    dispatch: Annotated[bool, typer.Option("--dispatch", help="Only what the registry costs, for each op.")] = False,
    load: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Measure nothing: show or plot this report.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure the ceilings again: they can only rise.")] = False,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the report there; - is the screen.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the roofline picture.")] = None,
) -> None:
    """Measure each call: its time, the share of what this device could do, the ratio to the best peer."""
    if ctx.invoked_subcommand:
        return
    from llmkernels import discovery, registry
    from llmkernels.bench import measure, results, subjects
    from llmkernels.bench import report as make_report
    from llmkernels.bench.replay import recorded
    from llmkernels.roofline import check_device

    if backend:
        discovery.check_name(backend, "--backend")
        if discovery.emulating(backend):
            raise ValueError(f"{backend} is emulated in this environment; how long that takes says nothing of a device")
    check_device(device)
    if op:
        registry.get(op)  # a wrong name is told before anything is measured
    for file in (plot, Path(json) if json and json != "-" else None):
        if file and not file.absolute().parent.is_dir():
            raise ValueError(f"{file.parent} is not a directory, and {file.name} is to lie there: make it first")
    if plot:
        _needs_matplotlib()
    if dispatch:
        _dispatch(op, dtype, device, json)
        return
    if load:
        report = results.read(load)
    else:
        silent = json == "-"
        ceilings = _ceilings(device, fresh, silent)
        with progress("calls") as (bar, task):

            def seen(text: str) -> None:
                bar.update(task, description=text, advance=1)

            calls = recorded(replay, device, op, dtype) if replay else subjects(device, op, dtype, quick, seen, case)
            lines = []
            for line in measure(ceilings, calls, backend, peers, quick):
                lines.append(line)
                if not silent:
                    bar.stop()  # a line printed beside a moving bar would be overwritten
                    _show(vars(line))
                    bar.start()
        if not lines:
            raise ValueError(f"no call fits --op {op} --dtype {dtype} --case {case}; leave --case out to see them all")
        report = make_report(ceilings, lines)
        if not quick and not replay and (kept := results.place(report["device"])):
            results.write(kept, results.merge(results.read(kept), report) if kept.exists() else report)
            print(f"llmkernels: kept in {kept}", file=sys.stderr)
        if beyond := sum(row["percent_of_limit"] > BEYOND for row in report["rows"]):
            say = "the limit was measured on a busy machine, or the data stayed in a cache; try --fresh"
            print(f"llmkernels: {beyond} calls took less than the limit allows: {say}", file=sys.stderr)
    if json == "-":
        show_json(report)
    elif json:
        results.write(Path(json), report)
    elif load:
        print(COLUMNS)
        for row in report["rows"]:
            _show(row)
    if plot:
        from llmkernels.bench.plot import draw

        draw(report, plot)
        print(f"llmkernels: drew {plot}", file=sys.stderr)


def _ceilings(device: str, fresh: bool, silent: bool) -> "Ceilings":
    from llmkernels.roofline import measure

    with progress("the device's ceilings") as (bar, task):
        found = measure(device, fresh=fresh, say=lambda text: bar.update(task, description=text))
    if not silent:
        _show_ceilings(found)
        print(COLUMNS)
    return found


def _show_ceilings(ceilings: "Ceilings") -> None:
    threads = f", {ceilings.threads} threads" if ceilings.threads else ""
    speeds = [f"{name} {with_unit(v, 'B/s')}" for name, v in ceilings.bandwidth.items()]
    rates = [f"{name} {with_unit(v, 'op/s')}" for name, v in ceilings.rates.items()]
    print(f"{ceilings.device}{threads}: memory {', '.join(speeds)}; products {', '.join(rates)}\n")


def _show(row: dict[str, Any]) -> None:
    screen = console()
    call = f"{row['op']:22} {row['backend']:10.10} {row['dtype']:9} {row['case']:38}"
    if "why" in row:
        screen.print(f"{call} {row['why']}", style="dim", markup=False, soft_wrap=True)
        return
    text = f"{call} {with_unit(row['seconds'], 's'):>8} {row['percent_of_limit']:7.0f}%"
    style = ""
    if row["peers"]:
        best = min(row["peers"], key=row["peers"].get)
        ratio = row["ratio_to_best_peer"]
        style = "green" if ratio > FASTER else "red" if ratio < SLOWER else ""
        text += f"  {best:24} {ratio:5.2f}x"
    screen.print(text, style=style, markup=False, soft_wrap=True)


def _dispatch(op: str | None, dtype: str | None, device: str, json: str | None) -> None:
    from dataclasses import asdict

    from llmkernels import ops as _declared  # noqa: F401
    from llmkernels import registry
    from llmkernels.bench.dispatch import overhead
    from llmkernels.cli.ops import find_dtype

    entries = [registry.get(op)] if op else [registry.OPS[name] for name in sorted(registry.OPS)]
    rows = [overhead(e.name, find_dtype(e.contract, dtype), device, 0.3) for e in entries]
    if json == "-":
        show_json({"rows": [asdict(row) for row in rows]})
        return
    print(f"{'op':24} {'run':>8} {'call':>8} {'dispatch':>9}   microseconds; run is a kernel that returns at once")
    for row in rows:
        print(
            f"{row.op:24} {1e6 * row.run_seconds:8.2f} {1e6 * row.call_seconds:8.2f} {1e6 * row.dispatch_seconds:9.2f}"
        )


def _needs_matplotlib() -> None:
    import matplotlib  # noqa: F401  a missing package is said before minutes of measuring
