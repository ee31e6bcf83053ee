"""`llmkernels status`: what ran where, what was only emulated or compiled, and what nobody tried."""

from pathlib import Path
from typing import Annotated, Any

import typer

from llmkernels.cli import app
from llmkernels.cli.screen import COLORS, console, show_json


@app.command()
def status(
    op: Annotated[str | None, typer.Option(help="Only this op.")] = None,
    backend: Annotated[str | None, typer.Option(help="Only this backend.")] = None,
    records: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Read the records in this folder instead.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's table.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is known to work where: op x backend x dtype, from recorded runs only."""
    from llmkernels import discovery
    from llmkernels import status as evidence

    if backend:
        discovery.check_name(backend, "--backend")
    table = evidence.rows(evidence.records(records))
    if op and op not in {row["op"] for row in table}:
        raise ValueError(f"--op is {op!r}; the ops are {', '.join(sorted({row['op'] for row in table}))}")
    table = [row for row in table if op in (None, row["op"]) and backend in (None, row["backend"])]
    if json:
        show_json({"rows": table})
    elif markdown:
        print(evidence.markdown(table))
    else:
        _show(table)


def _show(table: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from llmkernels.status import sentence

    grid = Table("op", "backend", "dtype", "evidence", "cases", "recorded", box=None, header_style="bold")
    last = ""
    for row in table:
        if row["evidence"] == "no kernel":
            continue
        cases = "" if row["passed"] is None else f"{row['passed']} passed"
        cases += f", {row['failed']} failed" if row["failed"] else ""
        cases += f", {row['refused']} refused" if row["refused"] else ""
        name, last = ("" if row["op"] == last else row["op"]), row["op"]
        style = COLORS.get(row["evidence"], "")
        grid.add_row(name, row["backend"], row["dtype"], f"[{style}]{sentence(row)}[/]", cases, row["recorded"] or "")
    console().print(grid)
