"""The command line: llmkernels ops | explain | doctor | status | conformance | compile | tune | bench | generate
| serve | chat.

One file per command.  Nothing but typer is imported before a command is chosen: --help must be quick, and doctor must
answer where torch is missing.  A mistake of the user's ends in one line on stderr and exit code 2; a failed check in
exit code 1.

What --json prints is an interface; keys are added, never renamed:

    ops          {ops: [{op, summary, shapes, dtypes, options, cases, backends}]}
    explain      {op, call, candidates: [{backend, verdict, reasons: [{code, reason, fix}]}], chosen}
    doctor       {version, python, versions, cpu, gpus, backends, plugins, build, cache, environment, problems}
    status       {rows: [{op, backend, dtype, evidence, device, isa, recorded, passed, failed, refused}]}
    conformance  {backend, mode, device, passed, failed, refused, missing: [op],
                  cases: [{op, dtype, case, verdict, error, tolerance, reasons}]}
    compile      {backend, triton, recorded, problems,
                  rows: [{kernel, target, launch, ops: {op: [dtype]}, timed, registers, spills, scalar_spills, shared,
                  matrix: {instruction: count}, products, programs, occupancy, in_flight, why}]}
    tune         {table, entries, choices: [{key, op, dtype, case, own, best, own_seconds, best_seconds, tried, refused,
                  gained}], skipped: [{key, op, dtype, case, why}]}
    bench        {device, ceilings, rows: [{op, backend, dtype, case, seconds, limit_seconds, percent_of_limit,
                  peers: {name: seconds}, ratio_to_best_peer, dispatch_seconds, parity_error, tolerance, bytes,
                  operations, recorded}], not_timed: [{op, backend, dtype, case, why}]}
    bench --dispatch  {rows: [{op, run_seconds, call_seconds, dispatch_seconds}]}
    bench serve  {url, model, device, versions, command, recorded, rows: [{concurrency, requests, seconds,
                  prompt_tokens, answer_tokens, cached_tokens, total_tokens_per_second, answer_tokens_per_second,
                  first_token_ms, between_tokens_ms, request_ms: {p50, p90, p99}}]}
    generate     {text, tokens, prompt_tokens, seconds, tokens_per_second,
                  ledger: {op: {backend: {calls, why: {reason: calls}}}}}; with --file all of this for the whole batch,
                  text null, and outputs: [{prompt, text, tokens, prompt_tokens}]

verdict is 'chosen', 'takes' or 'refuses' in explain, 'passed', 'failed' or 'refused' in conformance; mode is 'ran' or
'emulated'; evidence is 'ran', 'emulated', 'compiled', 'failed', 'refuses', 'no kernel' or 'no record'; seconds are
seconds; ratio_to_best_peer is the best peer's time over ours, so that above 1 we are faster; what is not known is null.
"""

import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llmkernels import __version__

ANYWHERE = ("doctor",)  # commands that report a broken environment instead of stopping at it


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        warnings.showwarning = _note
        try:
            return super().invoke(ctx)
        except (ValueError, NotImplementedError, OSError) as error:
            if isinstance(error, BrokenPipeError):  # `llmkernels ops | head`: typer knows what to do
                raise
            message = _one_line(error)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("llmkernels"):  # a fault of ours
                raise
            message = f"this command needs {error.name}, which is not installed; run: pip install {error.name}"
        print(f"llmkernels: {message}", file=sys.stderr)
        raise typer.Exit(2)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LLM kernels behind one door: what there is, what runs where, whether it is right, how fast it is.",
)


def main() -> None:
    # torch reads it once: memory of 2 MB and more on huge pages, without which address translation slows every stream
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    app(prog_name="llmkernels")


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _start(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if ctx.invoked_subcommand not in ANYWHERE:
        check_environment()


def check_environment() -> None:
    """ValueError if a variable asks for a backend or a policy that there is not."""
    from llmkernels import discovery, settings

    asked = settings.environment()
    for variable, name in [("BACKEND", asked.backend), *((op.upper(), name) for op, name in asked.per_op.items())]:
        if name:
            discovery.check_name(name, f"LLMKERNELS_{variable} in the environment")


def _one_line(error: Exception) -> str:
    """An error's message on one line; of an Unsupported the call's name and every reason."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if refusals := getattr(error, "refusals", None):
        reasons = "; ".join(f"{backend}: {reason}" for backend, why in refusals.items() for reason in why)
        return f"{str(error).partition(chr(10))[0]}: {reasons}"
    return " ".join(str(error).split())


def _note(message: Any, *_: Any, **__: Any) -> None:
    """A warning as one line on stderr, without the place in our source that Python would print."""
    lines = str(message).splitlines()
    print(f"llmkernels: note: {lines[0]}" + (f" ({lines[-1].strip()})" if len(lines) > 1 else ""), file=sys.stderr)


from llmkernels.cli import (  # noqa: E402  they register themselves
    bench,
    bench_serve,
    chat,
    compile,
    conformance,
    doctor,
    generate,
    ops,
    serve,
    status,
    tune,
)

__all__ = [
    "app",
    "bench",
    "bench_serve",
    "chat",
    "compile",
    "conformance",
    "doctor",
    "generate",
    "main",
    "ops",
    "serve",
    "status",
    "tune",
]
