"""The routes: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics; others have their own files."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from llmkernels.engine.async_llm import AsyncLLM, EngineStopped
from llmkernels.engine.intake import Prompt
from llmkernels.engine.llm import LLM
from llmkernels.engine.output import Delta, Output, best
from llmkernels.engine.sampling import SamplingParams
from llmkernels.server.adapters import add_adapters
from llmkernels.server.answers import Form, usage
from llmkernels.server.chat import ChatTemplate
from llmkernels.server.embeddings import add_embeddings
from llmkernels.server.guard import Guard, error
from llmkernels.server.metrics import Metrics
from llmkernels.server.openapi import ERRORS, ChatCompletion, Completion, describe, streamed, text
from llmkernels.server.protocol import ChatRequest, CompletionRequest, Model, ModelList, Sampling
from llmkernels.server.status import add_status
from llmkernels.server.tools import instructions
from llmkernels.server.tools import structure as tool_structure

MOST_CHOICES = 128  # prompts times n


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        self.status, self.content = status, error(message, param=param, code=code)


class Gone(Exception):
    """The client has left."""


def create_app(
    llm: LLM,
    name: str,
    *,
    template: ChatTemplate | None = None,
    api_key: str | None = None,
    adapter_folder: Path | None = None,
) -> FastAPI:
    """An ASGI application that owns `llm` while it runs.

    Args:
        name: what clients call the model.
        template: how a chat becomes a prompt; without one, chat is refused.
        api_key: every route but / and /health demands it.
        adapter_folder: where clients may have adapters loaded from; None: they may not.
    """
    metrics = Metrics(llm)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncLLM(llm, metrics.observe) as engine:
            app.state.engine = engine
            yield

    app = FastAPI(title="llmkernels", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_key=api_key)
    _errors(app)

    def known(model: str | None) -> str | None:
        """The adapter that a request means by `model`, if it is not the model itself."""
        if model in (None, name):
            return None
        if model not in llm.adapters:
            have = ", ".join(repr(known) for known in (name, *llm.adapters))
            raise Refused(404, f"there is no model {model!r}; this server has {have}", "model", "model_not_found")
        return model

    @app.post("/v1/completions", responses=streamed(Completion), response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        adapter = known(body.model)
        prompts = body.prompts()
        if not prompts:
            raise Refused(400, "prompt holds nothing; give at least one", "prompt")
        if len(prompts) * body.n > MOST_CHOICES:
            raise Refused(400, f"{len(prompts)} prompts with n={body.n}; at most {MOST_CHOICES} choices", "n")
        form = Form(adapter or name, llm.tokenizer, chat=False, logprobs=body.logprobs is not None)
        params = body.params(body.max_tokens, body.logprobs)
        if body.best_of is None or body.best_of == body.n:
            return await _respond(request, body, prompts, params, form, adapter)
        if body.stream or body.best_of < body.n or len(prompts) * body.best_of > MOST_CHOICES:
            most = MOST_CHOICES // len(prompts)
            limits = f"with {len(prompts)} prompts at most {most}, at least n, and not with stream"
            raise Refused(400, f"best_of is {body.best_of}; give {limits}", "best_of")
        more = replace(params, best_of=body.best_of)
        news = request.app.state.engine.batches(prompts, more, salt=body.cache_salt, adapter=adapter)
        outputs = await _unless_gone(request, _collect(news))
        groups = [outputs[i : i + body.best_of] for i in range(0, len(outputs), body.best_of)]
        chosen = [output for group in groups for output in best(group)]
        return JSONResponse(form.whole(chosen) | {"usage": usage(outputs).model_dump()})

    @app.post("/v1/chat/completions", responses=streamed(ChatCompletion), response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        adapter = known(body.model)
        if template is None or llm.tokenizer is None:
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
        prompt = llm.tokenizer.encode(written, add_special_tokens=False).ids
        room = max(1, llm.max_length - len(prompt))
        most, logprobs = body.max_completion_tokens or body.max_tokens or room, body.top_logprobs or 0
        params = body.params(most, logprobs if body.logprobs else None, structure)
        form = Form(adapter or name, llm.tokenizer, chat=True, calls=structure is not None)
        return await _respond(request, body, [prompt], params, form, adapter)

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> ModelList:
        return ModelList(data=[Model(id=known, created=started) for known in (name, *llm.adapters)])

    @app.get("/v1/models/{model:path}", responses=ERRORS)
    async def one_model(model: str) -> Model:
        return Model(id=known(model) or name, created=started)

    @app.get("/health", responses={200: text(), 503: ERRORS[503]}, response_class=PlainTextResponse)
    async def health(request: Request) -> PlainTextResponse:
        if not request.app.state.engine.alive:
            raise Refused(503, "the engine has stopped; restart the server")
        return PlainTextResponse("ok\n")

    @app.get("/metrics", responses=ERRORS | {200: text()}, response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def run(request: Request, prompts: Sequence[Prompt], params: SamplingParams, *wishes: Any) -> list[Output]:
        salt, used = wishes
        news = request.app.state.engine.batches(prompts, params, salt=salt, adapter=used)
        return await _unless_gone(request, _collect(news))

    add_embeddings(app, llm, name, known, run, ERRORS)
    if adapter_folder is not None:
        add_adapters(app, name, adapter_folder, ERRORS | {200: text()})
    add_status(app, name, metrics, ERRORS)
    describe(app, locked=api_key is not None)
    return app


async def _respond(
    request: Request,
    body: Sampling,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    form: Form,
    adapter: str | None,
) -> Response:
    """Run the prompts, params.n answers to each, and answer whole or in a stream."""
    news = request.app.state.engine.batches(prompts, params, salt=body.cache_salt, adapter=adapter)
    if not body.stream:
        outputs = await _unless_gone(request, _collect(news))
        return JSONResponse(form.whole(outputs))
    first = await anext(news)  # what is wrong with the request is told as an error, not in a stream
    wanted = bool(body.stream_options and body.stream_options.include_usage)
    return StreamingResponse(_events(first, news, form, wanted), media_type="text/event-stream")


async def _collect(news: AsyncGenerator[list[tuple[int, Delta]], None]) -> list[Output]:
    outputs: dict[int, Output] = {}
    async with aclosing(news):
        async for some in news:
            outputs |= {number: delta.output for number, delta in some}
    return [outputs[number] for number in sorted(outputs)]


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
    first: list[tuple[int, Delta]], rest: AsyncGenerator[list[tuple[int, Delta]], None], form: Form, usage: bool
) -> AsyncGenerator[str, None]:
    """Server-sent events, those of a step in one piece; the usage last, if wanted, and then [DONE]."""
    outputs: dict[int, Output] = {}
    async with aclosing(rest):
        some = first
        try:
            while True:
                outputs |= {number: delta.output for number, delta in some}
                yield "".join([_event(form.chunk(number, delta)) for number, delta in some])
                some = await anext(rest)
        except StopAsyncIteration:
            pass
        except EngineStopped as failure:
            yield _event(error(str(failure), "server_error"))
            return
    if usage:
        yield _event(form.last([outputs[number] for number in sorted(outputs)]))
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
