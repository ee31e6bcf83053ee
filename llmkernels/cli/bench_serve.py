"""`llmkernels bench serve`: tokens a second and latencies of a server under load, ours or any that speaks OpenAI's."""

import asyncio
import json as json_module
import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkernels.cli.bench import bench_app
from llmkernels.cli.screen import progress, show_json

COLUMNS = (
    f"{'at once':>7} {'requests':>8} {'total tok/s':>11} {'answer tok/s':>12}  {'first token p50/p90/p99 ms':>28}  "
    f"{'between tokens p50/p90/p99 ms':>30}"
)


@bench_app.command("serve")
def bench_serve(
    model: Annotated[str | None, typer.Argument(help="A checkpoint's directory; the shipped one by default.")] = None,
    url: Annotated[str | None, typer.Option(help="Measure this server instead of starting one.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="LLMKERNELS_API_KEY", help="For --url.")] = None,
    name: Annotated[str | None, typer.Option(help="For --url: the model's name; the server's first one.")] = None,
    vocab: Annotated[int, typer.Option(min=20, help="Prompts are random token ids below this one.")] = 1000,
    concurrency: Annotated[str, typer.Option(help="How many clients at once, each in turn.")] = "1,4,16,32",
    per_client: Annotated[int, typer.Option(min=1, help="Requests each client asks.")] = 4,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="Round the weights at load, as in w4a16_g128.")] = None,
    quantize_head: Annotated[str | None, typer.Option(help="The same for the head alone, as in w8a16.")] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the report there; - is the screen.")] = None,
) -> None:
    """Ask a server many requests at once: tokens a second, time to the first token, time between tokens.

    A server that is not ours needs no more than /v1/completions with prompts of token ids and streaming; `ignore_eos`
    is sent to ours only, so others may end answers early, and the counts say so.
    """
    from llmkernels import roofline, status
    from llmkernels.bench import serving

    clients = _numbers(concurrency)
    wishes = {"--dtype": dtype, "--device": device, "--quantize": quantize, "--quantize-head": quantize_head}
    given = [part for flag, value in wishes.items() if value and value != "auto" for part in (flag, value)]
    if url and (model or given):
        raise ValueError(f"--url measures a server that runs; leave out {model or given[0]}, which is for a new one")
    own = nullcontext(url) if url else serving.started(*([model] if model else []), *given)
    rows: list[dict[str, Any]] = []
    with own as address, progress("loading the checkpoint") as (bar, task):
        called = name or asyncio.run(serving.models(address, api_key))[0]
        more = {"model": called} | ({} if url else {"ignore_eos": True})

        def seen(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        if json != "-":
            print(COLUMNS)
        found = serving.measure(
            address, clients, vocab=vocab, per_client=per_client, api_key=api_key, more=more, seen=seen
        )
        for row in found:
            rows.append(row)
            if json != "-":
                bar.stop()  # a line printed beside a moving bar would be overwritten
                print(line(row), flush=True)
                bar.start()
    report = {
        "url": url,
        "model": called,
        "device": None if url else roofline.device_name(device.replace("auto", "cpu")),
        "versions": status.versions(),
        "command": shlex.join(["llmkernels", *sys.argv[1:]]),
        "recorded": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    if json == "-":
        show_json(report)
    elif json:
        Path(json).write_text(json_module.dumps(report, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    """A row of the table."""

    def three(times: dict[str, float] | None) -> str:
        return " ".join(f"{value:8.1f}" for value in times.values()) if times else "-"

    return (
        f"{row['concurrency']:7} {row['requests']:8} {row['total_tokens_per_second']:11.0f} "
        f"{row['answer_tokens_per_second']:12.0f}  {three(row['first_token_ms']):>28}  "
        f"{three(row['between_tokens_ms']):>30}"
    )


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or max(numbers) > 1024:
        raise ValueError(f"--concurrency is {text!r}; give numbers from 1 to 1024 with commas between, as in 1,4,16")
    return numbers
