"""A limit on what stands before a request's body: uvicorn has none for this parser, and would keep all that is sent."""

import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llmkernels.server.guard import error

MOST_BYTES = 64 << 10  # of the request line and the headers


def _refusal(status: str, message: str, code: str) -> bytes:
    body = json.dumps(error(message, code=code)).encode()
    told = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
    return f"HTTP/1.1 {status}\r\n{told}\r\n".encode() + body


TOO_LARGE = _refusal(
    "431 Request Header Fields Too Large",
    f"the headers are larger than {MOST_BYTES} bytes; send less",
    "headers_too_large",
)
NO_HTTP = _refusal("400 Bad Request", "this is no HTTP/1.1 request; send one as RFC 9112 has it", "invalid_http")


class LimitedHead(HttpToolsProtocol):
    """uvicorn's protocol, which hangs up on a head that does not end, or that is none."""

    _inside, _bytes = True, 0  # a head; how much of it came, in pieces that held nothing of what was before it

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data) if self._inside else 0
        super().data_received(data)
        if self._inside and self._bytes > MOST_BYTES and not self.transport.is_closing():
            self._hang_up(TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        self._hang_up(NO_HTTP)

    def on_headers_complete(self) -> None:
        self._inside, self._bytes = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._inside, self._bytes = True, 0
        super().on_message_complete()

    def _hang_up(self, refusal: bytes) -> None:
        self.transport.write(refusal)
        self.transport.close()
