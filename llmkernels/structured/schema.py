"""Which JSON Schemas can be enforced, and in which spelling.

XGrammar turns a schema into a grammar, and passes over what it cannot express: `not`, `uniqueItems`, `minLength` beside
`pattern`, `minimum` without a `type`, an `allOf` of several, and more.  So a schema is spelled anew here, in the part
of the language that XGrammar was found to enforce, and a keyword that is not in it is an error with its name.

An answer satisfies the schema as JSON Schema 2020-12 reads it.  Not every instance of it can be an answer: a keyword
for one type implies that type where `type` is not given, an object holds only what `properties` names unless
additionalProperties says more, integers are written without a point.  `format` constrains the shape: 2025-02-30 is a
date.
"""

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from llmkernels.structured.leaves import KINDS, leaf, listed, one_of_values, refused, translated
from llmkernels.structured.merge import check_forms, disjoint, merged

MOST_NESTED = 32  # compiling takes the cube of the depth
APPLIED = {"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf", *(w for words in KINDS.values() for w in words)}
UNEVALUATED = ("$ref", "anyOf", "oneOf", "allOf")  # may evaluate properties elsewhere
NOTES = (
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment",
    "$schema", "$id", "$defs", "definitions",
)  # fmt: skip
MOST_BRANCHES = 64  # of oneOf, each compared with each
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def enforceable(schema: Any) -> dict[str, Any]:
    """The schema in the spelling that is enforced; ValueError with the name and place of what cannot be."""
    try:
        return _Speller(schema).spelled()
    except RecursionError:
        raise ValueError(f"json_schema has $refs nested more than {MOST_NESTED} deep; make it flatter") from None


