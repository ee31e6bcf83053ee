"""`llmkernels chat`: talk to a model in the terminal, through a server that runs or one started for the talk."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkernels.cli import app
from llmkernels.cli.screen import progress

HELP = """\
/system TEXT     what the model is told before everything else; without TEXT: what it is told now
/params          how answers are sampled; /params temperature=0.7 top_p=0.9 seed=none changes it
/save FILE       the talk so far as JSON; /load FILE goes on with one
/retry           another answer to your last message
/reset           forget the talk
/quit            leave, as Ctrl-D does; Ctrl-C ends an answer and nothing else
\"\"\"              begins and ends a message of several lines"""
PARAMS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "max_tokens": int,
    "seed": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
}


@dataclass
class Talk:
    """What was said, and how answers are to be made."""

    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)

    def body(self, model: str) -> dict[str, Any]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return {"model": model, "messages": first + self.messages, "stream": True} | self.params

    def prompt(self) -> str:
        """The talk for a model without a chat template: what was said, one after the other."""
        return "".join([self.system, *(message["content"] for message in self.messages)])


@app.command()
def chat(
    model: Annotated[str | None, typer.Argument(help="A checkpoint's directory; the shipped one by default.")] = None,
    url: Annotated[str | None, typer.Option(help="Talk to this server instead of starting one.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="LLMKERNELS_API_KEY", help="For --url.")] = None,
    name: Annotated[str | None, typer.Option(help="For --url: the model's name; the server's first one.")] = None,
    system: Annotated[str, typer.Option(help="What the model is told before everything else.")] = "",
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer at most.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="Round the weights at load, as in w4a16_g128.")] = None,
) -> None:
    """Talk to a model; /help lists what else can be typed.

    Where the input is no terminal, each line is a message, and answers are all that is printed.  A model without a chat
    template continues the text of the talk instead.
    """
    from llmkernels.bench import serving

    given = [*([model] if model else []), *(["--quantize", quantize] if quantize else [])]
    if url and given:
        raise ValueError(f"--url talks to a server that runs; leave out {given[0]}, which is for a new one")
    wishes = {"temperature": temperature, "max_tokens": max_tokens}
    talk = Talk(system, params={key: value for key, value in wishes.items() if value is not None})
    with progress("loading the checkpoint"):
        own = nullcontext(url) if url else serving.started(*given, "--device", device)
        address = own.__enter__()
    try:
        with _history():
            _converse(talk, address, api_key, name or asyncio.run(serving.models(address, api_key))[0])
    finally:
        own.__exit__(None, None, None)


def _converse(talk: Talk, url: str, api_key: str | None, model: str) -> None:
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"llmkernels: {model} listens; /help, or Ctrl-D to leave", file=sys.stderr)
    for text in _messages(terminal):
        if text.startswith("/") and not text.startswith("//"):
            try:
                again = _command(talk, text)
            except (ValueError, OSError) as error:
                print(f"llmkernels: {error}", file=sys.stderr)
                continue
            if again is None:
                return
            if not again:
                continue
        else:
            talk.messages.append({"role": "user", "content": text.removeprefix("/") if text[:2] == "//" else text})
        try:
            answer = _answer(talk, url, api_key, model)
        except (ValueError, OSError, asyncio.IncompleteReadError) as error:
            talk.messages.pop()  # the question may be what is wrong with it
            if not terminal:
                raise
            print(f"llmkernels: {error}", file=sys.stderr)
            continue
        talk.messages.append({"role": "assistant", "content": answer})


def _messages(terminal: bool) -> Iterator[str]:
    """What is typed, message by message, until the input ends."""
    while True:
        try:
            text = input("\x1b[1m>\x1b[0m " if terminal and sys.stdout.isatty() else "")
            if text.startswith('"""'):
                lines = [text[3:]]
                while not lines[-1].endswith('"""'):
                    lines.append(input("… " if terminal else ""))
                text = "\n".join(lines).removesuffix('"""')
        except EOFError:
            return
        except KeyboardInterrupt:  # as in a shell: the line is dropped
            print()
            continue
        if text.strip():
            yield text.strip()


