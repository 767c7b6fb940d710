"""200 JSON Schemas as users write them, or as their libraries make them of models.

41 are those of tests/captured/schemas.jsonl. The others are 22 records, each written in six styles, and schemas of
Pydantic models. All can be constrained; `REFUSED` has those that cannot, with the part at fault.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, RootModel, TypeAdapter, create_model

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "maxLength": 24}
WHOLE: Schema = {"type": "integer", "minimum": 0, "maximum": 9999}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
FLAG: Schema = {"type": "boolean"}
DAY: Schema = {"type": "string", "format": "date"}


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": [*values]}


def some(items: Schema, most: int = 3, least: int = 0) -> Schema:
    bounds = {"minItems": least} if least else {}
    return {"type": "array", "items": items, **bounds, "maxItems": most}


def code(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


RECORDS: dict[str, dict[str, Schema]] = {
    "invoice": {"number": code(r"^INV-\d{6}$"), "total": {"type": "number", "exclusiveMinimum": 0, "maximum": 1e5}},
    "weather call": {"city": TEXT, "unit": one_of("celsius", "fahrenheit"), "days": WHOLE | {"maximum": 14}},
    "search call": {"query": TEXT, "site": {"type": "string", "format": "hostname"}, "limit": WHOLE | {"minimum": 1}},
    "calendar event": {"title": TEXT, "start": {"type": "string", "format": "date-time"}, "all_day": FLAG},
    "person": {"name": TEXT, "age": WHOLE | {"maximum": 120}, "born": DAY},
    "address": {"street": TEXT, "zip": code(r"^[0-9]{5}(-[0-9]{4})?$"), "country": code("^[A-Z]{2}$")},
    "sentiment": {"label": one_of("positive", "negative", "neutral"), "score": SHARE},
    "entities": {"people": some(TEXT), "places": some(TEXT), "dates": some(DAY, 2)},
    "review": {"stars": WHOLE | {"minimum": 1, "maximum": 5}, "text": TEXT, "would_recommend": FLAG},
    "recipe": {"title": TEXT, "minutes": WHOLE, "steps": some(TEXT, 3, 1)},
    "log line": {"level": one_of("DEBUG", "INFO", "ERROR"), "at": {"type": "string", "format": "time"}, "text": TEXT},
    "host": {"address": {"type": "string", "format": "ipv4"}, "port": WHOLE | {"minimum": 1}, "up": FLAG},
    "colour": {"hex": code("^#[0-9a-fA-F]{6}$"), "alpha": SHARE, "name": {"type": ["string", "null"], "maxLength": 12}},
    "version": {"version": code(r"^\d{1,2}\.\d{1,2}\.\d{1,2}$"), "stable": FLAG, "released": DAY},
    "ticket": {"id": {"type": "string", "format": "uuid"}, "priority": {"enum": [1, 2, 3]}, "tags": some(TEXT, 2)},
    "move": {"from": code("^[a-h][1-8]$"), "to": code("^[a-h][1-8]$"), "check": FLAG},
    "quiz": {"question": TEXT, "answers": some(TEXT, 3, 2), "correct": {"type": "integer", "minimum": 0, "maximum": 2}},
    "matrix": {"rows": some(some({"type": "integer", "minimum": -9, "maximum": 9}, 2, 1), 2, 1)},
    "money": {
        "amount": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 99},
        "currency": code("^[A-Z]{3}$"),
    },
    "contact": {"email": {"type": "string", "format": "email", "maxLength": 24}, "phone": code(r"^\+[0-9]{7,12}$")},
    "translation": {"source": TEXT, "Übersetzung": TEXT, "日本語": {"type": "string", "minLength": 1, "maxLength": 6}},
    "verdict": {"reasoning": TEXT, "answer": {"anyOf": [{"const": "yes"}, {"const": "no"}, {"type": "null"}]}},
}


# ---- styles


def plain(name: str, members: dict[str, Schema]) -> Schema:
    return {"type": "object", "properties": members, "required": [*members]}


def with_optional_members(name: str, members: dict[str, Schema]) -> Schema:
    described = {key: {"description": f"The {key} of the {name}.", **each} for key, each in members.items()}
    return {"type": "object", "properties": described, "required": [*members][:1], "additionalProperties": False}


def strict_tool(name: str, members: dict[str, Schema]) -> Schema:
    """A function call in OpenAI's strict form: optional members are nullable ones."""
    nullable = {key: {"anyOf": [each, {"type": "null"}]} for key, each in members.items()}
    arguments = {"type": "object", "properties": nullable, "required": [*nullable], "additionalProperties": False}
    call = {"name": {"const": name.replace(" ", "_")}, "arguments": arguments}
    return {"type": "object", "properties": call, "required": [*call], "additionalProperties": False}


def zod(name: str, members: dict[str, Schema]) -> Schema:
    """As zod-to-json-schema writes an array of objects with a name of its own."""
    item = {"type": "object", "properties": members, "required": [*members], "additionalProperties": False}
    root = {
        "type": "object",
        "properties": {"items": some(item, 2, 1)},
        "required": ["items"],
        "additionalProperties": False,
    }
    return {
        "$ref": "#/definitions/reply",
        "definitions": {"reply": root},
        "$schema": "http://json-schema.org/draft-07/schema#",
    }


