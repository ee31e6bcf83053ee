"""Two hundred JSON Schemas and what becomes of each: None, an answer that satisfies it, or the word of the refusal.

The kinds are those of the JSON-Schema-Test-Suite for 2020-12, a few schemas each; then some as tools and extraction
tasks have them.
"""

from typing import Any

# ruff: noqa: E501  (one schema a line)

INTEGER, STRING, NULL = {"type": "integer"}, {"type": "string"}, {"type": "null"}


def closed(**properties: Any) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def some(**properties: Any) -> dict[str, Any]:
    """An object that may have these properties."""
    return {"type": "object", "properties": properties}


def words(least: int = 1, most: int = 6) -> dict[str, Any]:
    return {"type": "string", "minLength": least, "maxLength": most}


def items(schema: Any, least: int = 0, most: int = 3) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": least, "maxItems": most}


KEYWORDS: list[tuple[Any, str | None]] = [
    # type
    (INTEGER, None),
    ({"type": "number"}, None),
    (words(0, 5), None),
    (NULL, None),
    ({"type": "boolean"}, None),
    (items(INTEGER), None),
    ({"type": "object", "maxProperties": 2, "additionalProperties": INTEGER}, None),
    ({"type": ["integer", "null"]}, None),
    ({"type": ["boolean", "string"], "maxLength": 3}, None),
    ({"type": ["object", "array"], "properties": {"a": INTEGER}, "items": INTEGER, "maxItems": 2}, None),
    ({"type": "text"}, "type is 'text'"),
    ({"type": []}, "type is []"),
    ({"type": [["string"]]}, "type is [['string']]"),
    ({"type": "array", "prefixItems": 0, "items": False}, "prefixItems is 0"),
    ({"type": "object", "propertyNames": {"pattern": {}}}, "propertyNames"),
    ({"allOf": [{"properties": "a"}, {"properties": {"a": INTEGER}}]}, "properties is 'a'"),
    ({"oneOf": [{"required": [["a"]]}, {"type": "object", "required": ["b"]}]}, "required is [['a']]"),
    # enum, const
    ({"enum": ["red", "green", "blue"]}, None),
    ({"enum": [1, 2.5, "x", None, True, [1, 2], {"a": 1}]}, None),
    ({"enum": ['quote"', "back\\slash", "new\nline", "é", "😀", ""]}, None),
    ({"type": "integer", "enum": [1, "one", 2]}, None),
    ({"type": "string", "enum": [1]}, "enum"),
    ({"enum": []}, "enum"),
    ({"enum": [1, 2], "minimum": 2}, "minimum beside enum"),
    ({"enum": [10**30]}, "too large"),
    ({"const": "fixed"}, None),
    ({"const": {"a": [1, {"b": None}]}}, None),
    ({"const": 0}, None),
    ({"const": False}, None),
    ({"const": 1.5}, None),
    ({"const": -7, "type": "integer"}, None),
    # minimum, maximum, exclusive, multipleOf
    ({"type": "integer", "minimum": 3, "maximum": 12}, None),
    ({"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3}, None),
    ({"type": "integer", "minimum": 0.5, "maximum": 3.5}, None),
    ({"type": "integer", "minimum": -1000, "maximum": 99999}, None),
    ({"type": "integer", "minimum": 7, "exclusiveMinimum": 5, "maximum": 9}, None),
    ({"type": "integer", "maximum": -5}, None),
    ({"type": "number", "minimum": 0, "maximum": 1}, None),
    ({"type": "number", "minimum": -1.5, "maximum": 2.25}, None),
    ({"type": "number", "exclusiveMinimum": 0}, None),
    ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 100}, None),
    ({"type": "number", "maximum": -0.25}, None),
    ({"minimum": 5}, None),
    ({"type": "integer", "multipleOf": 5}, None),
    ({"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 50}, None),
    ({"type": "number", "multipleOf": 10}, None),
    ({"type": "number", "multipleOf": 0.01}, "multipleOf"),
    ({"type": "integer", "multipleOf": 100, "minimum": 1, "maximum": 99}, "multiple of 100"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum above its maximum"),
    ({"type": "number", "exclusiveMinimum": 1, "maximum": 1}, "minimum above its maximum"),
    ({"type": "integer", "minimum": "3"}, "minimum is '3'"),
    ({"type": "integer", "maximum": 10**20}, "maximum is 1000"),
    # minLength, maxLength, pattern, format
    (words(3, 3), None),
    ({"type": "string", "maxLength": 0}, None),
    ({"minLength": 2, "maxLength": 4}, None),
    ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
    ({"type": "string", "minLength": -1}, "minLength is -1"),
    ({"type": "string", "pattern": "^[a-z]{2,5}$"}, None),
    ({"type": "string", "pattern": "^\\d{3}-\\d{4}$"}, None),
    ({"type": "string", "pattern": "^(yes|no|maybe)$"}, None),
    ({"type": "string", "pattern": '^"[^"]{1,3}"$'}, None),
    ({"type": "string", "pattern": "^[\\w.+-]{1,8}@[a-z]{1,6}\\.(com|org)$"}, None),
    ({"type": "string", "pattern": "^#[0-9A-Fa-f]{6}$"}, None),
    ({"type": "string", "pattern": "^\\S{1,4}$"}, None),
    ({"type": "string", "pattern": "^[A-Z]\\\\[a-z]$"}, None),
    ({"type": "string", "pattern": "^[à-ü]{2}$"}, None),
    ({"type": "string", "pattern": "^(?=a)"}, "look-around"),
    ({"type": "string", "pattern": "^(a)\\1$"}, "\\1"),
    ({"type": "string", "pattern": "\\bword\\b"}, "\\b"),
    ({"type": "string", "pattern": "^\\p{Letter}+$"}, "\\p"),
    ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "maxLength beside pattern"),
    ({"type": "string", "pattern": "("}, "pattern"),
    *(({"type": "string", "format": name}, None) for name in ("date", "time", "date-time", "duration", "ipv4", "ipv6", "uuid")),
    ({"type": "string", "format": "phone"}, "format 'phone'"),
    ({"type": "string", "format": "date", "minLength": 10}, "minLength beside format"),
    ({"type": "string", "contentEncoding": "base64"}, "contentEncoding"),
    # items, prefixItems, minItems, maxItems, uniqueItems, contains
    (items(words(), 2, 2), None),
    (items(items(INTEGER, 1, 2), 1, 2), None),
    ({"items": {"type": "boolean"}, "maxItems": 3}, None),
    ({"type": "array", "maxItems": 0}, None),
    ({"type": "array", "minItems": 1, "maxItems": 2, "items": True}, None),
    ({"type": "array", "items": False}, None),
    ({"type": "array", "prefixItems": [INTEGER, words()], "items": False}, None),
    ({"type": "array", "prefixItems": [INTEGER, words()], "minItems": 2}, None),
    ({"type": "array", "prefixItems": [INTEGER], "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}, None),
    ({"type": "array", "prefixItems": [INTEGER, words(), NULL], "maxItems": 2}, None),
    ({"type": "array", "prefixItems": [INTEGER], "items": False, "minItems": 2}, "minItems"),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems"),
    ({"type": "array", "items": [INTEGER]}, "items as a list"),
    ({"type": "array", "items": INTEGER, "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "items": INTEGER, "maxItems": 2, "uniqueItems": False}, None),
    ({"type": "array", "contains": INTEGER}, "contains"),
    ({"type": "array", "items": INTEGER, "minContains": 1}, "minContains"),
    ({"type": "array", "prefixItems": [INTEGER], "unevaluatedItems": False}, "unevaluatedItems"),
    ({"type": "array", "additionalItems": False}, "additionalItems"),
    # properties, required, additionalProperties and others of objects
    (closed(a=INTEGER, b=words()), None),
    (some(a=INTEGER, b=words(), c=NULL), None),
    ({"properties": {"a": INTEGER}}, None),
    (some(a=INTEGER) | {"required": ["a"]}, None),
    (some(a=INTEGER) | {"required": ["b"]}, None),
    ({"type": "object", "required": ["a"]}, None),
    ({"required": ["a", "b"]}, None),
    (some(a=INTEGER) | {"required": ["b"], "additionalProperties": {"type": "boolean"}}, None),
    (some(a=INTEGER) | {"required": ["b"], "additionalProperties": False}, "required 'b'"),
    (some(a=INTEGER) | {"required": "a"}, "required"),
    (some(a=INTEGER) | {"additionalProperties": words(), "maxProperties": 3}, None),
    ({"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3}, None),
    ({"type": "object", "additionalProperties": False}, None),
    (some(a=INTEGER, b=False), None),
    (closed(a=False), "false"),
    (closed(**{'quo"te': INTEGER, "back\\slash": NULL, "é": NULL, "": NULL, "with space": NULL}), None),
    ({"type": "object", "patternProperties": {"^x-": INTEGER}, "maxProperties": 2}, None),
    ({"type": "object", "patternProperties": {"^[a-z]{2}$": words()}, "minProperties": 1, "maxProperties": 2}, None),
    ({"type": "object", "patternProperties": {"^x-": INTEGER, "y$": NULL}}, "patternProperties"),
    (some(a=INTEGER) | {"patternProperties": {"^a": NULL}}, "patternProperties"),
    ({"type": "object", "propertyNames": {"pattern": "^[a-c]$"}, "additionalProperties": INTEGER, "maxProperties": 2}, None),
    ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
    (some(a=NULL, b=NULL, c=NULL) | {"minProperties": 2}, None),
    (some(a=NULL, b=NULL, c=NULL) | {"maxProperties": 1}, None),
    ({"type": "object", "additionalProperties": NULL, "minProperties": 1, "maxProperties": 2}, None),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    (closed(a=NULL) | {"minProperties": 2}, "minProperties"),
    (some(a=NULL, b=NULL) | {"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    (some(a=NULL) | {"dependentSchemas": {"a": {"required": ["b"]}}}, "dependentSchemas"),
    (some(a=NULL) | {"dependencies": {"a": ["b"]}}, "dependencies"),
    (some(a=NULL) | {"unevaluatedProperties": False}, None),
    (some(a=NULL) | {"unevaluatedProperties": {"type": "string"}}, "unevaluatedProperties"),
    # anyOf, oneOf, allOf, not, if
    ({"anyOf": [INTEGER, words()]}, None),
    ({"anyOf": [{"minimum": 2, "maximum": 9}, {"maxLength": 3}]}, None),
    ({"type": "integer", "anyOf": [{"minimum": 2, "maximum": 5}, {"minimum": 10, "maximum": 20}]}, None),
    ({"anyOf": [closed(kind={"const": "a"}, x=INTEGER), closed(kind={"const": "b"}, y=words())]}, None),
    (some(a=INTEGER, b=INTEGER) | {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, None),
    ({"anyOf": []}, "anyOf"),
    ({"anyOf": [INTEGER, False]}, "false"),
    ({"oneOf": [INTEGER, words()]}, None),
    ({"oneOf": [closed(kind={"const": "a"}, x=INTEGER), closed(kind={"const": "b"}, y=words())]}, None),
    ({"oneOf": [closed(a=INTEGER), closed(b=INTEGER)]}, None),
    ({"oneOf": [{"enum": ["a", "b"]}, {"enum": ["c"]}, NULL]}, None),
    ({"oneOf": [INTEGER, {"type": "number"}]}, "oneOf"),
    ({"oneOf": [some(a=INTEGER), some(b=INTEGER)]}, "oneOf"),
    ({"oneOf": [{"minimum": 2}, {"maximum": 5}]}, "oneOf"),
    ({"allOf": [INTEGER, {"minimum": 2}, {"maximum": 4}]}, None),
    ({"allOf": [some(a=INTEGER) | {"required": ["a"]}, some(b=words()) | {"required": ["b"]}]}, None),
    ({"allOf": [{"type": "string"}, {"minLength": 2}], "maxLength": 4}, None),
    ({"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]}, None),
    ({"allOf": [{"type": ["string", "null"]}, {"type": ["null", "integer"]}]}, None),
    ({"allOf": [INTEGER, {"type": "string"}]}, "type"),
    ({"allOf": [{"pattern": "^a"}, {"pattern": "b$"}]}, "pattern"),
    ({"allOf": [closed(a=INTEGER), closed(b=INTEGER)]}, "additionalProperties"),
    ({"not": {"type": "integer"}}, "not"),
    ({"type": "string", "not": {"const": "a"}}, "not"),
    ({"if": {"type": "integer"}, "then": {"minimum": 2}}, "if"),
    ({"then": {"minimum": 2}}, "then"),
    ({"else": {"minimum": 2}}, "else"),
    # $ref, $defs, anchors, boolean schemas, annotations, unknown words
    ({"$ref": "#/$defs/a", "$defs": {"a": INTEGER}}, None),
    ({"$ref": "#/definitions/a", "definitions": {"a": words()}}, None),
    ({"$ref": "#/$defs/a", "maximum": 5, "$defs": {"a": {"type": "integer", "minimum": 2}}}, None),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": INTEGER}}, None),
    ({"$ref": "#/$defs/a%25~0", "$defs": {"a%~": INTEGER}}, None),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "boolean"}}}, None),
    (closed(first={"$ref": "#/properties/second"}, second=INTEGER), None),
    ({"type": "array", "prefixItems": [INTEGER, {"$ref": "#/prefixItems/0"}], "minItems": 2}, None),
    (some(value=INTEGER, next={"anyOf": [NULL, {"$ref": "#"}]}) | {"required": ["value", "next"]}, None),
    ({"$ref": "#/$defs/tree", "$defs": {"tree": closed(leaf={"type": "boolean"}, down=items({"$ref": "#/$defs/tree"}, 0, 1))}}, None),
    ({"$ref": "#"}, "$ref"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "$ref"),
    ({"$ref": "#/$defs/gone"}, "gone"),
    ({"$ref": "https://example.com/schema"}, "$ref"),
    ({"$ref": "#here", "$defs": {"a": {"$anchor": "here"}}}, "$ref"),
    ({"$dynamicRef": "#node"}, "$dynamicRef"),
    (closed(a={"$recursiveRef": "#"}), "$recursiveRef"),
    (False, "false"),
    ({"title": "T", "description": "d", "default": 1, "examples": [1], "$comment": "c", "type": "integer",
      "deprecated": True, "readOnly": True, "$schema": "https://json-schema.org/draft/2020-12/schema"}, None),
    ({"type": "integer", "nullable": True}, "nullable"),
    ({"type": "integer", "minimun": 3}, "minimun"),
    (["integer"], "['integer']"),
]  # fmt: skip

CITY, DAY = {"type": "string", "minLength": 2, "maxLength": 12}, {"type": "string", "format": "date"}
UNIT, AMOUNT = {"type": "string", "enum": ["celsius", "fahrenheit"]}, {"type": "number", "minimum": 0, "maximum": 1000}
REALISTIC: list[tuple[Any, str | None]] = [
    (schema, None)
    for schema in (
        closed(location=CITY, unit=UNIT),
        some(location=CITY, unit=UNIT) | {"required": ["location"]},
        closed(query=words(3, 20), limit={"type": "integer", "minimum": 1, "maximum": 50}),
        closed(path={"type": "string", "pattern": "^/[a-z/]{1,12}$"}, recursive={"type": "boolean"}),
        closed(to={"type": "string", "pattern": "^[a-z]{1,6}@[a-z]{1,6}\\.com$"}, subject=words(), body=words(0, 20)),
        closed(name=words(), age={"type": "integer", "minimum": 0, "maximum": 150}, tags=items(words())),
        closed(origin=CITY, destination=CITY, date=DAY, passengers={"type": "integer", "minimum": 1, "maximum": 9}),
        closed(
            items=items(closed(sku={"type": "string", "pattern": "^[A-Z]{3}-\\d{3}$"}, count=INTEGER), 1, 2),
            total=AMOUNT,
        ),
        closed(
            sentiment={"enum": ["positive", "neutral", "negative"]},
            confidence={"type": "number", "minimum": 0, "maximum": 1},
        ),
        closed(steps=items(closed(explanation=words(1, 10), output=words(1, 10)), 1, 2), final_answer=words(1, 8)),
        closed(id={"type": "string", "format": "uuid"}, created={"type": "string", "format": "date-time"}),
        closed(address=closed(street=words(), zip={"type": "string", "pattern": "^\\d{5}$"}, country={"const": "DE"})),
        closed(point={"type": "array", "prefixItems": [AMOUNT, AMOUNT], "items": False, "minItems": 2}),
        closed(
            color={"type": "string", "pattern": "^#[0-9a-f]{6}$"},
            opacity={"type": "number", "minimum": 0, "maximum": 1},
        ),
        closed(
            result={"anyOf": [closed(ok={"const": True}, value=INTEGER), closed(ok={"const": False}, error=words())]}
        ),
        closed(op={"enum": ["add", "sub", "mul"]}, left=INTEGER, right=INTEGER),
        closed(sql={"type": "string", "pattern": "^SELECT [a-z]{1,6} FROM [a-z]{1,6}$"}),
        closed(host={"type": "string", "format": "ipv4"}, port={"type": "integer", "minimum": 1, "maximum": 65535}),
        closed(optional={"type": ["string", "null"], "maxLength": 4}, flag={"type": "boolean"}),
        closed(entities=items(closed(text=words(), label={"enum": ["PER", "ORG", "LOC"]}, start=INTEGER), 0, 2)),
        closed(rating={"type": "integer", "minimum": 1, "maximum": 5}, review={"anyOf": [words(), NULL]}),
        closed(matrix=items(items(INTEGER, 2, 2), 2, 2)),
        closed(
            schedule=items(
                closed(day={"enum": ["mon", "tue"]}, at={"type": "string", "pattern": "^\\d\\d:\\d\\d$"}), 1, 2
            )
        ),
        closed(
            config={"type": "object", "additionalProperties": {"type": "string", "maxLength": 4}, "maxProperties": 2}
        ),
        {
            "$ref": "#/$defs/person",
            "$defs": {"person": closed(name=words(), boss={"anyOf": [{"$ref": "#/$defs/person"}, NULL]})},
        },
        closed(move={"type": "string", "pattern": "^[a-h][1-8][a-h][1-8]$"}, check={"type": "boolean"}),
        closed(command={"const": "ls"}, arguments=items({"enum": ["-l", "-a", "-h"]}, 0, 3)),
        closed(
            price=closed(amount=AMOUNT, currency={"enum": ["EUR", "USD"]}),
            discount={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 50},
        ),
    )
]
SCHEMAS = KEYWORDS + REALISTIC
