"""A limit on what stands before a request's body: uvicorn has none for this parser, and would keep all that is sent."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_BYTES = 64 << 10  # of the request line and the headers
REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n"
    b'{"error": {"message": "the headers are larger than %d bytes; send less", "type": "invalid_request_error", '
    b'"param": null, "code": "headers_too_large"}}' % MOST_BYTES
)


class LimitedHead(HttpToolsProtocol):
    """uvicorn's protocol, which hangs up on a head that does not end."""

    _inside, _bytes = True, 0  # a head; how much of it came, in pieces that held nothing of what was before it

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data) if self._inside else 0
        super().data_received(data)
        if self._inside and self._bytes > MOST_BYTES and not self.transport.is_closing():
            self.transport.write(REFUSAL)
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._inside, self._bytes = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._inside, self._bytes = True, 0
        super().on_message_complete()
