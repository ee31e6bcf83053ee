"""Messages -> a prompt, by the chat template that comes with a checkpoint.

A template is a program somebody else wrote.  It runs in jinja2's immutable sandbox, for TIME seconds at most, and
cannot make values much larger than what it was given.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from jinja2 import TemplateError, meta
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmkernels.models.files import CheckpointError, read_json

TIME = 1.0  # seconds
LARGEST = 1 << 20  # characters, items, or value of a number that a product or power may reach
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatError(ValueError):
    """The template refuses these messages, or fails on them."""


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, in which `*` and `**` cannot be used to fill the memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
        if (operator == "**" and (sizes[0] > LARGEST or sizes[1] > 64)) or (operator == "*" and max(sizes) > LARGEST):
            raise SecurityError(f"{sizes[0]} {operator} {sizes[1]} is too large")
        if operator == "*" and any(hasattr(x, "__len__") for x in (left, right)) and sizes[0] * sizes[1] > LARGEST:
            raise SecurityError(f"a text or list of {sizes[0] * sizes[1]} items is too large")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A checkpoint's template, compiled.

    Args:
        source: the template.
        special: the texts of special tokens, by name: bos_token, eos_token, ...
    """

    def __init__(self, source: str, special: Mapping[str, str]):
        sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        sandbox.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        sandbox.globals["raise_exception"] = _refuse
        sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = sandbox.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}; give another one") from None
        self._special = dict(special)
        self.tells_of_tools = "tools" in meta.find_undeclared_variables(sandbox.parse(source))

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The text after which the assistant's answer begins.  tools: what it may call, as OpenAI describes it.

        Raises:
            ChatError: the template refuses the messages, fails, or takes too long.
        """
        before, sys_trace = sys.gettrace(), _Deadline(time.monotonic() + TIME)
        sys.settrace(sys_trace)  # of this thread only: it sees every line of the template's code
        try:
            return self._template.render(
                messages=list(messages), tools=tools, add_generation_prompt=True, **self._special
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise ChatError(f"the chat template says: {error}") from None
        finally:
            sys.settrace(before)


class _Deadline:
    """A trace function that ends what runs too long."""

    def __init__(self, end: float):
        self.end = end

    def __call__(self, frame: FrameType, event: str, argument: Any) -> "_Deadline":
        if time.monotonic() > self.end:
            raise TimeoutInTemplate(f"it took longer than {TIME:g} s")
        return self


class TimeoutInTemplate(TemplateError):
    """The template's time is over."""


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def read_template(model: Path, file: Path | None = None) -> ChatTemplate | None:
    """The template in `file`, or the checkpoint's own: chat_template.jinja, or in tokenizer_config.json; or None."""
    config = read_json(model / "tokenizer_config.json") if (model / "tokenizer_config.json").is_file() else {}
    own = model / "chat_template.jinja"
    source: Any = config.get("chat_template")
    if file or own.is_file():
        try:
            source = (file or own).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"the chat template cannot be read: {error}") from None
    if isinstance(source, list):  # several, by name
        source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"chat_template in tokenizer_config.json is a {type(source).__name__}; it must be a text")
    texts = {name: config.get(name) for name in SPECIAL}
    special = {name: text["content"] if isinstance(text, dict) else text for name, text in texts.items() if text}
    return ChatTemplate(source, special)
