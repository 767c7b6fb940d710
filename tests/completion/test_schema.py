"""The JSON Schema of a request accepts exactly the values that the parsers accept."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterword.completion.request import EXTENSIONS, FIELDS, known_fields, schema
from afterword.completion.request_limits import STRICT, RequestLimits
from afterword.errors import RequestError

NUMBERS = st.sampled_from(
    (-101, -100, -3, -2, -1, -0.5, 0, 0.009, 0.01, 1, 1.5, 2, 2.0, 16, 17, 20, 21, 100, 128, 129, 2**31, 1e300)
)
TEXTS = st.sampled_from(("", "a", "0", "12", "-1", "01", "9" * 11, "x" * 1024, "x" * 1025, "include_usage"))
PLAIN = NUMBERS | TEXTS | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
LISTS = st.lists(PLAIN | st.lists(NUMBERS, max_size=3), max_size=4) | st.lists(TEXTS, min_size=3, max_size=18)
VALUES = PLAIN | LISTS | st.dictionaries(TEXTS, PLAIN, max_size=3)
FOR_SEVERAL_LIMITS = pytest.mark.parametrize(
    "limits", [RequestLimits(), RequestLimits(max_logprobs=3, max_stop=2, max_bias=1), STRICT], ids=str
)


def is_accepted(name: str, value: Any, limits: RequestLimits) -> bool:
    try:
        known_fields(limits)[name](name, value, limits)
    except RequestError:
        return False
    return True


@FOR_SEVERAL_LIMITS
@pytest.mark.parametrize("name", [*FIELDS, *EXTENSIONS])
@settings(max_examples=60, deadline=None)
@given(value=VALUES)
def test_a_field_accepts_what_its_schema_says(name: str, limits: RequestLimits, value: Any) -> None:
    if name in known_fields(limits):
        described = known_fields(limits)[name].schema(limits)
        assert jsonschema_rs.is_valid(described, value) == is_accepted(name, value, limits)


def test_the_schema_depends_on_strict_and_ignore_unknown() -> None:
    assert schema(RequestLimits())["properties"].keys() == FIELDS.keys() | EXTENSIONS.keys()
    assert schema(STRICT)["properties"].keys() == FIELDS.keys()
    assert jsonschema_rs.is_valid(schema(RequestLimits()), {"model": None, "stop": None})
    assert not jsonschema_rs.is_valid(schema(STRICT), {"prompt": "a"})
    assert not jsonschema_rs.is_valid(schema(RequestLimits()), {"unknown_field": 1})
    assert jsonschema_rs.is_valid(schema(RequestLimits(ignore_unknown=True)), {"unknown_field": 1})
