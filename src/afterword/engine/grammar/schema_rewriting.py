"""Rewrites a JSON Schema into an equal or narrower one that llguidance reads as the draft says.

- Formats that llguidance reads too widely become patterns (`schema_formats`).
- `oneOf` becomes `anyOf` where a member of the objects tells the alternatives apart, as in the unions that Pydantic and
  OpenAPI write. llguidance finds that out by itself only if the alternatives do not contain each other.
- Annotations that llguidance does not know, such as `discriminator`, are left out beside references and alternatives.
  It takes them for a second schema, which it cannot join with a recursive one.
- `propertyNames` with a list or a pattern becomes `properties` or `patternProperties`.
- Bounds such as `"maxItems": 2.0` become integers.
"""

from __future__ import annotations

from typing import Any

from afterword.engine.grammar.schema_formats import FORMATS

Schema = dict[str, Any]

_COUNTS = ("maxItems", "minItems", "maxLength", "minLength", "maxProperties", "minProperties")
_VALUES = ("const", "default", "enum", "example", "examples")  # of these keywords the value is no schema
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_ANNOTATIONS = ("deprecated", "discriminator", "example", "nullable")
_APPLICATORS = ("$ref", "anyOf", "oneOf", "allOf")
_MOST_REFERENCES = 60  # that lead from one to the next


def rewritten(schema: Any) -> Any:
    """The schema, rewritten. Unknown keywords are searched too: references can lead into them."""
    return _rewritten(schema, schema)


def _rewritten(schema: Any, root: Any) -> Any:
    if isinstance(schema, list):
        return [_rewritten(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    exact = {key: _member(key, value, root) for key, value in schema.items()}
    if any(key in exact for key in _APPLICATORS):
        exact = {key: value for key, value in exact.items() if not _is_annotation(key)}
    name = exact.get("format")
    if isinstance(name, str) and name in FORMATS:
        del exact["format"]
        exact["allOf"] = [*exact.get("allOf", ()), FORMATS[name]]
    if "oneOf" in exact and "anyOf" not in exact and _are_told_apart(schema["oneOf"], root):
        exact["anyOf"] = exact.pop("oneOf")
    return _with_listed_names(exact)


def _member(key: str, value: Any, root: Any) -> Any:
    if key in _COUNTS and isinstance(value, float) and value.is_integer():
        return int(value)
    if key in _VALUES:
        return value
    if key in _OF_NAMES and isinstance(value, dict):
        return {name: _rewritten(each, root) for name, each in value.items()}
    return _rewritten(value, root)


def _is_annotation(key: str) -> bool:
    return key in _ANNOTATIONS or key.startswith("x-")


# ---- alternatives


def _are_told_apart(alternatives: Any, root: Any) -> bool:
    """Whether no value matches two of these schemas, because of one member of theirs.

    All are objects. The member's texts differ between any two, and at most one schema allows it to be absent.
    """
    if not isinstance(alternatives, list):
        return False
    found = [_resolved(each, root) for each in alternatives]
    objects = [each for each in found if isinstance(each, dict) and each.get("type") == "object"]
    if len(objects) < len(alternatives):
        return False
    names = set.intersection(*(set(_members(each)) for each in objects)) if objects else set()
    return any(_tells_apart(name, objects) for name in names)


def _tells_apart(name: str, objects: list[Schema]) -> bool:
    texts = [_texts(_members(each)[name]) for each in objects]
    optional = [each for each in objects if not _requires(each, name)]
    every = [text for each in texts for text in each]
    return all(texts) and len(set(every)) == len(every) and len(optional) <= 1


def _members(schema: Schema) -> Schema:
    members = schema.get("properties")
    return members if isinstance(members, dict) else {}


def _requires(schema: Schema, name: str) -> bool:
    required = schema.get("required")
    return isinstance(required, list) and name in required


def _texts(schema: Any) -> list[str]:
    """The texts that a schema lists. Empty if it allows anything else."""
    if not isinstance(schema, dict):
        return []
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        return []
    return list(dict.fromkeys(listed))


def _resolved(schema: Any, root: Any) -> Any:
    """The schema that a chain of references inside the document leads to; None if one leads nowhere."""
    for _ in range(_MOST_REFERENCES):
        if not isinstance(schema, dict) or "$ref" not in schema:
            return schema
        pointer = schema["$ref"]
        if not isinstance(pointer, str) or not pointer.startswith("#/") or "%" in pointer:
            return None
        schema = root
        for part in pointer[2:].split("/"):
            key = part.replace("~1", "/").replace("~0", "~")
            schema = schema.get(key) if isinstance(schema, dict) else None
    return None


# ---- names of members


def _with_listed_names(schema: Schema) -> Schema:
    """The schema without `propertyNames`, if that lists names or has a pattern and nothing else says what they are."""
    names = schema.get("propertyNames")
    if not isinstance(names, dict) or "properties" in schema or "patternProperties" in schema:
        return schema
    value = schema.get("additionalProperties", True)
    texts = _texts(names)
    if texts and set(names) <= {"enum", "const", "type"} and names.get("type", "string") == "string":
        listed = {"properties": dict.fromkeys(texts, value)}
    elif isinstance(names.get("pattern"), str) and set(names) <= {"pattern", "type"}:
        listed = {"patternProperties": {names["pattern"]: value}}
    else:
        return schema
    rest = {key: each for key, each in schema.items() if key != "propertyNames"}
    return {**rest, **listed, "additionalProperties": False}
