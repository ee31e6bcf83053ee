"""A process of its own in which grammars are compiled.

A small grammar can take minutes and gigabytes to compile, in native code that nobody can interrupt.  So each is
compiled in a fork of this process, which the system kills when its time is over, and which cannot take more memory.

Frames of 4 bytes (length, little-endian) and JSON: first what TokenizerInfo.deserialize_json reads, then for each
[kind, text] the answer {"grammar": what CompiledGrammar.deserialize_json reads} or {"error": one line}.
"""

import json
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO

SECONDS = 5.0  # to compile one grammar
MEMORY = 1 << 30  # bytes beyond what the process has anyway

PLACE = re.compile(r"\[[\d:]+\] \S+:\d+: ")  # time and line of source that XGrammar's errors begin with


def read(stream: BinaryIO) -> Any:
    """The next frame; None at the end of the stream, or of whoever was writing."""
    head = stream.read(4)
    size = int.from_bytes(head, "little")
    body = stream.read(size) if len(head) == 4 else b""
    return json.loads(body) if body and len(body) == size else None


def write(stream: BinaryIO, frame: Any) -> None:
    body = json.dumps(frame).encode()
    stream.write(len(body).to_bytes(4, "little") + body)
    stream.flush()


def compiled(compiler: Any, kind: str, text: str) -> dict[str, str]:
    """The answer to one frame."""
    run = {
        "schema": lambda: compiler.compile_json_schema(text, any_whitespace=False),
        "regex": lambda: compiler.compile_regex(text),
        "ebnf": lambda: compiler.compile_grammar(text),
        "tags": lambda: compiler.compile_structural_tag(text),
    }[kind]
    try:
        return {"grammar": run().serialize_json()}
    except MemoryError:
        return {"error": f"compiling it takes more than {MEMORY >> 20} MiB"}
    except (RuntimeError, ValueError, TypeError) as error:
        lines = PLACE.sub("", str(error)).strip().splitlines() or [type(error).__name__]
        return {"error": lines[0]}


def main() -> None:
    import xgrammar

    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    tokenizer = xgrammar.TokenizerInfo.deserialize_json(read(stdin))
    compiler = xgrammar.GrammarCompiler(tokenizer, max_threads=1, cache_enabled=False)
    while (frame := read(stdin)) is not None:
        pipe, end = os.pipe()
        child = os.fork()
        if not child:
            os.close(pipe)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
            with os.fdopen(end, "wb") as answer:
                write(answer, compiled(compiler, *frame))
            os._exit(0)
        os.close(end)
        with os.fdopen(pipe, "rb") as answer:
            found = read(answer)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if found is None:
            late = status == -signal.SIGALRM
            found = {"error": f"compiling it takes longer than {SECONDS:g} s" if late else "compiling it fails"}
        write(stdout, found)
