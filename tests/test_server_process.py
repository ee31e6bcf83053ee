"""`llmkernels serve` as two processes: what the user is told, and that neither process outlives the other."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from llmkernels import cli
from llmkernels.cli.serve import _bound
from llmkernels.server.remote import Process

SERVE = [sys.executable, "-m", "llmkernels", "serve", "--max-length", "512"]


class Served:
    """A server with a free port, and the id of its engine's process."""

    def __init__(self):
        self.process = subprocess.Popen([*SERVE, "--port", "0"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        first = self.process.stderr.readline().decode()
        self.url = re.search(r"answers at (http://127\.0\.0\.1:\d+)", first)[1]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (self.engine,) = map(int, children.read_text().split())
        while self.post().status_code != 200:
            pass

    def post(self, **wishes):
        body = {"prompt": "The read() system call", "max_tokens": 2} | wishes
        try:
            return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        except httpx.ConnectError:  # it does not listen yet
            time.sleep(0.02)
            return httpx.Response(0)

    def ended(self, seconds=10):
        """Its exit code and what it said, when both processes are gone."""
        end = time.monotonic() + seconds
        said = self.process.communicate(timeout=seconds)[1].decode()
        while alive(self.engine):
            assert time.monotonic() < end, "the engine's process outlives its server"
            time.sleep(0.02)
        return self.process.returncode, said


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture
def server():
    server = Served()
    yield server
    for pid in (server.process.pid, server.engine):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    server.process.communicate()


LONG = {"max_tokens": 400, "ignore_eos": True, "n": 8, "stream": True}


def test_ctrl_c_ends_both_while_somebody_is_answered(server):
    with httpx.stream("POST", f"{server.url}/v1/completions", json={"prompt": "x"} | LONG) as stream:
        next(stream.iter_lines())
        start = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        code, said = server.ended()
    assert time.monotonic() - start < 6
    assert code == 0
    assert "Traceback" not in said


def test_without_its_engine_the_server_answers_503_and_ends(server):
    with httpx.stream("POST", f"{server.url}/v1/completions", json={"prompt": "x"} | LONG) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(server.engine, signal.SIGKILL)
        assert '"type": "server_error"' in [line for line in lines if line][-1]
    code, said = server.ended()
    assert code == 1
    assert "llmkernels: the engine's process was ended by SIGKILL" in said
    assert "Traceback" not in said


def test_an_engine_ends_when_nobody_holds_it():
    engine = Process({"max_length": 64}, seen=(stages := []).append)
    assert stages == ["loading the checkpoint"]
    assert engine.facts.max_length == 64
    engine.link.close()  # as the system does where the server is killed
    assert engine.epitaph() == "the engine's process ended with code 0; what it printed says why"


def test_an_engine_that_cannot_start_says_why():
    with pytest.raises(ValueError, match="scheme 'w9' is unknown"):
        Process({"quantize": "w9"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere"], "llmkernels: /nowhere is not a directory"),
        (["--adapter", "=x"], "--adapter is '=x'; give NAME=PATH"),
        (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1, port 8000: "),
        (["--port", "taken"], "of 127.0.0.1 is in use; give another --port"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, words, capsys, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["llmkernels", "serve", *(port if a == "taken" else a for a in arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_what_is_written_leaves_at_once():
    """A connection that waits for acknowledgements delays the chunks of an answer by some 40 ms."""
    with _bound("127.0.0.1", 0) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
