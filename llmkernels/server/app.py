"""The routes: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics; others have their own files.

The engine runs elsewhere: in a process of its own, or, for tests, in a thread; see remote.py and host.py.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from tokenizers import Tokenizer

from llmkernels.engine.llm import LLM
from llmkernels.engine.output import best
from llmkernels.engine.params import SamplingParams
from llmkernels.server.adapters import add_adapters
from llmkernels.server.answers import Form, usage
from llmkernels.server.chat import ChatTemplate
from llmkernels.server.embeddings import add_embeddings, tokens
from llmkernels.server.guard import Guard, error
from llmkernels.server.metrics import Metrics
from llmkernels.server.openapi import ERRORS, ChatCompletion, Completion, describe, streamed, text
from llmkernels.server.protocol import ChatRequest, CompletionRequest, Model, ModelList, Sampling
from llmkernels.server.remote import Answer, Delta, Engine, EngineStopped, Process, running
from llmkernels.server.status import add_status
from llmkernels.server.tools import instructions
from llmkernels.server.tools import structure as tool_structure

MOST_CHOICES = 128  # prompts times n
SHORT = 2000  # characters that are tokenized at once; more are, while others are answered


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        self.status, self.content = status, error(message, param=param, code=code)


class Gone(Exception):
    """The client has left."""


def create_app(
    source: LLM | Process,
    name: str,
    *,
    template: ChatTemplate | None = None,
    api_key: str | None = None,
    adapter_folder: Path | None = None,
    lost: Callable[[], None] = lambda: None,
) -> FastAPI:
    """An ASGI application that owns the engine while it runs.

    Args:
        source: the engine's process, which ends with the application; or an LLM, to be run in a thread.
        name: what clients call the model.
        template: how a chat becomes a prompt; without one, chat is refused.
        api_key: every route but / and /health demands it.
        adapter_folder: where clients may have adapters loaded from; None: they may not.
        lost: called when the engine has failed; requests are answered with 503 from then on.
    """
    metrics, tokenizer = Metrics(), source.tokenizer
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(source, metrics.observe, lost) as engine:
            app.state.engine = engine
            yield

    app = FastAPI(title="llmkernels", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_key=api_key)
    _errors(app)

    def engine() -> Engine:
        running: Engine = app.state.engine
        return running

    def known(model: str | None) -> str | None:
        """The adapter that a request means by `model`, if it is not the model itself."""
        if model in (None, name):
            return None
        if model not in engine().adapters:
            have = ", ".join(repr(known) for known in (name, *engine().adapters))
            raise Refused(404, f"there is no model {model!r}; this server has {have}", "model", "model_not_found")
        return model

    async def respond(
        request: Request,
        body: Sampling,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        form: Form,
        adapter: str | None,
    ) -> Response:
        """Run the prompts and answer, whole or in a stream."""
        if body.use_beam_search:
            return JSONResponse(form.whole(await _unless_gone(request, search(body, prompts, params, adapter))))
        if body.stream and params.answers > params.n:
            raise Refused(400, f"best_of is {params.best_of} with stream; give n, or leave stream out", "best_of")
        news = engine().generate(prompts, params, salt=body.cache_salt, adapter=adapter)
        if not body.stream:
            answers = await _unless_gone(request, _collect(news))
            groups = [answers[i : i + params.answers] for i in range(0, len(answers), params.answers)]
            chosen = [answer for group in groups for answer in best(group)]
            return JSONResponse(form.whole(chosen) | {"usage": usage(answers).model_dump()})
        first = await anext(news)  # what is wrong with the request is told as an error, not in a stream
        wanted = bool(body.stream_options and body.stream_options.include_usage)
        return StreamingResponse(_events(first, news, form, wanted), media_type="text/event-stream")

    async def search(
        body: Sampling, prompts: Sequence[list[int]], params: SamplingParams, adapter: str | None
    ) -> list[Answer]:
        """What beam search finds for each prompt."""
        wish = body.beams(params)
        searches = [engine().beams(prompt, wish, body.cache_salt, adapter) for prompt in prompts]
        return [
            Answer(params, len(prompt), index, beam.text, beam.tokens, finish_reason=beam.finish_reason)
            for prompt, beams in zip(prompts, await asyncio.gather(*searches), strict=True)
            for index, beam in enumerate(beams[: params.n])
        ]

    @app.post("/v1/completions", responses=streamed(Completion), response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        adapter, given = known(body.model), body.prompts()
        if not given:
            raise Refused(400, "prompt holds nothing; give at least one", "prompt")
        if len(given) * max(body.n, body.best_of or 1) > MOST_CHOICES:
            count = f"n={body.n}" if body.best_of is None else f"best_of={body.best_of}"
            words = f"{len(given)} prompts with {count}; at most {MOST_CHOICES} answers are computed for a request"
            raise Refused(400, words, "n" if body.best_of is None else "best_of")
        prompts = await token_ids(tokenizer, given)
        form = Form(adapter or name, tokenizer, chat=False, logprobs=body.logprobs is not None)
        params = replace(body.params(body.max_tokens, body.logprobs), best_of=body.best_of)
        return await respond(request, body, prompts, params, form, adapter)

    @app.post("/v1/chat/completions", responses=streamed(ChatCompletion), response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        adapter = known(body.model)
        if template is None or tokenizer is None:
            raise Refused(400, f"{name!r} has no chat template; use /v1/completions", "messages", "no_chat_template")
        if body.top_logprobs is not None and not body.logprobs:
            raise Refused(400, "top_logprobs is given without logprobs; set logprobs to true", "top_logprobs")
        choice, tools, structure = body.choice(), body.tools or [], None
        messages = [message.plain() for message in body.messages]
        if choice != "none":
            structure = await asyncio.to_thread(tool_structure, tools, choice, body.parallel_tool_calls)
            if not template.tells_of_tools:
                messages = [{"role": "system", "content": instructions(tools)}, *messages]
        described = [tool.model_dump(exclude_none=True) for tool in tools] if choice != "none" else None
        written = await asyncio.to_thread(template.prompt, messages, described)
        prompt = await asyncio.to_thread(lambda: tokenizer.encode(written, add_special_tokens=False).ids)
        room = max(1, engine().facts.max_length - len(prompt))
        most, logprobs = body.max_completion_tokens or body.max_tokens or room, body.top_logprobs or 0
        params = body.params(most, logprobs if body.logprobs else None, structure)
        form = Form(adapter or name, tokenizer, chat=True, calls=structure is not None)
        return await respond(request, body, [prompt], params, form, adapter)

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> ModelList:
        return ModelList(data=[Model(id=known, created=started) for known in (name, *engine().adapters)])

    @app.get("/v1/models/{model:path}", responses=ERRORS)
    async def one_model(model: str) -> Model:
        return Model(id=known(model) or name, created=started)

    @app.get("/health", responses={200: text(), 503: ERRORS[503]}, response_class=PlainTextResponse)
    async def health() -> PlainTextResponse:
        if not engine().alive:
            raise Refused(503, "the engine has stopped; restart the server")
        return PlainTextResponse("ok\n")

    @app.get("/metrics", responses=ERRORS | {200: text()}, response_class=PlainTextResponse)
    async def prometheus() -> Response:
        metrics.counters = await engine().ask("counters")
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def run(request: Request, prompts: Sequence[list[int]], params: SamplingParams, *wishes: Any) -> list[Answer]:
        salt, used = wishes
        found: list[Answer] = await _unless_gone(
            request, _collect(engine().generate(prompts, params, salt=salt, adapter=used))
        )
        return found

    add_embeddings(app, tokenizer, name, known, run, ERRORS)
    if adapter_folder is not None:
        add_adapters(app, name, adapter_folder, ERRORS | {200: text()})
    add_status(app, name, metrics, ERRORS)
    describe(app, locked=api_key is not None)
    return app


async def token_ids(tokenizer: Tokenizer | None, given: Sequence[str | list[int]]) -> list[list[int]]:
    """Prompts as the model reads them.  ValueError: an empty one, or a text without a tokenizer."""

    def ids(prompt: str | list[int]) -> list[int]:
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token")
        return tokens(tokenizer, prompt)

    if sum(len(prompt) for prompt in given if isinstance(prompt, str)) < SHORT:
        return [*map(ids, given)]
    return await asyncio.to_thread(lambda: [*map(ids, given)])


async def _collect(news: AsyncGenerator[list[Delta], None]) -> list[Answer]:
    answers: dict[int, Answer] = {}
    async with aclosing(news):
        async for some in news:
            answers |= {delta.number: delta.answer for delta in some}
    return [answers[number] for number in sorted(answers)]


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of a coroutine, which is cancelled when the client leaves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Gone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _events(
    first: list[Delta], rest: AsyncGenerator[list[Delta], None], form: Form, usage: bool
) -> AsyncGenerator[str, None]:
    """Server-sent events, those of a step in one piece; the usage last, if wanted, and then [DONE]."""
    answers: dict[int, Answer] = {}
    async with aclosing(rest):
        some = first
        try:
            while True:
                answers |= {delta.number: delta.answer for delta in some}
                yield "".join([_event(form.chunk(delta)) for delta in some])
                some = await anext(rest)
        except StopAsyncIteration:
            pass
        except EngineStopped as failure:
            yield _event(error(str(failure), "server_error"))
            return
    if usage:
        yield _event(form.last([answers[number] for number in sorted(answers)]))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape, and none that tells of paths or code."""

    def answer(status: int, content: dict[str, Any]) -> JSONResponse:
        return JSONResponse(content, status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, failure: RequestValidationError) -> JSONResponse:
        first = failure.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if not str(part).startswith(("function-", "list[")))
        words = "unknown field; leave it out" if first["type"] == "extra_forbidden" else first["msg"]
        return answer(400, error(f"{where or 'body'}: {words}", param=where or None))

    @app.exception_handler(Refused)
    async def refused(request: Request, failure: Refused) -> JSONResponse:
        return answer(failure.status, failure.content)

    @app.exception_handler(ValueError)
    async def wrong(request: Request, failure: ValueError) -> JSONResponse:
        return answer(400, error(str(failure)))

    @app.exception_handler(Gone)
    async def gone(request: Request, failure: Gone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(EngineStopped)
    async def stopped(request: Request, failure: EngineStopped) -> JSONResponse:
        return answer(503, error("the engine has stopped; restart the server", "server_error"))

    @app.exception_handler(HTTPException)
    async def http(request: Request, failure: HTTPException) -> JSONResponse:
        return answer(failure.status_code, error(f"{request.method} {request.url.path}: {failure.detail}"))

    @app.exception_handler(Exception)
    async def bug(request: Request, failure: Exception) -> JSONResponse:
        return answer(500, error("the server has a bug; its log says more", "server_error"))
