"""The status page: / is one file without anything from elsewhere, /status is what it draws, asked for once a second.

The page itself holds nothing and needs no key.  What it shows are counts; no text of any request is in them, since
everybody who has the key may look.  Nothing is collected for it while nobody looks.
"""

import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse

from llmkernels.server.metrics import Metrics

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
ONLY_ITSELF = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_status(app: FastAPI, name: str, metrics: Metrics, responses: dict[int | str, dict[str, Any]]) -> None:
    """The two routes."""

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        headers = {"Content-Security-Policy": ONLY_ITSELF, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(PAGE, headers=headers)

    @app.get("/status", responses=responses)
    async def status(request: Request) -> JSONResponse:
        """What the engine does right now: requests, pages and prefixes, and counters since it started."""

        look = await request.app.state.engine.ask("status")
        prefix = {"asked": look["prefix_asked_tokens"], "found": look["prefix_found_tokens"]}
        return JSONResponse({"model": name} | look | prefix | metrics.totals() | {"at": time.monotonic()})