def _answer(talk: Talk, url: str, api_key: str | None, model: str) -> str:
    """Print the answer as it comes.  Ctrl-C ends it, and what was said so far counts as said."""
    said: list[str] = []

    async def listen() -> None:
        async for text in _pieces(talk, url, api_key, model):
            said.append(text)
            print(text, end="", flush=True)

    with suppress(KeyboardInterrupt):
        asyncio.run(listen())
    print()
    return "".join(said)


async def _pieces(talk: Talk, url: str, api_key: str | None, model: str) -> AsyncIterator[str]:
    from llmkernels.bench.load import Connection

    connection, body = Connection(url, api_key), talk.body(model)
    try:
        try:
            async for data in connection.events("/v1/chat/completions", body):
                yield _text(data, "delta")
        except ValueError as error:
            if "no_chat_template" not in str(error):
                raise
            plain = {"prompt": talk.prompt()} | {key: body[key] for key in body if key != "messages"}
            async for data in connection.events("/v1/completions", {"max_tokens": 128} | plain):
                yield _text(data, "text")
    finally:
        connection.close()  # which also ends an answer that nobody waits for


def _text(data: bytes, what: str) -> str:
    if data == b"[DONE]":
        return ""
    event = json.loads(data)
    if "error" in event:
        raise ValueError(event["error"]["message"])
    found = [choice[what] for choice in event["choices"]]
    return "".join((piece.get("content") or "") if what == "delta" else piece for piece in found)


def _command(talk: Talk, text: str) -> bool | None:
    """Do what a line with a slash says.  True: the talk's last message is to be answered again; None: leave."""
    word, _, rest = text.partition(" ")
    rest = rest.strip()
    if word in ("/quit", "/exit"):
        return None
    if word == "/reset":
        talk.messages.clear()
    elif word == "/system":
        talk.system = rest or talk.system
        print(f"system: {talk.system or 'nothing'}", file=sys.stderr)
    elif word == "/params":
        talk.params |= _params(rest)
        talk.params = {key: value for key, value in talk.params.items() if value is not None}
        print(", ".join(f"{k}={v}" for k, v in talk.params.items()) or "all as the server has them", file=sys.stderr)
    elif word == "/save":
        content = {"system": talk.system, "messages": talk.messages, "params": talk.params}
        _file(rest).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    elif word == "/load":
        _load(talk, _file(rest))
    elif word == "/retry":
        if talk.messages and talk.messages[-1]["role"] == "assistant":
            talk.messages.pop()
        if not talk.messages:
            raise ValueError("nothing was said yet")
        return True
    elif word == "/help":
        print(HELP, file=sys.stderr)
    else:
        raise ValueError(f"{word} is no command; /help lists them, and // begins a message that starts with a slash")
    return False


def _file(name: str) -> Path:
    if not name:
        raise ValueError("give the name of a file")
    return Path(name).expanduser()


def _load(talk: Talk, file: Path) -> None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in found["messages"]]
        system, params = str(found.get("system", "")), dict(found.get("params", {}))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{file} is no talk that /save wrote") from None
    talk.system, talk.messages, talk.params = system, messages, params


def _params(text: str) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for part in text.replace(",", " ").split():
        key, _, value = part.partition("=")
        if key not in PARAMS:
            raise ValueError(f"{key!r} is no parameter; there are {', '.join(PARAMS)}")
        try:
            changed[key] = None if value in ("none", "") else PARAMS[key](value)
        except ValueError:
            raise ValueError(f"{key} is {value!r}; give a number, or none") from None
    return changed


@contextmanager
def _history() -> Iterator[None]:
    """What was typed comes back with the arrow keys, in the next talk as well; only where somebody types."""
    if not sys.stdin.isatty():
        yield
        return
    import readline

    from llmkernels import cache_folder

    file = cache_folder.folder() / "chat_history"
    with suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with suppress(OSError):
            readline.write_history_file(file)
            file.chmod(0o600)
