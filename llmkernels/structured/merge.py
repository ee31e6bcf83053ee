"""Two JSON Schemas as one, for allOf and for keywords beside anyOf; and whether no value satisfies two of them."""

from collections.abc import Mapping
from typing import Any

from llmkernels.structured.leaves import KINDS

LOWER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")  # the larger one holds
UPPER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
WHOLE = ("additionalProperties", "patternProperties", "propertyNames")  # mean another thing with more properties
Schema = Mapping[str, Any]
FORMS: dict[str, tuple[Any, str]] = {  # what values the keywords have that are read before their own turn
    "$ref": (str, "a text"),
    "properties": (Mapping, "an object of schemas"),
    "required": (list, "a list of names"),
    "enum": (list, "a list"),
} | dict.fromkeys((*LOWER, *UPPER), ((int, float), "a number"))


def merged(one: Schema, other: Schema, at: str) -> dict[str, Any]:
    """What satisfies both; ValueError with the keyword that stands in the way."""
    check_forms(one, at)
    check_forms(other, at)
    both = dict(one)
    for first, second in ((one, other), (other, one)):
        for key in WHOLE:
            names = [set(schema.get("properties", ())) for schema in (first, second)]
            alike = first.get(key) == second.get(key) and names[0] == names[1]
            if key in first and {"properties", "required", *WHOLE} & set(second) and not alike:
                raise ValueError(f"json_schema{at}: {key} in one of several schemas that hold together is not enforced")
    for key, value in other.items():
        if key not in both or both[key] == value:
            both[key] = value
        elif key == "required":
            both[key] = [*both[key], *(name for name in value if name not in both[key])]
        elif key == "properties":
            both[key] = both[key] | {
                name: merged(_open(both[key].get(name, {})), _open(schema), f"{at}.properties.{name}")
                for name, schema in value.items()
            }
        elif key == "type":
            both[key] = _common_types(_types(both), _types(other))
        elif key == "enum":
            both[key] = [item for item in both[key] if item in value]
        elif key in LOWER:
            both[key] = max(both[key], value)
        elif key in UPPER:
            both[key] = min(both[key], value)
        else:
            raise ValueError(f"json_schema{at}: {key} in several schemas that hold together is not enforced; write one")
    return both


def disjoint(one: Schema, other: Schema) -> bool:
    """Whether surely no answer that is made for one of them satisfies the other.

    By types, by values, or for objects by a property that both require and that is disjoint, or that each requires and
    the other, which allows no more than its own properties, does not name.
    """
    check_forms(one, "")
    check_forms(other, "")
    if not _common_types(_types(one), _types(other)):
        return True
    values = [_values(schema) for schema in (one, other)]
    if values[0] is not None and values[1] is not None:
        return not any(a == b for a in values[0] for b in values[1])
    kinds = _common_types(_types(one), _types(other))
    if kinds != ["object"] or not all("properties" in schema for schema in (one, other)):
        return False
    first, second = one["properties"], other["properties"]
    shared = set(one.get("required", ())) & set(other.get("required", ())) & set(first) & set(second)
    if any(disjoint(_open(first[name]), _open(second[name])) for name in shared):
        return True
    closed = all(schema.get("additionalProperties", False) is False for schema in (one, other))
    return (
        closed
        and bool(set(one.get("required", ())) - set(second))
        and bool(set(other.get("required", ())) - set(first))
    )


def check_forms(schema: Schema, at: str) -> None:
    """ValueError unless these keywords have their form."""
    for key, (kind, words) in FORMS.items():
        given = schema.get(key)
        wrong = not isinstance(given, kind) or (key == "required" and not all(isinstance(name, str) for name in given))
        if key in schema and wrong:
            raise ValueError(f"json_schema{at}.{key} is {given!r:.40}; give {words}")
    if "type" in schema:
        kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not isinstance(kinds, list) or not kinds or not all(kind in [*KINDS] for kind in kinds):
            raise ValueError(f"json_schema{at}.type is {schema['type']!r:.80}; give one or some of {', '.join(KINDS)}")


def _open(schema: Any) -> Schema:
    return schema if isinstance(schema, Mapping) else {} if schema is True else {"enum": []}


def _types(schema: Schema) -> list[str]:
    """Those that its answers may have."""
    values = _values(schema)
    if values is not None and "type" not in schema:
        names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", type(None): "null"}
        return sorted({names.get(type(value), "object") for value in values})
    implied = [kind for kind, words in KINDS.items() if kind != "integer" and set(words) & set(schema)]
    kinds = schema.get("type", implied or [kind for kind in KINDS if kind != "integer"])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _common_types(one: list[str], other: list[str]) -> list[str]:
    both = [kind for kind in one if kind in other]
    if ("number" in one and "integer" in other) or ("number" in other and "integer" in one):
        both = [kind for kind in both if kind != "integer"] + ["integer"]
    return both


def _values(schema: Schema) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")
