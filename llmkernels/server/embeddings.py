"""/v1/embeddings: https://platform.openai.com/docs/api-reference/embeddings.

An embedding is the mean of the prompt's hidden states behind the model's last norm, of length 1.  A decoder that was
not trained for it gives one too; how good it is, is the checkpoint's matter.
"""

import asyncio
import base64
import math
import struct
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from tokenizers import Tokenizer

from llmkernels.engine.options import as_list
from llmkernels.engine.params import SamplingParams
from llmkernels.server.protocol import Name, Strict, Token
from llmkernels.server.remote import Answer

MOST_INPUTS, MOST_TOKENS = 2048, 300_000  # of a request: OpenAI's own limits
WISH = SamplingParams(max_tokens=1, embed=True)


class EmbeddingRequest(Strict):
    input: str | list[Token] | Annotated[list[str] | list[list[Token]], Field(max_length=MOST_INPUTS)]
    model: Name | None = None
    dimensions: int | None = Field(None, ge=1, lt=2**31)
    encoding_format: Literal["float", "base64"] = "float"
    user: Name | None = None  # who asks; nothing depends on it
    cache_salt: Name | None = None


class Embedding(BaseModel):
    """embedding: numbers, or the base64 of them as little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def add_embeddings(
    app: FastAPI,
    tokenizer: Tokenizer | None,
    name: str,
    known: Callable[[str | None], str | None],
    run: Callable[..., Awaitable[list[Answer]]],
    errors: dict[int | str, dict[str, Any]],
) -> None:
    """Add the route.

    Args:
        known: the adapter that a model's name means.
        run: the finished outputs of (request, prompts, params, salt, adapter).
    """

    @app.post("/v1/embeddings", responses=errors | {200: {"model": Embeddings}}, response_model=None)
    async def embeddings(body: EmbeddingRequest, request: Request) -> JSONResponse:
        adapter, facts = known(body.model), request.app.state.engine.facts
        if body.dimensions is not None and body.dimensions > facts.hidden:
            raise ValueError(f"dimensions is {body.dimensions}; this model has {facts.hidden}: give at most as many")
        prompts = await asyncio.to_thread(tokens_of, tokenizer, facts.max_length, body.input)
        answers = await run(request, prompts, WISH, body.cache_salt, adapter)
        vectors = [shortened(answer.embedding, body.dimensions) for answer in answers if answer.embedding]
        count = sum(len(prompt) for prompt in prompts)
        answer = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": encoded(vector, body.encoding_format)}
                for index, vector in enumerate(vectors)
            ],
            "model": adapter or name,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }
        return JSONResponse(answer)


def tokens_of(tokenizer: Tokenizer | None, max_length: int, given: Any) -> list[list[int]]:
    """Every input as token ids; ValueError, before anything runs, where one is too long or there are too many."""
    inputs, prompts, total = as_list(given), [], 0
    if not inputs:
        raise ValueError("input holds nothing; give at least one text")
    for index, one in enumerate(inputs):
        if not one:
            raise ValueError(f"input {index} is empty; give at least one token")
        ids = tokens(tokenizer, one)
        if len(ids) >= max_length:
            raise ValueError(f"input {index} has {len(ids)} tokens; at most {max_length - 1} can be read")
        total += len(ids)
        if total > MOST_TOKENS:
            raise ValueError(f"input has more than {MOST_TOKENS} tokens in all; send several requests")
        prompts.append(ids)
    return prompts


def tokens(tokenizer: Tokenizer | None, prompt: str | list[int]) -> list[int]:
    """A prompt as the model reads it; ValueError where it is a text and there is no tokenizer."""
    if isinstance(prompt, list):
        return prompt
    if tokenizer is None:
        raise ValueError("a text is given and this model has no tokenizer; give token ids")
    ids: list[int] = tokenizer.encode(prompt).ids
    return ids


def shortened(vector: list[float], dimensions: int | None) -> list[float]:
    """The first so many numbers, of length 1 again."""
    if dimensions is None or dimensions == len(vector):
        return vector
    first = vector[:dimensions]
    length = math.hypot(*first)
    return [value / length for value in first] if length else first


def encoded(vector: list[float], form: str) -> list[float] | str:
    if form == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
