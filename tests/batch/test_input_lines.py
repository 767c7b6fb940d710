"""Parsing of input lines: every line that is not blank is a request or an error with a message."""

from __future__ import annotations

import io
import json
import tracemalloc

import pytest
from batch_rows import LONGEST, bare, wrapped
from hypothesis import given
from hypothesis import strategies as st

from afterword.batch.input_lines import BatchRequest, InvalidLine, read_lines, read_row

WRONG = [
    (b"{no", None, "invalid_json_line"),
    (b"[1]", None, "invalid_json_line"),
    (b'{"prompt": "a", "prompt": "b"}', None, "invalid_json_line"),
    (b'{"prompt": NaN}', None, "invalid_json_line"),
    (b'"' + b"x" * 20_000 + b'"', None, "line_too_long"),
    (b'{"prompt": "\xff"}', None, "invalid_utf8"),
    (wrapped("", prompt="a"), None, "invalid_custom_id"),
    (wrapped(7, prompt="a"), None, "invalid_custom_id"),
    (wrapped("x" * 513, prompt="a"), None, "invalid_custom_id"),
    (wrapped("a").replace(b"POST", b"GET"), "a", "invalid_method"),
    (wrapped("a").replace(b"/v1/completions", b"/v1/chat/completions"), "a", "invalid_url"),
    (b'{"custom_id": "a", "method": "POST", "url": "/v1/completions"}', "a", "invalid_body"),
    (b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": [1]}', "a", "invalid_body"),
    (b'{"custom_id": "a", "priority": 1, "body": {}}', "a", "unknown_parameter"),
    (wrapped("a", prompt="b", stream=True), "a", "stream_not_supported"),
    (bare(prompt="b", stream=True), "row-2", "stream_not_supported"),
]


def read(text: bytes) -> list[BatchRequest | InvalidLine]:
    return [read_row(line) for line in read_lines(io.BytesIO(text), LONGEST)]


@pytest.mark.parametrize(("line", "name", "code"), WRONG, ids=[f"{code}-{n}" for n, (_, _, code) in enumerate(WRONG)])
def test_an_invalid_line_has_a_code_and_a_message_with_its_number(line, name, code):
    fault = read(b"\n" + line + b"\n")[0]
    assert isinstance(fault, InvalidLine)
    assert (fault.line, fault.custom_id, fault.code) == (2, name, code)
    assert fault.message.startswith("Line 2 ")


def test_both_forms_are_parsed_and_blank_lines_are_skipped():
    text = b"\xef\xbb\xbf" + bare(prompt="a") + b"\r\n\n  \n" + wrapped("b", prompt="c") + b"\n" + bare()
    rows = read(text)
    assert [(row.line, row.custom_id, row.body) for row in rows] == [
        (1, "row-1", {"prompt": "a"}),
        (4, "b", {"prompt": "c"}),
        (5, "row-5", {}),
    ]


def test_a_request_without_seed_gets_one_from_its_line():
    first, same, other, own, null = read(
        b"\n".join([bare(prompt="a"), bare(prompt="a"), bare(prompt="b"), bare(seed=7), bare(seed=None)])
    )
    assert len({first.seed, same.seed, other.seed}) == 3  # equal content in another line has another seed
    assert json.loads(first.request_body) == {"prompt": "a", "seed": first.seed}
    assert read(bare(prompt="a"))[0].seed == first.seed
    assert json.loads(own.request_body)["seed"] == 7
    assert json.loads(null.request_body)["seed"] == null.seed


def test_sorting_puts_prompts_with_a_common_prefix_together():
    prompts = ["sea one", "land", "sea two", [1, 2, 3], "land two", [9], [1, 2, 4], None]
    ordered = sorted(read(b"\n".join(bare(prompt=prompt) for prompt in prompts)), key=lambda row: row.sort_key)
    positions = {str(row.body["prompt"]): position for position, row in enumerate(ordered)}
    for one, other in (("sea one", "sea two"), ("land", "land two"), ("[1, 2, 3]", "[1, 2, 4]")):
        assert abs(positions[one] - positions[other]) == 1


def test_memory_does_not_grow_with_the_length_of_a_line():
    class Endless(io.RawIOBase):
        left = 64 * 2**20

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            size = min(len(buffer), self.left)
            self.left -= size
            buffer[:size] = b"x" * size
            return size

    tracemalloc.start()
    (line,) = read_lines(io.BufferedReader(Endless()), LONGEST)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert line.text is None
    assert peak < 2**20


LINES = st.lists(
    st.one_of(
        st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b"")),
        st.sampled_from([line for line, _, _ in WRONG if len(line) < 1000]),
        st.builds(lambda prompt: bare(prompt=prompt), st.text(max_size=8)),
        st.builds(lambda name, prompt: wrapped(name, prompt=prompt), st.text(max_size=3), st.text(max_size=8)),
    ),
    max_size=12,
)


@given(LINES, st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_every_line_that_is_not_blank_is_read_once(lines, end, last):
    text = end.join(lines) + (end if last else b"")
    rows = read(text)
    plain = text.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert [row.line for row in rows] == [number for number, line in enumerate(plain, 1) if line.strip()]
    assert len({row.digest for row in rows}) == len(rows)


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_without_an_exception(text):
    for row in read(text):
        assert isinstance(row, BatchRequest | InvalidLine)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt":"\\ud800"}', "lone surrogate"),
        (b'{"prompt":[%b]}' % b",".join([b"[1]"] * 70_000), "arrays and objects"),
        (b'{"prompt":[%b]}' % b",".join([b'""'] * 70_000), "strings"),
    ],
    ids=["surrogate", "arrays", "strings"],
)
def test_a_line_over_the_limits_of_json_values_says_why(line, reason):
    (fault,) = (read_row(each) for each in read_lines(io.BytesIO(line), 2**20))
    assert isinstance(fault, InvalidLine)
    assert fault.code == "invalid_json_line"
    assert reason in fault.message
    assert fault.message.startswith("Line 1 ")