def openapi(name: str, members: dict[str, Schema]) -> Schema:
    """A schema of an OpenAPI document, with references to its components and a union."""
    shown = {key: {**each, "example": None} for key, each in members.items()}
    found = {
        "type": "object",
        "properties": {"kind": {"enum": ["found"]}, "value": {"$ref": "#/components/schemas/value"}},
    }
    failed = {"type": "object", "properties": {"kind": {"enum": ["failed"]}, "reason": TEXT}}
    for each in (found, failed):
        each |= {"required": [*each["properties"]], "additionalProperties": False}
    value = {"type": "object", "title": name, "properties": shown, "required": [*shown], "additionalProperties": False}
    return {"oneOf": [found, failed], "components": {"schemas": {"value": value}}}


def extended(name: str, members: dict[str, Schema]) -> Schema:
    """A base and an extension, as of classes."""
    own = {"type": "object", "properties": members, "required": [*members]}
    return {"allOf": [{"$ref": "#/$defs/base"}, own], "$defs": {"base": plain(name, {"key": WHOLE})}}


STYLES: tuple[Callable[[str, dict[str, Schema]], Schema], ...] = (
    plain, with_optional_members, strict_tool, zod, openapi, extended,
)  # fmt: skip


# ---- Pydantic models

Name = Annotated[str, Field(max_length=20)]
Count = Annotated[int, Field(ge=0, le=500)]


class Colour(Enum):
    red = "red"
    green = "green"


class Level(IntEnum):
    low = 1
    high = 2


class Tree(BaseModel):
    value: Count
    children: Annotated[list[Tree], Field(max_length=2)] = []


class Linked(BaseModel):
    head: Name
    tail: Linked | None = None


class Number(BaseModel):
    kind: Literal["number"]
    value: Count


class Sum(BaseModel):
    kind: Literal["sum"]
    left: Number
    right: Expression


Expression = Annotated[Number | Sum, Field(discriminator="kind")]
Sum.model_rebuild()


class Cat(BaseModel):
    pet: Literal["cat"] = "cat"
    lives: Annotated[int, Field(gt=0, le=9)]


class Dog(BaseModel):
    pet: Literal["dog"]
    tricks: Annotated[list[Name], Field(max_length=2)]


class Owner(BaseModel):
    pets: Annotated[list[Annotated[Cat | Dog, Field(discriminator="pet")]], Field(min_length=1, max_length=2)]


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", title="Closed model")
    first_name: Annotated[str, Field(alias="firstName", max_length=12)]
    colour: Colour = Colour.red
    level: Level | None = None


class Times(BaseModel):
    at: datetime
    day: date
    clock: time


class Both(BaseModel):
    tree: Tree | None
    owner: Owner | Closed


def field_model(name: str, kind: Any) -> Schema:
    return create_model(name, value=(kind, ...)).model_json_schema()


KINDS: dict[str, Any] = {
    "optional text": Name | None,
    "literal": Literal["a", 2, True, None],
    "pair": tuple[Count, bool],
    "map": dict[Literal["x", "y"], Count],
    "map of names": dict[Annotated[str, Field(pattern="^[a-z]{1,8}$")], Count],
    "uuid": UUID,
    "float": Annotated[float, Field(gt=-1, lt=1)],
    "multiple": Annotated[int, Field(multiple_of=5, ge=0, le=100)],
    "any": Literal["x"] | dict[str, bool] | None,
    "union": Count | bool | Name,
    "nested": Annotated[list[list[Literal[0, 1]]], Field(max_length=2)],
    "pattern": Annotated[str, Field(pattern=r"^(\w{2,4}-){1,2}\d+$", max_length=12)],
    "enum": Colour,
    "level": Level,
    "decimal": Annotated[Decimal, Field(ge=0, le=9)],
}

MODELS: dict[str, Schema] = {
    **{each.__name__: each.model_json_schema() for each in (Tree, Linked, Sum, Owner, Closed, Times, Both)},
    "closed by its names": Closed.model_json_schema(by_alias=False),
    "pair of enumerations": TypeAdapter(tuple[Colour, Level]).json_schema(),
    "expression": TypeAdapter(Expression).json_schema(),
    "list of models": TypeAdapter(Annotated[list[Closed], Field(max_length=2)]).json_schema(),
    "root model": RootModel[Annotated[list[Count], Field(max_length=3)]].model_json_schema(),
    **{f"member of {name}": field_model("Model", kind) for name, kind in KINDS.items()},
}

CAPTURED: dict[str, Schema] = {
    each["name"]: each["schema"]
    for each in map(json.loads, (Path(__file__).parent / "captured" / "schemas.jsonl").read_text("utf-8").splitlines())
}
SCHEMAS: dict[str, Schema] = {
    **CAPTURED,
    **{f"{name}, {style.__name__}": style(name, members) for name, members in RECORDS.items() for style in STYLES},
    **{f"pydantic: {name}": schema for name, schema in MODELS.items()},
}

REFUSED: dict[str, tuple[Schema, str]] = {
    "set": (field_model("Model", set[int]), "/properties/value"),
    "look-around": ({"type": "array", "items": {"type": "string", "pattern": "^(?!0)[0-9]+$"}}, "/items"),
    "condition": ({"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}, "the top"),
    "overlapping alternatives": ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "the top"),
    "remote reference": ({"properties": {"a": {"$ref": "https://example.com/a.json"}}}, "/properties/a"),
    "format": ({"items": {"type": "string", "format": "iri"}}, "/items"),
}
"""What cannot be constrained, and the part of the schema that the error names."""
