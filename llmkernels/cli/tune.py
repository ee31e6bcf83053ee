"""`llmkernels tune`: measure which tiles are fastest on this device, into a table that the backend reads."""

import time
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmkernels.cli import app
from llmkernels.cli.screen import console, progress, show_json
from llmkernels.roofline import with_unit

if TYPE_CHECKING:
    from llmkernels.bench.tune import Choice, Skipped


@app.command()
def tune(
    op: Annotated[str | None, typer.Option(help="Only this op.")] = None,
    backend: Annotated[str, typer.Option(help="Whose kernels.")] = "triton",
    dtype: Annotated[str | None, typer.Option(help="Only this dtype.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cuda:1.")] = "cuda",
    replay: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Tune for the calls that llmkernels.ledger.record wrote."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small calls only.")] = False,
    case: Annotated[str, typer.Option(help="Only calls whose name contains this.")] = "",
    minutes: Annotated[float | None, typer.Option(min=0, help="Begin with no further kind of call after that.")] = None,
    most: Annotated[int, typer.Option(min=2, help="Candidates for a kernel and kind of call, at most.")] = 40,
    merge: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Measure nothing: add this table; may be given again."),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The table to add to; otherwise the one in the cache folder.")
    ] = None,
    emulated: Annotated[
        bool, typer.Option("--emulated", help="Through the interpreter, on the CPU: proves the search, not speed.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try other tiles than a backend's own for the calls of the benchmarks, and keep those that are faster.

    A table holds what was faster by more than 3 percent, under the device's name and Triton's version; another device
    never reads it.  LLMKERNELS_TUNED=FILE pins one.  --json tells the time of every candidate.
    """
    from contextlib import nullcontext

    from llmkernels import discovery
    from llmkernels.bench import subjects
    from llmkernels.bench import tune as search
    from llmkernels.bench.replay import recorded
    from llmkernels.roofline import check_device

    if backend != discovery.REFERENCE:
        discovery.check_name(backend, "--backend")
    if not merge:
        device = "cpu" if emulated else device
        check_device(device)
        if not emulated and (why := discovery.absent(backend)):
            raise ValueError(f"{backend} cannot be tuned here: {why}")
    with discovery.emulated(backend) if emulated else nullcontext():
        file = table or search.module(backend).file_of_user()
        known = search.read(file) if file.exists() else {}
        found, end = [], time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        if merge:
            known = search.merge([known, *(search.read(one) for one in merge)])
            search.write(file, known)
        else:
            with progress("calls") as (bar, task):

                def seen(text: str) -> None:
                    bar.update(task, description=text[:100])

                calls = subjects(device, op, dtype, quick, seen, case)
                calls = (one for one in recorded(replay, device, op, dtype) if case in one.case) if replay else calls
                calls = takewhile(lambda _: time.monotonic() < end, calls)
                for choice in search.tune(backend, calls, seen, most=most):
                    found.append(choice)
                    bar.update(task, advance=1)
                    if (
                        isinstance(choice, search.Choice) and choice.gained
                    ):  # written at once: a candidate may yet break the device
                        known = search.merge([known, {choice.key: choice.best}])
                        search.write(file, known)
                    if not json:
                        bar.stop()  # a line printed beside a moving bar would be overwritten
                        _show(choice)
                        bar.start()
    choices = [one for one in found if isinstance(one, search.Choice)]
    skipped = [one for one in found if isinstance(one, search.Skipped)]
    if json:
        rows = [asdict(choice) | {"gained": choice.gained} for choice in choices]
        show_json(
            {"table": str(file), "entries": len(known), "choices": rows, "skipped": [asdict(one) for one in skipped]}
        )
    else:
        gained = sum(choice.gained for choice in choices)
        print(f"{file}: {len(known)} entries; {gained} of {len(choices)} kinds of call became faster", end="")
        print(f"; {len(skipped)} were not tuned" if skipped else "")
        if time.monotonic() >= end:
            print("the time was up; --op names what is to be tuned, --minutes more time")


def _show(choice: "Choice | Skipped") -> None:
    if hasattr(choice, "why"):
        console().print(f"{choice.op:22} {choice.dtype:9} {choice.case:38} {choice.why}", markup=False, soft_wrap=True)
        return
    times = f"{with_unit(choice.own_seconds, 's'):>8} -> {with_unit(choice.best_seconds, 's'):>8}"
    changed = ", ".join(f"{n}={v} (was {choice.own[n]})" for n, v in choice.best.items() if v != choice.own[n])
    words = f"{choice.op:22} {choice.dtype:9} {choice.case:38} {times}  {choice.key.split(' | ', 2)[-1]}: "
    console().print(words + (changed or f"its own is best of {choice.tried}"), markup=False, soft_wrap=True)