class _Speller:
    """Goes through a schema from its root; references become definitions, each spelled once."""

    def __init__(self, root: Any):
        self.root = root
        self.names: dict[str, str] = {}
        self.definitions: dict[str, Any] = {}

    def spelled(self) -> dict[str, Any]:
        found = self.any(self.root, "", 0)
        return found | ({"$defs": self.definitions} if self.definitions else {})

    def any(self, schema: Any, at: str, depth: int) -> dict[str, Any]:
        """One schema.  at: where it is, for messages."""
        if depth > MOST_NESTED:
            raise ValueError(f"json_schema{at} is nested more than {MOST_NESTED} deep; make it flatter")
        if schema is True:
            return {}
        if not isinstance(schema, Mapping):
            what = "false, which nothing satisfies" if schema is False else f"{schema!r:.40}"
            raise ValueError(f"json_schema{at} is {what}; give a schema")
        schema = {key: value for key, value in schema.items() if key not in NOTES}
        check_forms(schema, at)
        if schema.pop("uniqueItems", False):
            raise refused("uniqueItems", at)
        if schema.get("unevaluatedProperties") is False and not {*UNEVALUATED, "additionalProperties"} & set(schema):
            schema["additionalProperties"] = schema.pop("unevaluatedProperties")
        for key in schema:
            if key not in APPLIED:
                raise refused(key, at)
        if "allOf" in schema:
            for branch in listed(schema.pop("allOf"), f"{at}.allOf"):
                schema = merged(schema, self.resolved(branch, at), at)
            return self.any(schema, at, depth + 1)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self.branches(key, schema, at, depth)
        if "$ref" in schema:
            return self.reference(schema, at, depth)
        if "enum" in schema or "const" in schema:
            return one_of_values(schema, at)
        return self.typed(schema, at, depth)

    def branches(self, key: str, schema: dict[str, Any], at: str, depth: int) -> dict[str, Any]:
        rest = dict(schema)
        given = listed(rest.pop(key), f"{at}.{key}")
        if key == "oneOf":
            if len(given) > MOST_BRANCHES:
                raise ValueError(f"json_schema{at}.oneOf has {len(given)} branches; give at most {MOST_BRANCHES}")
            plain = [self.resolved(branch, at) for branch in given]
            for i, one in enumerate(plain):
                for other in plain[:i]:
                    if not disjoint(merged(rest, one, at), merged(rest, other, at)):
                        raise ValueError(
                            f"json_schema{at}.oneOf has branches that one value may satisfy together, which cannot be "
                            "excluded; give each a property with another const, or write anyOf"
                        )
        if rest:
            given = [merged(rest, self.resolved(branch, at), at) for branch in given]
        return {"anyOf": [self.any(branch, f"{at}.{key}[{i}]", depth + 1) for i, branch in enumerate(given)]}

    def reference(self, schema: dict[str, Any], at: str, depth: int) -> dict[str, Any]:
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        if rest:
            return self.any(merged(rest, self.resolved({"$ref": schema["$ref"]}, at), at), at, depth + 1)
        to = schema["$ref"]
        seen = {to}
        target = self.target(to, at)
        while isinstance(target, Mapping) and isinstance(target.get("$ref"), str):
            if target["$ref"] in seen:
                raise ValueError(f"json_schema{at}.$ref {to!r} leads back to itself; let it end in a schema")
            seen.add(target["$ref"])
            target = self.target(target["$ref"], at)
        if to not in self.names:
            self.names[to] = f"d{len(self.names)}"
            self.definitions[self.names[to]] = None  # its place, while it is spelled
            self.definitions[self.names[to]] = self.any(self.target(to, at), f"({to})", 0)
        return {"$ref": f"#/$defs/{self.names[to]}"}

    def target(self, to: Any, at: str) -> Any:
        """What a $ref points to."""
        if not isinstance(to, str) or not (to == "#" or to.startswith("#/")):
            raise ValueError(f"json_schema{at}.$ref is {to!r:.80}; only places in the schema itself, #/..., are known")
        found = self.root
        for step in to[2:].split("/") if to != "#" else ():
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and step.isdigit() and int(step) < len(found):
                found = found[int(step)]
            elif isinstance(found, Mapping) and step in found:
                found = found[step]
            else:
                raise ValueError(f"json_schema{at}.$ref {to!r:.80} leads nowhere; there is no {step!r:.40}")
        return found

    def resolved(self, schema: Any, at: str) -> dict[str, Any]:
        """A branch as plain keywords: a reference alone is replaced by what it leads to."""
        for _ in range(MOST_NESTED):
            if schema is True:
                return {}
            if not isinstance(schema, Mapping):
                break
            schema = {key: value for key, value in schema.items() if key not in NOTES}
            if set(schema) != {"$ref"}:
                return schema
            schema = self.target(schema["$ref"], at)
        raise ValueError(f"json_schema{at} has a branch {schema!r:.40}; give a schema")

    def typed(self, schema: dict[str, Any], at: str, depth: int) -> dict[str, Any]:
        """No composition: `type`, given or implied, with its keywords."""
        kinds = schema.get("type")
        if kinds is None:
            kinds = [kind for kind, words in KINDS.items() if kind != "integer" and set(words) & set(schema)]
            if not kinds:
                return {}
        kinds = [kinds] if isinstance(kinds, str) else kinds
        each = []
        for kind in dict.fromkeys(kinds):
            own = {key: schema[key] for key in KINDS[kind] if key in schema}
            for key in COUNTS:
                if key in own and not (
                    isinstance(own[key], int) and not isinstance(own[key], bool) and 0 <= own[key] < 2**31
                ):
                    raise ValueError(f"json_schema{at}.{key} is {own[key]!r:.40}; give a number of at least 0")
            spell = {"object": self.object, "array": self.array}.get(kind)
            each.append(spell(own, at, depth) if spell else leaf(kind, own, at))
        return each[0] if len(each) == 1 else {"anyOf": each}

    def array(self, own: dict[str, Any], at: str, depth: int) -> dict[str, Any]:
        if isinstance(own.get("items"), list):
            raise refused("items as a list (2020-12 calls it prefixItems)", at)
        least, most = own.get("minItems", 0), own.get("maxItems", math.inf)
        first = own.get("prefixItems", [])
        if first != []:
            first = listed(first, f"{at}.prefixItems")
        items = own.get("items", not first or least > len(first))
        if items is False:
            most = min(most, len(first))
        if least > most:
            raise ValueError(f"json_schema{at} has minItems {least} and at most {most} items; nothing satisfies that")
        first = first[: int(min(most, len(first)))]
        spelled: dict[str, Any] = {"type": "array"}
        if first:
            spelled["prefixItems"] = [
                self.any(item, f"{at}.prefixItems[{i}]", depth + 1) for i, item in enumerate(first)
            ]
        wanted = items is not False and most > len(first)
        spelled["items"] = self.any(items, f"{at}.items", depth + 1) if wanted else False
        spelled |= {"minItems": least} if least else {}
        return spelled | ({"maxItems": most} if most < math.inf and (wanted or not first) else {})

    def object(self, own: dict[str, Any], at: str, depth: int) -> dict[str, Any]:
        properties, required = own.get("properties", {}), own.get("required", [])
        named = {}
        for name, schema in properties.items():
            if schema is not False or name in required:
                named[name] = self.any(schema, f"{at}.properties.{name}", depth + 1)
        by_pattern, names = own.get("patternProperties", {}), own.get("propertyNames", True)
        others = own.get("additionalProperties", not properties and not by_pattern)
        for name in required:
            if name not in named:
                if by_pattern or own.get("additionalProperties") is False or names is not True:
                    raise refused(f"required {name!r}, which is not among properties,", at)
                named[name] = self.any(own.get("additionalProperties", True), f"{at}.additionalProperties", depth + 1)
        if names is not True:
            plain = isinstance(names, Mapping) and set(names) - {"type", *NOTES} == {"pattern"}
            if not plain or not isinstance(names["pattern"], str) or by_pattern or properties:
                raise refused("propertyNames, other than a pattern for all properties,", at)
            by_pattern, others = {names["pattern"]: others}, False
        least, most = own.get("minProperties", 0), own.get("maxProperties", math.inf)
        spelled: dict[str, Any] = {"type": "object"}
        if by_pattern:
            if not isinstance(by_pattern, Mapping) or len(by_pattern) > 1 or named:
                raise refused("patternProperties beside other properties", at)
            ((word, schema),) = by_pattern.items()
            value = self.any(schema, f"{at}.patternProperties.{word}", depth + 1)
            spelled |= {"patternProperties": {translated(word, at): value}, "additionalProperties": False}
        else:
            spelled |= {"properties": named} if named else {}
            spelled |= {"required": list(dict.fromkeys(required))} if required else {}
            spelled["additionalProperties"] = others and self.any(others, f"{at}.additionalProperties", depth + 1)
        free = by_pattern or others is not False
        if least > most or max(least, len(set(required))) > most or (not free and least > len(named)):
            raise ValueError(f"json_schema{at}.minProperties is {least}; no object has as many of those allowed")
        if free and least > max(1, len(set(required))):
            raise refused("minProperties of free names, which may come twice,", at)
        spelled |= {"minProperties": least} if least > len(set(required)) else {}
        return spelled | ({"maxProperties": most} if most < math.inf and (free or most < len(named)) else {})
