"""What the HTTP side and the engine's side say to each other: frames of 4 bytes (length, big-endian) and a pickle.

A pickle can do anything to whoever reads it, which does not matter here: both ends are this package, on one machine,
and the pair of sockets between them has no name by which anybody else could reach it.
"""

import pickle
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

from llmkernels.engine.beam import BeamParams
from llmkernels.engine.params import SamplingParams

HEAD = 4  # bytes


class Load(NamedTuple):
    """The first order to an engine's process: arguments of LLM, and adapters as (name, directory)."""

    arguments: dict[str, Any]
    adapters: list[tuple[str, str]]


class Generate(NamedTuple):
    """Answer these prompts of token ids, params.answers answers each; the request is called `number` from now on."""

    number: int
    prompts: list[list[int]]
    params: SamplingParams
    salt: str | None
    adapter: str | None


class Search(NamedTuple):
    """Beam search; a Told with its Beams follows."""

    number: int
    prompt: list[int]
    params: BeamParams
    salt: str | None
    adapter: str | None


class Drop(NamedTuple):
    """Nobody waits for this request any more."""

    number: int


class Question(NamedTuple):
    """One of host.QUESTIONS; a Told follows."""

    number: int
    name: str
    arguments: tuple[Any, ...]


class Stop(NamedTuple):
    """End all requests, and then yourself."""


class Stage(NamedTuple):
    """What an engine's process does before it is ready."""

    words: str


class Facts(NamedTuple):
    """What the HTTP side has to know of an LLM; that it comes says that the engine is ready."""

    max_length: int
    hidden: int
    adapters: list[str]


class Failed(NamedTuple):
    """There is no engine, or none any more."""

    words: str


class Refused(NamedTuple):
    """A request or a question was wrong: a ValueError with these words."""

    number: int
    words: str


class Told(NamedTuple):
    """The answer to a question, or what a search found."""

    number: int
    value: Any


class Grown(NamedTuple):
    """What an answer has grown by in a step; `answer` is its number among its request's."""

    answer: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[Mapping[int, float]]
    finish_reason: str | None
    score: float
    cached_tokens: int
    embedding: list[float] | None
    error: str


Step = list[tuple[int, list[Grown]]]  # what a step brought, by request


def frame(message: Any) -> bytes:
    """A message as it travels."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(HEAD) + body


def size(head: bytes) -> int:
    """How many bytes follow these HEAD ones."""
    return int.from_bytes(head)


def message(body: bytes) -> Any:
    """What `frame` was given."""
    return pickle.loads(body)


def receive(link: socket.socket) -> Any:
    """The next message of a blocking socket; EOFError where the other side has gone."""
    return message(_exactly(link, size(_exactly(link, HEAD))))


def _exactly(link: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        try:
            part = link.recv(count - len(parts))
        except ConnectionError:
            part = b""
        if not part:
            raise EOFError("the other side has gone")
        parts += part
    return bytes(parts)
