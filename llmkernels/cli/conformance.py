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
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once.")] = 1,
    record: Annotated[
        Path | None,
        typer.Option(help="Add what ran to this file; `llmkernels status` shows llmkernels/evidence/*.json."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run every case of every contract on a backend, against the oracle: what is right, wrong, refused, missing.

    Exit code 1: something failed.
    """
    from llmkernels import discovery, status, testing
    from llmkernels.roofline import check_device, device_name

    discovery.check_name(backend, "--backend")
    check_device(device)
    asked = sum(1 for _ in testing.calls(op, dtype, case))
    if not asked:
        raise ValueError(f"no case fits --op {op} --dtype {dtype} --case {case}; `llmkernels ops` lists ops and dtypes")
    if record and case:
        raise ValueError("--record with --case: a record counts all cases of an op; leave --case out")
    if backend != discovery.REFERENCE and not emulated and (why := discovery.absent(backend)):
        raise ValueError(f"{backend} cannot be used here: {why}")
    missing = testing.missing(backend, op)
    total = sum(call[0].name not in missing for call in testing.calls(op, dtype, case))
    results = []
    with progress(f"{backend} conformance", total) as (bar, task):
        for result in testing.conform(backend, op, dtype, case, device, emulated, jobs):
            results.append(result)
            bar.update(task, advance=1, description=f"{result.op} {result.dtype} {result.case}")
    mode = "emulated" if emulated or discovery.emulating(backend) else "ran"
    name = device_name(device)
    if record:
        isa = None if backend == discovery.REFERENCE else getattr(discovery.package(backend), "isa", None)
        status.write(record, status.summarize(results, mode, name, isa and isa()))
    counts = Counter(result.verdict for result in results)
    if json:
        show_json(report(backend, mode, name, results, missing, asked))
    else:
        _show(backend, mode, name, results, missing, asked)
    if counts["failed"]:
        raise typer.Exit(1)


def report(
    backend: str, mode: str, device: str, results: list["Result"], missing: list[str], asked: int
) -> dict[str, Any]:
    """What --json prints.  taken: the share of the cases asked for, those of missing ops too, that were not refused."""
    counts = Counter(result.verdict for result in results)
    return {
        "backend": backend,
        "mode": mode,
        "device": device,
        "passed": counts["passed"],
        "failed": counts["failed"],
        "refused": counts["refused"],
        "taken": round(_taken(counts) / asked, 4),
        "missing": missing,
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


def _taken(counts: Counter) -> int:
    return counts["passed"] + counts["failed"]


def _show(backend: str, mode: str, device: str, results: list["Result"], missing: list[str], asked: int) -> None:
    from rich.table import Table

    from llmkernels import discovery

    screen = console()
    table = Table("op", "passed", "failed", "refused", "nearest to its tolerance", box=None, header_style="bold")
    for op in dict.fromkeys(r.op for r in results):
        mine = [r for r in results if r.op == op]
        counts = Counter(r.verdict for r in mine)
        shares = [(r.error / r.tolerance, f"{r.dtype} {r.case}") for r in mine if r.error and r.tolerance]
        closest = "{:.0%} of it: {}".format(*max(shares)) if shares else ""
        failed = f"[red]{counts['failed']}[/]" if counts["failed"] else "0"
        table.add_row(op, str(counts["passed"]), failed, str(counts["refused"]), closest)
    for op in missing:
        file = f"{discovery.backends()[backend].replace('.', '/')}/{op}.py"
        table.add_row(op, "[yellow]missing[/]", "", "", f"write {file}")
    screen.print(table)
    if missing:
        screen.print("`llmkernels ops OP` prints the contract that a file answers")
    for op, limits in _limits(results).items():
        screen.print(f"[yellow]refused[/] {op}", soft_wrap=True)
        for reason, count in limits:
            screen.print(f"       {count} cases, such as {reason}", markup=False, soft_wrap=True)
    failures = [r for r in results if r.verdict == "failed"]
    for r in failures[:SHOWN]:
        screen.print(f"[red]failed[/] {r.op} {r.dtype} [bold]{r.case}[/]", soft_wrap=True)
        for reason in r.reasons:
            screen.print(f"       {reason.partition(NEWLINE)[0]}", markup=False, soft_wrap=True)
    if len(failures) > SHOWN:
        screen.print(f"       and {len(failures) - SHOWN} more: --json lists them")
    counts = Counter(r.verdict for r in results)
    words = ", ".join(f"{counts[word]} {colored(word)}" for word in ("passed", "failed", "refused"))
    words += f"; {len(missing)} ops missing" if missing else ""
    words += f"; {_taken(counts) / asked:.0%} of {asked} cases taken" if _taken(counts) < asked else ""
    screen.print(f"{backend} {mode} on {device}: {words}")


def _limits(results: list["Result"]) -> dict[str, list[tuple[str, int]]]:
    """Op -> of each refusal code the commonest reason, and how many cases were refused with that code."""
    reasons: dict[str, dict[str, Counter]] = {}
    for r in results:
        if r.verdict == "refused":
            code = r.reasons[0].partition(" ")[0]
            reasons.setdefault(r.op, {}).setdefault(code, Counter())[r.reasons[0]] += 1
    return {
        op: [(texts.most_common(1)[0][0], texts.total()) for texts in codes.values()] for op, codes in reasons.items()
    }
