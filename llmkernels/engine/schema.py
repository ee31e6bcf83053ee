"""Which JSON Schemas can be enforced."""

from typing import Any


def enforceable(schema: Any) -> Any:
    """The schema, if every keyword in it is enforced; ValueError with the name of one that is not."""
    if isinstance(schema, bool):
        if not schema:
            raise ValueError("json_schema is false, which nothing satisfies; give a schema")
        return {}
    return schema
