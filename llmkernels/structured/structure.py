"""What the text of an answer must be: a JSON Schema, a regular expression, a grammar, one of some strings.

Plain data, so that SamplingParams can hold it and a wrong one is refused at once; grammar.py makes it hold.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkernels.structured import schema

MOST_CHARACTERS = 1 << 16  # of a schema or grammar; compiling some takes the square of that
MOST_CHOICES = 1024


@dataclass(frozen=True)
class Structure:
    """Exactly one of these; ValueError where it cannot be enforced, with the name of what is in the way.

    json_schema: a schema of JSON Schema 2020-12, as a mapping or as text; the answer is JSON that it holds for, without
        needless spaces (", " and ": " between items), properties in the schema's order and none beside them where it
        has `properties`.  {} is any JSON.  structured/schema.py tells which keywords there are.
    regex: a regular expression that the whole answer matches: classes, groups, repeats, no look-around.
    ebnf: a grammar in the notation of GBNF, https://github.com/ggml-org/llama.cpp/tree/master/grammars; it begins at
        the rule `root`.
    choice: the answer is one of these strings.
    tags: a structural tag of XGrammar: text in which only some parts are bound.  Whoever builds it, as the server does
        for tools, checks the schemas in it.
    """

    json_schema: Mapping[str, Any] | bool | str | None = None
    regex: str | None = None
    ebnf: str | None = None
    choice: Sequence[str] | None = None
    tags: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__dataclass_fields__ if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a Structure has {', '.join(given) or 'nothing'}; give exactly one of its fields")
        name = given[0]
        kind, text = getattr(self, f"_{name}")(getattr(self, name))
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"{name} has {len(text)} characters; at most {MOST_CHARACTERS} can be enforced")
        object.__setattr__(self, "_key", (kind, text))

    @property
    def key(self) -> tuple[str, str]:
        """('schema', 'regex', 'ebnf' or 'tags', its text): structures of the same key are the same."""
        key: tuple[str, str] = self._key  # type: ignore[attr-defined]
        return key

    @staticmethod
    def _json_schema(given: Any) -> tuple[str, str]:
        try:
            text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"it has {len(text)} characters; at most {MOST_CHARACTERS} can be enforced")
            plain = json.loads(text, parse_constant=_no_number)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"json_schema is no JSON Schema: {error}") from None
        return "schema", json.dumps(schema.enforceable(plain), ensure_ascii=False)

    @staticmethod
    def _regex(given: Any) -> tuple[str, str]:
        return "regex", _text("regex", given)

    @staticmethod
    def _ebnf(given: Any) -> tuple[str, str]:
        return "ebnf", _text("ebnf", given)

    @staticmethod
    def _choice(given: Any) -> tuple[str, str]:
        strings = None if isinstance(given, (str, Mapping)) else list(given)
        if not strings or len(strings) > MOST_CHOICES or not all(isinstance(s, str) and s for s in strings):
            raise ValueError(f"choice is {given!r:.80}; give 1 to {MOST_CHOICES} strings of at least one character")
        return "ebnf", "root ::= " + " | ".join(map(_literal, dict.fromkeys(strings)))

    @staticmethod
    def _tags(given: Any) -> tuple[str, str]:
        return "tags", json.dumps(given, ensure_ascii=False)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _text(name: str, given: Any) -> str:
    if not isinstance(given, str) or not given:
        raise ValueError(f"{name} is {given!r:.80}; give a text of at least one character")
    return given


def _literal(string: str) -> str:
    """A string in GBNF: what is not plain ASCII as \\UXXXXXXXX."""
    plain = (c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in string)
    return f'"{"".join(plain)}"'
