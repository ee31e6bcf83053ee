"""`llmkernels serve`: a checkpoint behind an OpenAI-compatible HTTP interface."""

import errno
import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import util
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkernels.cli import app
from llmkernels.cli.generate import DraftModel, GuessDepth, GuessWidth, NGram, speculation
from llmkernels.cli.screen import progress

NEEDS = ("fastapi", "uvicorn", "prometheus_client", "jinja2")
GRACE_SECONDS = 2  # after Ctrl-C, for answers that are nearly there; a second Ctrl-C ends them
POLLED = ("/status", "/health", "/metrics")  # asked for every few seconds: not worth a line each


@app.command()
def serve(
    model: Annotated[str | None, typer.Argument(help="A checkpoint's directory; the shipped one by default.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; its directory's name.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LLMKERNELS_API_KEY", help="Every route but / and /health demands it.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A jinja file, instead of the checkpoint's.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="Round the weights at load, as in w4a16_g128.")] = None,
    quantize_head: Annotated[str | None, typer.Option(help="The same for the head alone, as in w8a16.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, int8, float8_e4m3fn or float8_e5m2.")] = "auto",
    kv_cache_gib: Annotated[float, typer.Option(min=0.001, help="Memory for keys and values, in GiB.")] = 1.0,
    max_sequences: Annotated[int, typer.Option(min=1, help="Requests that run at once; the others wait.")] = 64,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens a step; longer prompts run in chunks.")] = 512,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a prompt and its answer at most.")] = None,
    prefix_reuse: Annotated[bool, typer.Option(help="Keep keys for prompts that begin alike.")] = True,
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a LoRA adapter; may be repeated.")] = None,
    adapter_folder: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Clients may load adapters from here.")
    ] = None,
    draft_model: DraftModel = None,
    ngram: NGram = 0,
    guess_depth: GuessDepth = 4,
    guess_width: GuessWidth = 1,
    compile: Annotated[bool, typer.Option(help="torch.compile the model; first answers wait for it.")] = False,
    until_eof: Annotated[bool, typer.Option(hidden=True, help="End when the standard input does.")] = False,
    access_log: Annotated[bool, typer.Option(help="A line for each request.")] = True,
) -> None:
    """Answer OpenAI's clients: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

    A browser finds a status page at /.  Two processes: this one speaks HTTP, the other computes; Ctrl-C ends both.
    """
    if missing := [package for package in NEEDS if not util.find_spec(package)]:
        raise ValueError(f"{', '.join(missing)} is not installed; pip install 'llmkernels[serve]'")
    if api_key == "":
        raise ValueError("the API key is empty; give one, or leave it out")
    if model is not None and not Path(model).is_dir():
        raise ValueError(f"{model} is not a directory; give a checkpoint's, which holds config.json")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see generate.py
    with _bound(host, port) as listener, progress("starting the engine") as (bar, task):  # a port in use is told first
        import uvicorn

        from llmkernels.models import shipped_model
        from llmkernels.server.app import create_app
        from llmkernels.server.chat import read_template
        from llmkernels.server.head import LimitedHead
        from llmkernels.server.remote import EngineStopped, Process

        path = shipped_model() if model is None else Path(model)
        called = name or path.resolve().name
        template = read_template(path, chat_template)
        arguments = {
            "model_path": str(path),
            "dtype": dtype,
            "device": device,
            "quantize": quantize,
            "quantize_head": quantize_head,
            "kv_cache_dtype": kv_cache_dtype,
            "kv_cache_bytes": int(kv_cache_gib * 2**30),
            "max_sequences": max_sequences,
            "max_batch_tokens": max_batch_tokens,
            "max_length": max_length,
            "prefix_reuse": prefix_reuse,
            "compile": compile,
            "speculation": speculation(draft_model, ngram, guess_depth, guess_width),
        }
        try:
            engine = Process(arguments, _adapters(adapter, called), lambda words: bar.update(task, description=words))
        except EngineStopped as failure:
            raise ValueError(str(failure)) from None
        bar.stop()

        lost = False

        def stop() -> None:
            nonlocal lost
            lost = server.should_exit = True

        answers = create_app(
            engine, called, template=template, api_key=api_key, adapter_folder=adapter_folder, lost=stop
        )
        config = uvicorn.Config(
            answers, http=LimitedHead, access_log=access_log, timeout_graceful_shutdown=GRACE_SECONDS
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its steps of starting are not news
        logging.getLogger("uvicorn.access").addFilter(_worth_a_line)
        server = uvicorn.Server(config)
        chat = "" if template else "; it has no chat template, so only completions (give --chat-template FILE)"
        where = f"{called} answers at {_address(listener)}, with a status page for browsers; Ctrl-C ends it"
        print(f"llmkernels: {where}{chat}", file=sys.stderr)
        if until_eof:
            threading.Thread(target=_wait_for_eof, args=[server], daemon=True).start()
        gc.freeze()  # the collector need not look through what stays anyway
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
        if lost:
            print(f"llmkernels: {engine.epitaph()}; nothing can be answered any more", file=sys.stderr)
            raise typer.Exit(1)


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that will listen there; ValueError where it cannot."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it.  asyncio sets it for sockets whose protocol it knows, which those of a listener do not
        # tell, and without it a chunk may wait for the client's delayed acknowledgement, some 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            listener.bind((host, port))
        except OSError as error:  # socket.gaierror is one
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"port {port} of {host} is in use; give another --port, 0 for a free one") from None
            raise ValueError(f"cannot listen at {host}, port {port}: {error.strerror}; give another --host") from None
        yield listener


def _wait_for_eof(server: Any) -> None:
    while sys.stdin.buffer.read(1 << 16):
        pass
    server.should_exit = True


def _worth_a_line(record: logging.LogRecord) -> bool:
    return not isinstance(record.args, tuple) or record.args[2] not in POLLED  # client, method, path, version, status


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _adapters(wishes: list[str] | None, model: str) -> list[tuple[str, str]]:
    found = []
    for wish in wishes or ():
        label, separator, place = wish.partition("=")
        if not separator or not label or label == model:
            raise ValueError(f"--adapter is {wish!r}; give NAME=PATH, NAME being none of the model's own")
        found.append((label, place))
    return found
