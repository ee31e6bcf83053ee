"""JSON Schemas without schemas in them, spelled for XGrammar: strings, numbers, given values.  See schema.py."""

import math
from collections.abc import Mapping
from typing import Any

from llmkernels.structured import pattern

MOST_NESTED = 32  # values in values
MOST_MULTIPLES = 1000
LARGEST = 2**53  # integers beyond are not exact everywhere JSON is read
KINDS = {  # type -> its keywords
    "object": ("properties", "required", "additionalProperties", "patternProperties", "propertyNames",
               "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "boolean": (),
    "null": (),
}  # fmt: skip
BYTE = "(?:[0-9]|[1-9][0-9]|1[0-9][0-9]|2[0-4][0-9]|25[0-5])"
FORMATS = (
    "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "uri-reference",
    "uri-template", "json-pointer", "relative-json-pointer",
)  # fmt: skip


def leaf(kind: str, own: dict[str, Any], at: str) -> dict[str, Any]:
    """A string, a number, null or a boolean."""
    if kind == "string":
        shape = next((key for key in ("pattern", "format") if key in own), None)
        if shape and len(own) > 1:
            raise refused(f"{next(key for key in own if key != shape)} beside {shape}", at)
        if own.get("minLength", 0) > own.get("maxLength", math.inf):
            raise ValueError(f"json_schema{at}.minLength is above maxLength; no string satisfies that")
        if shape == "format" and own["format"] not in FORMATS:
            raise refused(f"format {own['format']!r:.40}", at)
        if shape == "pattern":
            own = {"pattern": translated(own["pattern"], at)}
        elif own.get("format") == "ipv4":  # XGrammar's allows zeros in front
            own = {"pattern": rf"(?:{BYTE}\.){{3}}{BYTE}"}
        elif not shape and own:  # XGrammar's bounded strings may hold control characters
            own = {"pattern": pattern.of_length(own.get("minLength", 0), own.get("maxLength"))}
    elif kind in ("number", "integer"):
        for key, value in own.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not abs(value) <= LARGEST or (isinstance(value, float) and abs(value) < 1e-9 and value):
                raise ValueError(f"json_schema{at}.{key} is {value!r:.40}; give a number of at most {LARGEST}")
        return _range(kind, own, at)
    return {"type": kind} | own


def _range(kind: str, own: dict[str, Any], at: str) -> dict[str, Any]:
    step = own.get("multipleOf")
    if step is not None:
        if step != int(step) or step < 1:
            raise refused(f"multipleOf {step}, which is no whole number,", at)
        kind = "integer"
    low, high = own.get("minimum", -math.inf), own.get("maximum", math.inf)
    above, below = own.get("exclusiveMinimum", -math.inf), own.get("exclusiveMaximum", math.inf)
    spelled: dict[str, Any] = {"type": kind}
    if kind == "integer":
        low = low if math.isinf(low) else math.ceil(low)
        high = high if math.isinf(high) else math.floor(high)
        low = low if math.isinf(above) else max(low, math.floor(above) + 1)
        high = high if math.isinf(below) else min(high, math.ceil(below) - 1)
        above, below = -math.inf, math.inf
        if step is not None:
            return _multiples(int(step), low, high, at)
        low, high = max(low, -LARGEST), min(high, LARGEST)  # or a model may write digits until it is stopped
    if low > high or low >= below or above >= high or above >= below:
        raise ValueError(f"json_schema{at} has a minimum above its maximum; no number satisfies that")
    if above >= low:
        low = -math.inf
    else:
        above = -math.inf
    if below <= high:
        high = math.inf
    else:
        below = math.inf
    bounds = {"minimum": low, "maximum": high, "exclusiveMinimum": above, "exclusiveMaximum": below}
    return spelled | {key: bound for key, bound in bounds.items() if not math.isinf(bound)}


def _multiples(step: int, low: float, high: float, at: str) -> dict[str, Any]:
    """Within bounds, as the numbers themselves: XGrammar passes over multipleOf beside wide bounds."""
    if math.isinf(low) and math.isinf(high):
        return {"type": "integer", "multipleOf": step}
    if math.isinf(low) or math.isinf(high) or high - low > MOST_MULTIPLES * step:
        raise refused("multipleOf beside bounds so far apart", at)
    values = [*range(math.ceil(low / step) * step, math.floor(high) + 1, step)]
    if not values:
        raise ValueError(f"json_schema{at} has no multiple of {step} from {low} to {high}")
    return {"enum": values}


def one_of_values(schema: dict[str, Any], at: str) -> dict[str, Any]:
    """`enum` and `const`, those of the `type`."""
    for key in schema:
        if key not in ("enum", "const", "type"):
            raise refused(f"{key} beside {'enum' if 'enum' in schema else 'const'}", at)
    values = listed(schema["enum"], f"{at}.enum") if "enum" in schema else [schema["const"]]
    if "const" in schema:
        values = [value for value in values if _same(value, schema["const"])]
    kinds = schema.get("type", list(KINDS))
    values = [v for v in values if any(_is(v, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds))]
    if not values:
        raise ValueError(f"json_schema{at} has an enum or const, and no value of it has the type; give one that has")
    for value in values:
        _check_value(value, at)
    return {"enum": values}


def _check_value(value: Any, at: str, depth: int = 0) -> None:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    if depth > MOST_NESTED or (isinstance(value, (int, float)) and not abs(value) <= LARGEST):
        raise ValueError(f"json_schema{at} has a value {value!r:.40} that is too large to be written exactly")
    for item in inside:
        _check_value(item, at, depth + 1)


def _is(value: Any, kind: str) -> bool:
    if kind in ("number", "integer"):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and (kind == "number" or value == int(value))
    types: dict[str, Any] = {"object": Mapping, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(value, types[kind])


def _same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def translated(word: Any, at: str) -> str:
    if not isinstance(word, str):
        raise ValueError(f"json_schema{at}.pattern is {word!r:.40}; give a text")
    try:
        return pattern.of_a_json_string(word)
    except ValueError as error:
        raise ValueError(f"json_schema{at}: {error}") from None


def listed(given: Any, at: str) -> list[Any]:
    if not isinstance(given, list) or not given:
        raise ValueError(f"json_schema{at} is {given!r:.40}; give a list of at least one")
    return given


def refused(what: str, at: str) -> ValueError:
    return ValueError(f"json_schema{at}: {what} is not enforced; leave it out")
