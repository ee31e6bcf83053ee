"""Load on a server: so many clients at once, each asking the next request when its last one is answered.

Speaks HTTP/1.1 and server-sent events itself: on a small machine a client library takes more time than the server.

    timings = asyncio.run(drive("http://127.0.0.1:8000", requests, concurrency=16))
    print(summary(timings))
"""

import asyncio
import json
import os
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

CONNECT_SECONDS, SILENCE_SECONDS = 10, 300


@dataclass(frozen=True)
class Asked:
    """A request: token ids or a text, and how many tokens to generate, no fewer."""

    prompt: list[int] | str
    max_tokens: int


@dataclass
class Timing:
    """What one request took, in seconds of one clock.

    pieces: when each piece of text came; mostly one a token.
    """

    start: float
    pieces: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    cached_tokens: int = 0


class Connection:
    """One kept-alive connection to a server; one request at a time."""

    def __init__(self, url: str, api_key: str | None = None):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the URL is {url!r}; give one like http://127.0.0.1:8000")
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = f"Host: {parts.netloc}\r\nContent-Type: application/json\r\n{key}"
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """POST, and the data of each event of the answer, or the whole body where it is no stream.

        Raises:
            ValueError: the server refused, with its words.  OSError: there is none, or it left.
        """
        reader = await self._send("POST", path, json.dumps(body).encode())
        status, headers = await self._answer(reader)
        stream = "text/event-stream" in headers.get("content-type", "")
        if status != 200 or not stream:
            content = b"".join([part async for part in self._parts(reader, headers)])
            if status != 200:
                raise ValueError(f"{path} was answered with {status}: {content[:500].decode(errors='replace')}")
            yield content
            return
        rest = b""
        async for part in self._parts(reader, headers):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()

    async def get(self, path: str) -> Any:
        """What a path holds, which must be JSON; errors as `events`."""
        reader = await self._send("GET", path, b"")
        status, headers = await self._answer(reader)
        content = b"".join([part async for part in self._parts(reader, headers)])
        if status != 200:
            raise ValueError(f"{path} was answered with {status}: {content[:500].decode(errors='replace')}")
        return json.loads(content)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
        self._reader = self._writer = None

    async def _send(self, method: str, path: str, body: bytes) -> asyncio.StreamReader:
        if self._writer is None or self._writer.is_closing():
            context = ssl.create_default_context() if self._tls else None
            opening = asyncio.open_connection(self._host, self._port, ssl=context)
            try:
                self._reader, self._writer = await asyncio.wait_for(opening, CONNECT_SECONDS)
            except OSError as error:  # a timeout is one, and so is a name that nobody knows
                number = error.errno or 0
                why = os.strerror(number) if number > 0 else error.strerror or "no answer"
                words = f"no server is at {self._host}, port {self._port} ({why}); start one, or give another --url"
                raise ConnectionError(words) from None
        head = f"{method} {self._base}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
        assert self._reader is not None
        assert self._writer is not None
        self._writer.write(head.encode() + body)
        await self._writer.drain()
        return self._reader

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SILENCE_SECONDS)
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines if line)
        return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def _parts(self, reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
        """The body as it comes: in chunks, of a known length, or until the connection ends."""
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await asyncio.wait_for(reader.readline(), SILENCE_SECONDS)).split(b";")[0], 16):
                yield (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        elif "content-length" in headers:
            yield await reader.readexactly(int(headers["content-length"]))
        else:
            while part := await reader.read(1 << 16):
                yield part
        if headers.get("connection", "").lower() == "close" or not {"transfer-encoding", "content-length"} & {*headers}:
            self.close()


async def ask(connection: Connection, request: Asked, more: dict[str, Any]) -> Timing:
    """One streamed completion.  A server that streams no usage counts as one token a piece."""
    body = {"prompt": request.prompt, "max_tokens": request.max_tokens, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | more
    timing, usage = Timing(time.perf_counter()), None
    async for data in connection.events("/v1/completions", body):
        now = time.perf_counter()
        if data == b"[DONE]":
            continue  # the connection is free for the next request only when its answer is read to the end
        if b'"usage"' in data and (usage := json.loads(data).get("usage") or usage) and b'"choices": []' in data:
            continue
        timing.pieces.append(now)
    timing.end, timing.tokens = (timing.pieces or [timing.start])[-1], len(timing.pieces)
    if usage:
        timing.prompt_tokens, timing.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        timing.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return timing


async def drive(
    url: str,
    requests: Sequence[Asked],
    concurrency: int,
    api_key: str | None = None,
    more: dict[str, Any] | None = None,
    seen: Callable[[int], None] = lambda answered: None,
) -> list[Timing]:
    """All requests, `concurrency` at a time; seen(count) is called after each.  more: fields for every request."""
    queue, timings = list(reversed(requests)), []

    async def client() -> None:
        connection = Connection(url, api_key)
        try:
            while queue:
                timings.append(await ask(connection, queue.pop(), more or {}))
                seen(len(timings))
        finally:
            connection.close()

    tasks = [asyncio.create_task(client()) for _ in range(min(concurrency, len(requests)))]
    try:
        await asyncio.gather(*tasks)
    finally:  # where one failed, the others need not go on
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return timings


def summary(timings: Sequence[Timing]) -> dict[str, Any]:
    """Rates over the wall clock from the first request to the last answer; milliseconds at percentiles 50, 90, 99.

    total counts prompts as well as answers.
    """
    seconds = max(t.end for t in timings) - min(t.start for t in timings)
    prompt, written = sum(t.prompt_tokens for t in timings), sum(t.tokens for t in timings)
    gaps = [later - sooner for t in timings for sooner, later in zip(t.pieces, t.pieces[1:], strict=False)]
    return {
        "requests": len(timings),
        "seconds": round(seconds, 3),
        "prompt_tokens": prompt,
        "answer_tokens": written,
        "cached_tokens": sum(t.cached_tokens for t in timings),
        "total_tokens_per_second": round((prompt + written) / seconds, 1),
        "answer_tokens_per_second": round(written / seconds, 1),
        "first_token_ms": percentiles([t.pieces[0] - t.start for t in timings if t.pieces]),
        "between_tokens_ms": percentiles(gaps),
        "request_ms": percentiles([t.end - t.start for t in timings]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Milliseconds at 50, 90 and 99 of 100, each a time that was seen; None where none was."""
    ordered = sorted(seconds)
    at = {f"p{p}": min(len(ordered) - 1, len(ordered) * p // 100) for p in (50, 90, 99)}
    return {name: round(1e3 * ordered[index], 3) for name, index in at.items()} if ordered else None
