"""Rewrites a JSON Schema into an equal or narrower one that llguidance reads as the draft says.

- Formats that llguidance reads too widely become patterns (`schema_formats`).
- `oneOf` becomes `anyOf` where a member of the objects tells the alternatives apart, as in the unions that Pydantic and
  OpenAPI write. llguidance finds that out by itself only if the alternatives do not contain each other.
- Annotations that llguidance does not know, such as `discriminator`, are left out beside references and alternatives.
  It takes them for a second schema, which it cannot join with a recursive one.
- `propertyNames` with a list or a pattern becomes `properties` or `patternProperties`.
- Bounds such as `"maxItems": 2.0` become integers.

A keyword that a reference leads into keeps its place, and the time grows with the schema's size alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from afterword.engine.grammar.schema_formats import FORMATS

Schema = dict[str, Any]

_COUNTS = ("maxItems", "minItems", "maxLength", "minLength", "maxProperties", "minProperties")
_VALUES = ("const", "default", "enum", "example", "examples")  # of these keywords the value is no schema
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_ANNOTATIONS = ("deprecated", "discriminator", "example", "nullable")
_APPLICATORS = ("$ref", "anyOf", "oneOf", "allOf")
_MOST_COMPARED = 200_000
"""Texts of members that are compared in one schema. Many lists of alternatives can name the same large ones."""


def rewritten(schema: Any) -> Any:
    """The schema, rewritten. Unknown keywords are searched too: references can lead into them."""
    return _Rewriting(schema).of(schema)


class _Rewriting:
    """One rewriting of a document."""

    def __init__(self, root: Any) -> None:
        self._referred = {part for pointer in _pointers(root) for part in _parts(pointer)}
        self._alternatives = _Alternatives(root)

    def of(self, schema: Any) -> Any:
        """A part of the document, rewritten."""
        if isinstance(schema, list):
            return [self.of(each) for each in schema]
        if not isinstance(schema, dict):
            return schema
        exact = {key: self._member(key, value) for key, value in schema.items()}
        if any(key in exact for key in _APPLICATORS):
            exact = {key: value for key, value in exact.items() if not self._is_annotation(key)}
        name, all_of = exact.get("format"), exact.get("allOf", [])
        if isinstance(name, str) and name in FORMATS and isinstance(all_of, list):
            del exact["format"]
            exact["allOf"] = [*all_of, FORMATS[name]]
        movable = "anyOf" not in exact and self._may_move("oneOf", exact)
        if movable and self._alternatives.are_told_apart(schema["oneOf"]):
            exact["anyOf"] = exact.pop("oneOf")
        return _with_listed_names(exact) if self._may_move("propertyNames", exact) else exact

    def _member(self, key: str, value: Any) -> Any:
        if key in _COUNTS and isinstance(value, float) and value.is_integer():
            return int(value)
        if key in _VALUES:
            return value
        if key in _OF_NAMES and isinstance(value, dict):
            return {name: self.of(each) for name, each in value.items()}
        return self.of(value)

    def _may_move(self, keyword: str, schema: Schema) -> bool:
        return keyword in schema and keyword not in self._referred

    def _is_annotation(self, key: str) -> bool:
        return (key in _ANNOTATIONS or key.startswith("x-")) and key not in self._referred


# ---- references


def _pointers(schema: Any) -> Iterator[str]:
    """Where the references of a document lead."""
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            if isinstance(pointer := each.get("$ref"), str):
                yield pointer
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def _parts(pointer: str) -> list[str]:
    return [part.replace("~1", "/").replace("~0", "~") for part in unquote(pointer).split("/")[1:]]


class _References:
    """Follows references inside a document, each once."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._found: dict[str, Any] = {}

    def resolved(self, schema: Any) -> Any:
        """The schema that a chain of references leads to; None if one leads nowhere."""
        passed: list[str] = []
        while isinstance(schema, dict) and "$ref" in schema:
            pointer = schema["$ref"]
            if not isinstance(pointer, str):
                schema = None
            elif pointer in self._found:
                schema = self._found[pointer]
                break
            else:
                passed.append(pointer)
                self._found[pointer] = None  # for a chain that comes back to it
                schema = self._target(pointer)
        self._found |= dict.fromkeys(passed, schema)
        return schema

    def _target(self, pointer: str) -> Any:
        if not pointer.startswith("#/") or "%" in pointer:
            return None
        schema = self._root
        for part in _parts(pointer):
            if not isinstance(schema, dict):
                return None
            schema = schema.get(part)
        return schema


# ---- alternatives


@dataclass(frozen=True, slots=True)
class _Listed:
    """A member whose texts a schema lists."""

    texts: frozenset[str]
    required: bool


class _Alternatives:
    """Finds the alternatives of a document that exclude each other."""

    def __init__(self, root: Any) -> None:
        self._references = _References(root)
        self._listed: dict[int, dict[str, _Listed]] = {}  # by the identity of an object's schema, which the root keeps
        self._compared = 0

    def are_told_apart(self, alternatives: Any) -> bool:
        """Whether no value matches two of these schemas, because of one member of theirs.

        All are objects. The member's texts differ between any two, and at most one schema allows it to be absent.
        """
        if not isinstance(alternatives, list) or self._compared > _MOST_COMPARED:
            return False
        found = [self._references.resolved(each) for each in alternatives]
        if not found or not all(isinstance(each, dict) and each.get("type") == "object" for each in found):
            return False
        if len({id(each) for each in found}) < len(found):
            return False
        listed = [self._listed_members(each) for each in found]
        fewest = min(listed, key=len)
        return any(self._tells_apart(name, listed) for name in fewest)

    def _tells_apart(self, name: str, listed: list[dict[str, _Listed]]) -> bool:
        seen: set[str] = set()
        optional = 0
        for each in listed:
            member = each.get(name)
            self._compared += 1 + (len(member.texts) if member else 0)
            if member is None or self._compared > _MOST_COMPARED or not seen.isdisjoint(member.texts):
                return False
            seen |= member.texts
            optional += not member.required
        return optional <= 1

    def _listed_members(self, schema: Schema) -> dict[str, _Listed]:
        if id(schema) not in self._listed:
            members, names = schema.get("properties"), schema.get("required")
            required = {each for each in names if isinstance(each, str)} if isinstance(names, list) else set()
            texts = {name: _texts(each) for name, each in members.items()} if isinstance(members, dict) else {}
            self._listed[id(schema)] = {
                name: _Listed(frozenset(each), name in required) for name, each in texts.items() if each
            }
        return self._listed[id(schema)]


def _texts(schema: Any) -> list[str]:
    """The texts that a schema lists. Empty if it allows anything else."""
    if not isinstance(schema, dict):
        return []
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        return []
    return list(dict.fromkeys(listed))


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
