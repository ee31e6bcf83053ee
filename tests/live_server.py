"""A server on loopback, in a thread, for as long as a test needs it."""

import socket
import threading
import time
from contextlib import contextmanager

import uvicorn

from llmkernels.server.head import LimitedHead


@contextmanager
def served(app):
    """The address of `app`; afterwards its thread has ended, or that is an error."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, http=LimitedHead, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
        assert not thread.is_alive()
