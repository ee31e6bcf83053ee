"""What stands before every route: the API key, the size of a body, and that its text is text.

Plain ASGI, so that streams stay streams.
"""

import hmac
import json
import re
from typing import Any

MOST_BYTES = 4 << 20  # of a request's body
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
OPEN = frozenset(("/", "/health"))  # the first is a page without data


def error(message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None) -> dict:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """Lets a request through that has the key, if there is one, and a body of whole characters, MOST_BYTES at most."""

    def __init__(self, app: Any, api_key: str | None = None):
        self.app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN and not self._admits(headers.get(b"authorization", b"")):
            words = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            return await _refuse(send, 401, error(words, "authentication_error", code="invalid_api_key"))
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > MOST_BYTES:
                words = f"the body is larger than {MOST_BYTES} bytes; send less"
                return await _refuse(send, 413, error(words, code="request_too_large"))
            if not message.get("more_body"):
                break
        if wrong := _no_text(body):
            return await _refuse(send, 400, error(wrong))
        given = False

        async def replay() -> Any:
            nonlocal given
            if given:
                return await receive()  # from here on only the disconnect can come
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _admits(self, given: bytes) -> bool:
        return self._expected is None or hmac.compare_digest(given, self._expected)


def _no_text(body: bytes) -> str:
    """Why the body is no text, if it is none: json.loads lets halves of surrogate pairs through, in UTF-16 and in
    bytes as well as in \\uD800, and no tokenizer takes them."""
    try:
        text = body.decode("utf-8-sig")
        if "\0" in text:  # as in ASCII letters of UTF-16
            raise UnicodeError
        if SURROGATE.search(body):
            json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "the body holds half a surrogate pair, \\uD800 to \\uDFFF; send whole characters"
    except UnicodeError:
        return "the body is not UTF-8; send JSON in UTF-8"
    except (ValueError, RecursionError):  # not JSON: told by whoever reads it
        pass
    return ""


async def _refuse(send: Any, status: int, content: dict) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})
