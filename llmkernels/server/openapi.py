"""What the OpenAPI file says of answers; the routes write them as plain dictionaries, with answers.py's fields."""

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from llmkernels.server.protocol import Error, Usage

Reason = str | None
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": Error} for status in (400, 401, 404, 413, 503)}
EVENT = {
    "type": "object",  # an event of the stream, as OpenAPI 3.2 describes them
    "properties": {"data": {"type": "string", "description": "a chunk as JSON; [DONE] ends the stream"}},
    "required": ["data"],
}
STREAM = {"text/event-stream": {"schema": EVENT}}


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: Reason
    error: str | None = None
    logprobs: TextLogprobs | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TopLogprobs(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[TopLogprobs]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    finish_reason: Reason
    error: str | None = None
    logprobs: ChatLogprobs | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


def streamed(whole: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that answers whole or in a stream."""
    return ERRORS | {200: {"model": whole, "content": STREAM}}


def text() -> dict[str, Any]:
    """The response of a route that answers in plain text."""
    return {"description": "text", "content": {"text/plain": {"schema": {"type": "string"}}}}


def describe(app: FastAPI, locked: bool) -> None:
    """The file is made when it is first asked for.  Wrong requests are told as 400, never as FastAPI's own 422."""

    def made() -> dict[str, Any]:
        if app.openapi_schema is None:
            file = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for route in (route for path in file["paths"].values() for route in path.values()):
                route["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                file.get("components", {}).get("schemas", {}).pop(name, None)
            if locked:
                file.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                file["security"] = [{"key": []}]
            app.openapi_schema = file
        return app.openapi_schema

    app.openapi = made  # type: ignore[method-assign]
