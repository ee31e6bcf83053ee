"""A server's throughput and latency under load: what `llmkernels bench serve` measures.

Closed loop: each of `concurrency` clients asks its next request when the last one is answered, greedy, with an answer
of exactly the length asked for.  Every rate of concurrency has its own prompts, so that no prefix is found again.
"""

import asyncio
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llmkernels.bench.load import Asked, Connection, drive, summary

PROMPT, ANSWER = (64, 192), (32, 96)  # tokens, from to; drawn evenly
START_SECONDS, STOP_SECONDS = 120, 10


def workload(count: int, vocab: int, seed: int) -> list[Asked]:
    """`count` requests of random tokens, the same ones for the same seed; the first 10 ids are left to be special."""
    draw = random.Random(seed)
    return [
        Asked([draw.randrange(10, vocab) for _ in range(draw.randint(*PROMPT))], draw.randint(*ANSWER))
        for _ in range(count)
    ]


def most(concurrency: int, per_client: int) -> int:
    """How many requests to ask at this concurrency: two rounds at least, so that some arrive while others run."""
    return max(4, per_client * concurrency)


def measure(
    url: str,
    concurrency: Sequence[int],
    *,
    vocab: int,
    per_client: int,
    api_key: str | None = None,
    more: dict[str, Any] | None = None,
    seen: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Iterator[dict[str, Any]]:
    """A summary for each concurrency, as it is known; seen(what, done, of) tells how far it is.

    Raises:
        ValueError: the server refuses a request.  OSError: it cannot be reached.
    """
    fields = {"ignore_eos": True} if more is None else more
    asyncio.run(drive(url, workload(2, vocab, 0), 2, api_key, fields))  # what is done once is not timed
    for clients in concurrency:
        requests = workload(most(clients, per_client), vocab, clients)

        def told(answered: int, clients: int = clients, total: int = len(requests)) -> None:
            seen(f"{clients} at once", answered, total)

        told(0)
        timings = asyncio.run(drive(url, requests, clients, api_key, fields, told))
        yield {"concurrency": clients, **summary(timings)}


@contextmanager
def started(*arguments: str) -> Iterator[str]:
    """The address of `llmkernels serve ARGUMENTS` on a free port of loopback, in a process of its own.

    Ctrl-C in a terminal does not reach it, and it ends when this process does, however that ends.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    own = ("--port", str(port), "--until-eof", "--no-access-log")  # nobody reads it, and a full pipe would hold it up
    command = [sys.executable, "-m", "llmkernels", "serve", *arguments, *own]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, process_group=0)
    try:
        _wait(process, port)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _wait(process: "subprocess.Popen[str]", port: int) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            said = process.communicate()[0].strip().splitlines() or ["nothing"]
            raise ValueError(f"the server ended at once; it said: {said[-1]}")
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise ValueError(f"the server did not listen within {START_SECONDS} s")


async def models(url: str, api_key: str | None = None) -> list[str]:
    """The names of the models that a server has."""
    connection = Connection(url, api_key)
    try:
        return [entry["id"] for entry in (await connection.get("/v1/models"))["data"]]
    finally:
        connection.close()
