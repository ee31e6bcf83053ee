"""`llmkernels ops` lists the contracts; `llmkernels explain` asks every backend about one call."""

import ast
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkernels.cli import app
from llmkernels.cli.screen import colored, console, show_json

if TYPE_CHECKING:
    from llmkernels.contract import Case, Contract
    from llmkernels.registry import Explanation

JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def ops(
    op: Annotated[str | None, typer.Argument(help="Show this op's whole contract.")] = None, json: JSON = False
) -> None:
    """List the operations: shapes, dtypes, options, and which backends have a kernel."""
    from llmkernels import registry
    from llmkernels.status import has_kernel

    chosen = [registry.get(op)] if op else [registry.get(name) for name in sorted(_all_ops())]
    rows = [_summary(entry.contract) | {"backends": has_kernel(entry.name)} for entry in chosen]
    if json:
        show_json({"ops": rows})
    elif op:
        contract = chosen[0].contract
        print(f"{op}{contract.signature}\n\n{_lines(contract.shapes.text)}\n\n{inspect.getdoc(contract.reference)}")
        print(f"\n{rows[0]['cases']} cases; kernels in: {', '.join(rows[0]['backends'])}")
    else:
        _table(rows)


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help="The op, as `llmkernels ops` lists it.")],
    case: Annotated[str | None, typer.Option(help="One of the contract's cases, or a part of its name.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The dtype under test; the contract's first by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="As if the call named this backend.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change an argument of the case: dim=72.")
    ] = None,
    json: JSON = False,
) -> None:
    """Ask every backend about one call: who answers it, who would not, why, and what to change."""
    from llmkernels import registry
    from llmkernels.inputs import inputs
    from llmkernels.roofline import check_device

    check_device(device)
    contract = registry.get(op).contract
    call = inputs(contract, find_case(contract, case, change or []), find_dtype(contract, dtype), device)
    told = registry.get(op).explain(**call, backend=backend)
    if json:
        show_json(explanation_json(told))
    else:
        _show(told)


def explanation_json(told: "Explanation") -> dict[str, Any]:
    return {
        "op": told.op,
        "call": told.call,
        "candidates": [
            {
                "backend": c.backend,
                "verdict": c.verdict,
                "reasons": [{"code": r.code, "reason": r.reason, "fix": r.fix} for r in c.reasons],
            }
            | ({"notes": list(c.notes)} if c.notes else {})
            for c in told.candidates
        ],
        "chosen": told.chosen,
    }


def find_case(contract: "Contract", name: str | None, changes: list[str]) -> "Case":
    """The case called `name`, or the first whose name contains it, with some of its arguments changed."""
    from dataclasses import replace

    cases = [c for c in contract.cases if c.name == name] or [c for c in contract.cases if (name or "") in c.name]
    if not cases:
        known = ", ".join(repr(c.name) for c in contract.cases)
        raise ValueError(f"{contract.name} has no case {name!r}; its cases are {known}")
    changed = dict(_assignment(text) for text in changes)
    takes = inspect.signature(contract.inputs).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    for argument in changed:
        if argument not in takes and not (open_ended and argument in contract.signature.parameters):
            names = [p.name for p in list(takes.values())[1:] if p.kind is not p.VAR_KEYWORD]
            raise ValueError(f"--set {argument}: the cases of {contract.name} take {', '.join(names)}")
    return replace(cases[0], args=dict(cases[0].args) | changed)


def find_dtype(contract: "Contract", dtype: str | None) -> str:
    if dtype not in (None, *contract.dtypes):
        raise ValueError(f"--dtype is {dtype!r}; {contract.name} takes {', '.join(contract.dtypes)}")
    return dtype or contract.dtypes[0]


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: write NAME=VALUE, as in --set dim=72")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word: layout=HND


def _all_ops() -> list[str]:
    from importlib import import_module

    from llmkernels.registry import OPS

    import_module("llmkernels.ops")
    return list(OPS)


def _summary(contract: "Contract") -> dict[str, Any]:
    options = {n: p.default for n, p in contract.signature.parameters.items() if n not in contract.shapes.inputs}
    return {
        "op": contract.name,
        "summary": (inspect.getdoc(contract.reference) or "").partition("\n")[0],
        "shapes": contract.shapes.text,
        "dtypes": {variable: list(names) for variable, names in contract.shapes.dtypes.items()},
        "options": {name: None if default is inspect.Parameter.empty else default for name, default in options.items()},
        "cases": len(contract.cases),
    }


def _lines(shapes: str) -> str:
    """One array a line."""
    return shapes.replace("] ", "]\n").replace(" -> ", "\n-> ").replace("-> ", "\n-> ").replace("\n\n", "\n")


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("op", "what", "dtypes", "cases", "kernels in", box=None, header_style="bold")
    for row in rows:
        dtypes = " ".join(row["dtypes"]["T"])
        table.add_row(row["op"], row["summary"], dtypes, str(row["cases"]), " ".join(row["backends"]))
    console().print(table)


def _show(told: "Explanation") -> None:
    screen = console()
    screen.print(f"[bold]{told.op}[/]")
    for name, value in told.call.items():
        if value != "None":
            screen.print(f"  {name:14} {value}", markup=False)
    screen.print()
    for c in told.candidates:
        screen.print(f"{c.backend:12} {colored(c.verdict)}")
        for r in c.reasons:
            screen.print(f"{'':12} {r.code}: {r.reason}", markup=False)
            screen.print(f"{'':12} -> {r.fix}", markup=False, style="dim")
        for note in c.notes:
            screen.print(f"{'':12} {note}", markup=False)
