"""`llmkernels generate`: a checkpoint continues text, every hot operation through the registry."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import randbits
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkernels.cli import app
from llmkernels.cli.screen import console, progress, show_json

if TYPE_CHECKING:
    from llmkernels.engine.llm import LLM, Output
    from llmkernels.engine.params import SamplingParams
    from llmkernels.engine.speculative import Speculation

DraftModel = Annotated[
    str | None,
    typer.Option(help="A smaller checkpoint of the same vocabulary guesses ahead; manual-5m-draft is shipped."),
]
NGram = Annotated[int, typer.Option(help="So many last tokens are looked up in the text so far to guess; 0: none.")]
GuessDepth = Annotated[int, typer.Option(help="Tokens in a row that are guessed.")]
GuessWidth = Annotated[int, typer.Option(help="Guesses beside one another at each place.")]

SHIPPED_DRAFT = "manual-5m-draft"
ADAPTER = "adapter"
DEMO_PROMPT = "The ls command lists"  # the shipped checkpoint has read manual pages and nothing else


@app.command()
def generate(
    model: Annotated[str | None, typer.Argument(help="A checkpoint's directory; the shipped one by default.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A prompt a line, answered in one batch.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 200,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens with this much probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="Round the weights at load, as in w4a16_g128.")] = None,
    quantize_head: Annotated[str | None, typer.Option(help="The same for the head alone, as in w8a16.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, int8, float8_e4m3fn or float8_e5m2.")] = "auto",
    adapter: Annotated[Path | None, typer.Option(help="The directory of a LoRA adapter in PEFT's format.")] = None,
    draft_model: DraftModel = None,
    ngram: NGram = 0,
    guess_depth: GuessDepth = 4,
    guess_width: GuessWidth = 1,
    json: Annotated[bool, typer.Option("--json", help="Print JSON at the end instead of streaming.")] = False,
) -> None:
    """Continue a text, streaming; or many, from a file.  What is not given comes from the checkpoint."""
    # Spinning threads starve each other where the machine is shared, so they sleep soon; read when torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from dataclasses import replace

    from llmkernels import ledger
    from llmkernels.engine.llm import LLM

    prompts = _prompts(model, prompt, file)
    with progress("loading the checkpoint"):
        llm = LLM(
            model,
            dtype=dtype,
            device=device,
            quantize=quantize,
            quantize_head=quantize_head,
            kv_cache_dtype=kv_cache_dtype,
            speculation=speculation(draft_model, ngram, guess_depth, guess_width),
        )
    if adapter:
        llm.load_adapter(ADAPTER, adapter)
    wishes: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    wishes |= {"seed": randbits(64) if seed is None else seed, "max_tokens": max_tokens}
    params = replace(llm.default_params, **{name: value for name, value in wishes.items() if value is not None})
    ledger.reset()
    start = time.perf_counter()
    streams = file is None and not json
    outputs = [_stream(llm, prompts[0], params)] if streams else _batch(llm, prompts, params)
    seconds = time.perf_counter() - start
    told = summary(outputs, seconds, ledger.read())
    if json:
        show_json(told if file is None else told | {"outputs": _each(prompts, outputs)})
        return
    if file:
        for text, output in zip(prompts, outputs, strict=True):
            print(f"{text}{output.text}\n")
    print(_sentence(told, params.seed), file=sys.stderr)


def speculation(draft_model: str | None, ngram: int, depth: int, width: int) -> "Speculation | None":
    """What these options ask for; None where neither names who guesses."""
    from llmkernels.engine.speculative import Speculation
    from llmkernels.models import shipped_model

    if draft_model is None and not ngram:
        return None
    path = shipped_model(draft_model) if draft_model == SHIPPED_DRAFT else draft_model
    return Speculation(path, ngram, depth, width)


def summary(outputs: list["Output"], seconds: float, book: dict[str, Any]) -> dict[str, Any]:
    """What --json prints: counts of tokens, the wall clock from the prompt to the last token, what ran."""
    tokens = sum(len(output.tokens) for output in outputs)
    return {
        "text": outputs[0].text if len(outputs) == 1 else None,
        "tokens": tokens,
        "prompt_tokens": sum(len(output.prompt_tokens) for output in outputs),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "ledger": book,
    }


def _each(prompts: list[str], outputs: list["Output"]) -> list[dict[str, Any]]:
    return [
        {"prompt": text, "text": o.text, "tokens": len(o.tokens), "prompt_tokens": len(o.prompt_tokens)}
        for text, o in zip(prompts, outputs, strict=True)
    ]


def _prompts(model: str | None, prompt: str | None, file: Path | None) -> list[str]:
    if prompt is not None and file:
        raise ValueError("--prompt and --file are both given; leave one out")
    if file:
        try:
            prompts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}; convert it") from None
        if not prompts:
            raise ValueError(f"{file} holds no prompt; write one a line")
        return prompts
    if prompt is None and model is not None:
        raise ValueError("nothing to continue; give --prompt TEXT, or --file FILE with a prompt a line")
    return [DEMO_PROMPT if prompt is None else prompt]


def _batch(llm: "LLM", prompts: list[str], params: "SamplingParams") -> list["Output"]:
    """Answer all prompts together, with a bar that counts tokens."""
    outputs = [output for text in prompts for output in llm.add(text, params, adapter=next(iter(llm.adapters), None))]
    with progress("tokens", len(prompts) * params.max_tokens) as (bar, task):
        while any(output.finish_reason is None for output in outputs):
            llm.step()
            bar.update(task, completed=sum(len(output.tokens) for output in outputs))
    return outputs


def _stream(llm: "LLM", prompt: str, params: "SamplingParams") -> "Output":
    """Print the text as it comes; where somebody watches, a status line goes along below it."""
    output = None
    with _status_line() if sys.stdout.isatty() else _plain() as (write, status):
        write(prompt)
        start = time.perf_counter()
        for delta in llm.stream(prompt, params, adapter=next(iter(llm.adapters), None)):
            output = delta.output
            write(delta.text)
            count = len(output.tokens)
            status(f"{count} of {params.max_tokens} tokens, {count / (time.perf_counter() - start):.0f} a second")
    assert output is not None  # a stream ends with a delta, however short
    return output


@contextmanager
def _plain() -> Iterator[tuple[Any, Any]]:
    """Text to a pipe or a file, as soon as it is there; a bar on stderr if that is a terminal."""

    def write(text: str) -> None:
        print(text, end="", flush=True)

    with progress("tokens") as (bar, task):
        yield write, lambda text: bar.update(task, description=text)
    print()


@contextmanager
def _status_line() -> Iterator[tuple[Any, Any]]:
    """Text on a terminal: whole lines stay where they are printed, the last one and the status are drawn anew."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    screen = console()
    line, words = "", ""
    with Live(console=screen, transient=True, refresh_per_second=12) as live:

        def write(text: str) -> None:
            nonlocal line
            *whole, line = (line + text).split("\n")
            for done in whole:
                screen.print(done, markup=False)
            show()

        def status(text: str) -> None:
            nonlocal words
            words = text
            show()

        def show() -> None:
            live.update(Group(Text(line), Text(words, style="dim")))

        yield write, status
    screen.print(line, markup=False)


def _sentence(told: dict[str, Any], seed: int | None) -> str:
    """'200 tokens in 1.2 s, 170 a second; seed 7; cpu answered 5000 calls, reference 200'"""
    calls: dict[str, int] = {}
    for backends in told["ledger"].values():
        for backend, row in backends.items():
            calls[backend] = calls.get(backend, 0) + row["calls"]
    who = ", ".join(f"{backend} {count}" for backend, count in sorted(calls.items(), key=lambda item: -item[1]))
    speed = f"{told['tokens']} tokens in {told['seconds']:.1f} s, {told['tokens_per_second']:.0f} a second"
    return f"llmkernels: {speed}; seed {seed}; op calls: {who}"
