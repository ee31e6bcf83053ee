"""A server under everything at once: 32 clients that ask, fork, leave in the middle, share prefixes and fill the cache.

Afterwards every page must be free or kept, every user of a page explained, and every answer that was finished must be
what the same request gets alone.
"""

import asyncio
import json
import random
import time
from collections import Counter

import pytest

from llmkernels.bench.load import Connection

CLIENTS = 32
OPENINGS = ("The read() system call", "A package is", "The ls command lists information about files, and", "In short,")
WORDS = ("of", "the", "file", "option", "name", "returns", "value", "system", "call", "which")


def draw(source: random.Random) -> dict:
    """A request: one of some hundred, so that prefixes and whole prompts come again."""
    prompt = source.choice(OPENINGS) + "".join(f" {source.choice(WORDS)}" for _ in range(source.choice((0, 1, 1, 30))))
    body = {"prompt": prompt, "max_tokens": source.choice((1, 7, 24, 60)), "temperature": 0}
    body |= source.choice(({}, {}, {"n": 2}, {"n": 4}))
    body |= source.choice(({}, {}, {"cache_salt": "a"}, {"cache_salt": "b"}))
    return body | source.choice(({}, {}, {"stop": [" the", "."]}, {"repetition_penalty": 1.3}, {"ignore_eos": True}))


async def ask(connection: Connection, body: dict, leave: int | None) -> dict | None:
    """{choice: (text, finish reason)}; None where we left after so many events."""
    texts: dict = {}
    reasons: dict = {}
    async for data in connection.events("/v1/completions", body):
        if data == b"[DONE]":
            break
        for choice in json.loads(data)["choices"]:
            number = choice["index"]
            texts[number] = texts.get(number, "") + choice["text"]
            assert reasons.get(number) is None, "something came after the finish reason"
            reasons[number] = choice["finish_reason"]
        if leave is not None and len(texts[number]) >= leave:
            return None
    assert all(reasons.values())
    assert len(texts) == body.get("n", 1)
    return {number: (texts[number], reasons[number]) for number in texts}


async def load(url: str, seconds: float, seed: int = 0) -> tuple[dict[str, list], Counter]:
    """{request as JSON: its answers, each time it was finished}, and how often what was done."""
    end, finished, done = time.monotonic() + seconds, {}, Counter()

    async def client(number: int) -> None:
        source = random.Random(f"{seed} {number}")
        while time.monotonic() < end:
            body = draw(source)
            how = source.choice(("whole", "stream", "stream", "leave", "leave at once", "wrong"))
            connection = Connection(url)
            try:
                if how == "wrong":
                    with pytest.raises(ValueError, match="is not a token id"):
                        await ask(connection, body | {"prompt": [10**6]}, None)
                elif how == "leave at once":
                    asking = asyncio.create_task(ask(connection, body | {"stream": source.random() < 0.5}, None))
                    await asyncio.sleep(source.random() / 20)
                    asking.cancel()
                    await asyncio.gather(asking, return_exceptions=True)
                else:
                    leave = source.choice((0, 5, 40)) if how == "leave" else None
                    answer = await ask(connection, body | {"stream": how != "whole"}, leave)
                    if answer:
                        finished.setdefault(json.dumps(body, sort_keys=True), []).append(answer)
            finally:
                connection.close()
            done[how] += 1
            done["forked"] += body.get("n", 1) > 1

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return finished, done
