"""`llmkernels conformance`: is a backend right?  For its author, for CI, and for the record."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkernels.cli import app
from llmkernels.cli.screen import colored, console, progress, show_json

if TYPE_CHECKING:
    from llmkernels.testing import Result

NEWLINE = "\n"
SHOWN = 40  # failures in the table; --json has them all


@app.command()
def conformance(
    backend: Annotated[str, typer.Option(help="The backend to examine, as `llmkernels doctor` lists it.")],
    op: Annotated[str | None, typer.Option(help="Only this op.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Only this dtype.")] = None,
    case: Annotated[str | None, typer.Option(help="Only cases whose name contains this.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    emulated: Annotated[
        bool, typer.Option("--emulated", help="Run the kernels through the emulation the backend offers, on the CPU.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once, on the CPU.")] = 1,
    record: Annotated[
        Path | None,
        typer.Option(help="Add what ran to this file; `llmkernels status` shows llmkernels/evidence/*.json."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run every case of every contract on a backend and compare with the oracle.  Exit code 1: something failed."""
    from llmkernels import discovery, status, testing
    from llmkernels.roofline import check_device, device_name

    discovery.check_name(backend, "--backend")
    check_device(device)
    total = sum(1 for _ in testing.calls(op, dtype, case))
    if not total:
        raise ValueError(f"no case fits --op {op} --dtype {dtype} --case {case}; `llmkernels ops` lists ops and dtypes")
    if record and case:
        raise ValueError("--record with --case: a record counts all cases of an op; leave --case out")
    results = []
    with progress(f"{backend} conformance", total) as (bar, task):
        for result in testing.conform(backend, op, dtype, case, device, emulated, jobs):
            results.append(result)
            bar.update(task, advance=1, description=f"{result.op} {result.dtype} {result.case}")
    mode, name = ("emulated" if emulated else "ran"), device_name(device)
    if record:
        status.write(record, status.summarize(results, mode, name))
    counts = Counter(result.verdict for result in results)
    if json:
        show_json(report(backend, mode, name, results))
    else:
        _show(backend, mode, name, results)
    if counts["failed"]:
        raise typer.Exit(1)


def report(backend: str, mode: str, device: str, results: list["Result"]) -> dict[str, Any]:
    """What --json prints."""
    counts = Counter(result.verdict for result in results)
    return {
        "backend": backend,
        "mode": mode,
        "device": device,
        "passed": counts["passed"],
        "failed": counts["failed"],
        "refused": counts["refused"],
        "cases": [
            {
                "op": r.op,
                "dtype": r.dtype,
                "case": r.case,
                "verdict": r.verdict,
                "error": r.error,
                "tolerance": r.tolerance,
                "reasons": r.reasons,
            }
            for r in results
        ],
    }


def _show(backend: str, mode: str, device: str, results: list["Result"]) -> None:
    from rich.table import Table

    screen = console()
    table = Table("op", "passed", "failed", "refused", "nearest to its tolerance", box=None, header_style="bold")
    for op in dict.fromkeys(r.op for r in results):
        mine = [r for r in results if r.op == op]
        counts = Counter(r.verdict for r in mine)
        shares = [(r.error / r.tolerance, f"{r.dtype} {r.case}") for r in mine if r.error and r.tolerance]
        closest = "{:.0%} of it: {}".format(*max(shares)) if shares else ""
        failed = f"[red]{counts['failed']}[/]" if counts["failed"] else "0"
        table.add_row(op, str(counts["passed"]), failed, str(counts["refused"]), closest)
    screen.print(table)
    failures = [r for r in results if r.verdict == "failed"]
    for r in failures[:SHOWN]:
        screen.print(f"[red]failed[/] {r.op} {r.dtype} [bold]{r.case}[/]", soft_wrap=True)
        for reason in r.reasons:
            screen.print(f"       {reason.partition(NEWLINE)[0]}", markup=False, soft_wrap=True)
    if len(failures) > SHOWN:
        screen.print(f"       and {len(failures) - SHOWN} more: --json lists them")
    counts = Counter(r.verdict for r in results)
    words = ", ".join(f"{counts[word]} {colored(word)}" for word in ("passed", "failed", "refused"))
    screen.print(f"{backend} {mode} on {device}: {words}")
