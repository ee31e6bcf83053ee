"""A server under everything at once: 32 clients that ask, fork, search with beams, are held to grammars, use adapters
that come and go, leave in the middle, share prefixes and fill the cache.

Afterwards every page must be free or kept, every user of a page explained, and every answer that was finished must be
what the same request gets alone.
"""

import asyncio
import json
import random
import time
from collections import Counter
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from llmkernels.bench.load import Connection
from llmkernels.engine import SamplingParams
from llmkernels.engine.beam import BeamParams
from llmkernels.structured import Structure

CLIENTS = 32
OPENINGS = ("The read() system call", "A package is", "The ls command lists information about files, and", "In short,")
WORDS = ("of", "the", "file", "option", "name", "returns", "value", "system", "call", "which")
ADAPTERS = ("one", "two")
GUEST = "guest"  # loaded and unloaded all the time, in use or not; the weights are those of "one"
FORMS = (
    {"regex": "[a-z ]{4,30}\\."},
    {"choice": ["a file", "a file name", "nothing", "ünï — code"]},
    {"json": {"type": "object", "properties": {"size": {"type": "integer"}}, "required": ["size"]}},
    {"json": {"type": "array", "items": {"enum": ["read", "write"]}, "maxItems": 3}},
)
BEAMS = {"use_beam_search": True, "n": 2, "max_tokens": 7}


def write_adapters(folder):
    """Folders `one` and `two`, adapters of the shipped checkpoint that change what it says."""
    for number, name in enumerate(ADAPTERS):
        generator, tensors = torch.Generator().manual_seed(number), {}
        for layer in range(6):
            at = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_"
            tensors[f"{at}A.weight"] = 0.2 * torch.randn(2, 768, generator=generator)
            tensors[f"{at}B.weight"] = 0.2 * torch.randn(256, 2, generator=generator)
        (folder / name).mkdir()
        save_file(tensors, folder / name / "adapter_model.safetensors")
        (folder / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))


def draw(source: random.Random) -> dict:
    """A request: one of some hundred, so that prefixes and whole prompts come again."""
    prompt = source.choice(OPENINGS) + "".join(f" {source.choice(WORDS)}" for _ in range(source.choice((0, 1, 1, 30))))
    body = {"prompt": prompt, "max_tokens": source.choice((1, 7, 24, 60)), "temperature": 0}
    body |= source.choice(({}, {}, {"cache_salt": "a"}, {"cache_salt": "b"}))
    body |= source.choice(({}, {}, {"model": "one"}, {"model": "two"}, {"model": GUEST}))
    if source.random() < 0.1:
        return body | BEAMS
    body |= source.choice(({}, {}, {"n": 2}, {"n": 4}))
    if source.random() < 0.2:
        return body | {"structured_outputs": source.choice(FORMS)}
    return body | source.choice(({}, {}, {"stop": [" the", "."]}, {"repetition_penalty": 1.3}, {"ignore_eos": True}))


def alone(llm, request: dict) -> dict:
    """What the same request gets from an LLM that has nothing else to do: {choice: (text, finish reason)}."""
    wishes = {name: value for name, value in request.items() if name not in ("prompt", "cache_salt", "model")}
    adapter = request.get("model", "").replace(GUEST, "one") or None
    if wishes.pop("use_beam_search", False):
        found = llm.beam_search(request["prompt"], BeamParams(wishes["n"], wishes["max_tokens"]), adapter=adapter)
        return {number: (beam.text, beam.finish_reason) for number, beam in enumerate(found)}
    if form := wishes.pop("structured_outputs", None):
        wishes["structure"] = Structure(**{name.replace("json", "json_schema"): what for name, what in form.items()})
    found = llm.generate(request["prompt"], SamplingParams(**wishes), adapter=adapter)
    return {number: (output.text, output.finish_reason) for number, output in enumerate(found)}


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


async def come_and_go(url: str, until: float, done: Counter) -> None:
    """Load and unload GUEST, whoever uses it."""
    while time.monotonic() < until:
        for verb, more in (("load", {"lora_path": "one"}), ("unload", {})):
            connection = Connection(url)  # a new one: servers hang up on those that are silent for seconds
            with suppress(ValueError):  # the last one of this name may still be in use
                async for _ in connection.events(f"/v1/{verb}_lora_adapter", {"lora_name": GUEST} | more):
                    done[f"{verb}ed"] += 1
            connection.close()
            await asyncio.sleep(0.3)


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
                        await ask(connection, {"prompt": [10**6]}, None)
                elif how == "leave at once":
                    asking = asyncio.create_task(ask(connection, body | {"stream": source.random() < 0.5}, None))
                    await asyncio.sleep(source.random() / 20)
                    asking.cancel()
                    await asyncio.gather(asking, return_exceptions=True)
                else:
                    stream = {} if "use_beam_search" in body else {"stream": how != "whole"}
                    leave = source.choice((0, 5, 40)) if how == "leave" else None
                    if answer := await ask(connection, body | stream, leave):
                        finished.setdefault(json.dumps(body, sort_keys=True), []).append(answer)
            except ValueError as refused:  # the only one that may be: its adapter is not there at this moment
                if repr(GUEST) not in str(refused):
                    raise
                how = "guest was away"
            finally:
                connection.close()
            done[how] += 1
            for what in ("n", "model", "structured_outputs", "use_beam_search"):
                done[what] += what in body

    await asyncio.gather(come_and_go(url, end, done), *(client(number) for number in range(CLIENTS)))
    return finished, done
