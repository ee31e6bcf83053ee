"""Loading and unloading adapters while the server runs: /v1/load_lora_adapter, /v1/unload_lora_adapter.

Bodies and paths are those of vLLM, https://docs.vllm.ai/en/stable/features/lora.html.  The routes exist only where an
adapter folder is given, and read nothing outside it.
"""

from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from pydantic import Field

from llmkernels.server.protocol import Strict

Name = Annotated[str, Field(min_length=1, max_length=200)]


class LoadAdapter(Strict):
    """lora_path: a directory below the server's adapter folder, as seen from there."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=1000)]


class UnloadAdapter(Strict):
    lora_name: Name


def add_adapters(app: FastAPI, model: str, folder: Path, errors: dict[int | str, dict[str, Any]]) -> None:
    """Add the routes.  model: the base model's name, which no adapter may take.  errors: what each may answer."""
    root = folder.resolve()

    @app.post("/v1/load_lora_adapter", responses=errors, response_class=PlainTextResponse)
    async def load(body: LoadAdapter, request: Request) -> PlainTextResponse:
        if body.lora_name == model:
            raise ValueError(f"lora_name is {model!r}, which is the model's own name; choose another")
        if "\0" in body.lora_path or not (path := (root / body.lora_path).resolve()).is_relative_to(root):
            raise ValueError("lora_path leads out of the server's adapter folder; give a directory in it")
        engine = request.app.state.engine
        engine.adapters = await engine.ask("load_adapter", body.lora_name, str(path))
        return PlainTextResponse(f"adapter {body.lora_name!r} is loaded\n")

    @app.post("/v1/unload_lora_adapter", responses=errors, response_class=PlainTextResponse)
    async def unload(body: UnloadAdapter, request: Request) -> PlainTextResponse:
        engine = request.app.state.engine
        engine.adapters = await engine.ask("unload_adapter", body.lora_name)
        return PlainTextResponse(f"adapter {body.lora_name!r} is unloaded\n")
