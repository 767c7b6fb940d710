"""`json_body`: decoding in pieces gives the same as one call; limits, repeated keys and lone surrogates are errors."""

import asyncio
import json
import threading
import time
from typing import Any

import msgspec
import pytest

from afterword.completion import json_body
from afterword.completion.json_body import LARGE_BODY, MAX_PARTS, encode, parse_object, run_in_thread_if_large
from afterword.errors import RequestError

PAD = b'"pad":"' + b"x" * LARGE_BODY + b'"'


def refused(data: bytes) -> str:
    with pytest.raises(RequestError) as caught:
        parse_object(data)
    assert caught.value.status == 400
    return caught.value.message


# ---- large bodies


@pytest.mark.parametrize(
    "value",
    [
        [1] * 50_000,
        [],
        [1.5, -2, 1e3, None, True, 12345678901234567890] * 8000,
        [[1, 2, 3] * 5000, [], [4] * 30_000],
        ['a,[{\\"\n', "é😀", ""] * 5000,
        [{"a": [1] * 70_000}, {"a": [[]]}],
        '[1,2],{\\"' * 20_000,
        {"a": {"b": [1] * 40_000}, "c": ",:[{"},
        [[[1] * 70_000, "x"], 5],
    ],
    ids=lambda value: repr(value)[:20],
)
@pytest.mark.parametrize("spaces", [False, True])
def test_a_large_body_has_the_same_value_as_parsed_in_one_call(
    value: Any, spaces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_body, "_PIECE", 2**12)
    separators = (" ,\n ", " : ") if spaces else (",", ":")
    data = json.dumps({"value": value, "pad": "x" * LARGE_BODY}, separators=separators, ensure_ascii=False).encode()
    assert parse_object(data) == msgspec.json.decode(data)


@pytest.mark.parametrize("value", [b"[1,]", b"[,1]", b"[1 2]", b"[01]", b"[1", b"[1]]", b"[tru]", b"[NaN]", b'"\xff"'])
@pytest.mark.parametrize("before", [b"", b"1," * 40_000])
def test_a_large_body_that_is_not_json_is_refused(value: bytes, before: bytes) -> None:
    inner = value.replace(b"[", b"[" + before, 1)
    assert "not valid JSON" in refused(b'{"value":' + inner + b"," + PAD + b"}")
    assert "not valid JSON" in refused(b"[" + PAD[6:] + b"]")


@pytest.mark.parametrize("item", [b"[1]", b"{}", b"[[]]", b"[{}]"])
def test_too_many_arrays_and_objects_are_refused_before_decoding(item: bytes, monkeypatch: Any) -> None:
    few, many = (b'{"prompt":[%b]}' % b",".join([item] * count) for count in (MAX_PARTS // 2 - 2, MAX_PARTS))
    assert len(parse_object(few)["prompt"]) == MAX_PARTS // 2 - 2
    monkeypatch.setattr(json_body, "_members_of", None)
    assert "arrays and objects" in refused(many)


@pytest.mark.parametrize("item", [b'""', b'"a"', b'"\\\\"'])
def test_too_many_strings_are_refused_before_decoding(item: bytes, monkeypatch: Any) -> None:
    few, many = (b'{"prompt":[%b]}' % b",".join([item] * count) for count in (MAX_PARTS - 1, MAX_PARTS + 1))
    assert len(parse_object(few)["prompt"]) == MAX_PARTS - 1
    monkeypatch.setattr(json_body, "_members_of", None)
    assert "strings" in refused(many)


def test_member_names_count_as_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_body, "_members_of", None)
    assert "strings" in refused(b"{%b}" % b",".join(b'"%x":1' % number for number in range(MAX_PARTS + 1)))


@pytest.mark.parametrize("text", ["[", "{", '"', '\\"[', ",", ":", "\\\\", '\\\\"'])
def test_characters_inside_strings_are_not_counted(text: str) -> None:
    given = {"prompt": text * (MAX_PARTS + 10), "stop": [text]}
    assert parse_object(json.dumps(given).encode()) == given


def test_a_large_body_is_parsed_in_another_thread_and_a_small_one_is_not() -> None:
    def thread_of(_: bytes) -> int:
        return threading.get_ident()

    async def parse_both() -> tuple[int, int]:
        return await run_in_thread_if_large(thread_of, b"x" * LARGE_BODY), await run_in_thread_if_large(
            thread_of, b"x" * (LARGE_BODY + 1)
        )

    small, large = asyncio.run(parse_both())
    assert small == threading.get_ident() != large


def test_one_large_body_is_parsed_at_a_time() -> None:
    running: list[int] = []

    def parse(data: bytes) -> int:
        running.append(1)
        time.sleep(0.01)
        most = len(running)
        running.pop()
        return most

    async def parse_both() -> list[int]:
        return await asyncio.gather(*(run_in_thread_if_large(parse, b"x" * (LARGE_BODY + 1)) for _ in range(5)))

    assert asyncio.run(parse_both()) == [1] * 5


def test_a_large_array_of_numbers_is_decoded_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, sizes = msgspec.json.decode, []

    def counted(data: bytes) -> Any:
        sizes.append(len(data))
        return decode(data)

    monkeypatch.setattr(msgspec.json, "decode", counted)
    given = {"prompt": [list(range(200_000)), [7] * 100_000], "model": "m"}
    assert parse_object(json.dumps(given).encode()) == given
    assert max(sizes) < 2 * json_body._PIECE


@pytest.mark.parametrize(
    "value",
    [
        {"enum": [7] * 200_000},
        [{"a": {"b": [7] * 100_000}}, [[7] * 100_000]],
        {"type": "json_schema", "json_schema": {"schema": {"enum": [1.5] * 100_000, "const": "x" * 10}}},
    ],
    ids=["object", "list", "nested"],
)
def test_large_values_inside_others_are_decoded_in_small_pieces(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, sizes = msgspec.json.decode, []
    monkeypatch.setattr(msgspec.json, "decode", lambda data: sizes.append(len(data)) or decode(data))
    assert parse_object(json.dumps({"value": value}).encode()) == {"value": value}
    assert max(sizes) < 2 * json_body._PIECE


@pytest.mark.parametrize("number", [b"1" * 70_000, b"-1." + b"1" * 70_000, b"1e-" + b"9" * 70_000])
@pytest.mark.parametrize("form", [b"%b", b"[%b]", b"[1,%b,2]", b"[[1],[%b]]", b'{"a":%b}', b"[ %b\n]"])
def test_a_long_number_of_a_large_body_is_named(number: bytes, form: bytes) -> None:
    assert "a number of more than" in refused(b'{"value":' + form % number + b"}")


def test_white_space_is_no_number() -> None:
    space = b" " * 70_000
    assert parse_object(b'{"value":[1,%b2 ,%b3%b]}' % (space, space, space)) == {"value": [1, 2, 3]}


@pytest.mark.parametrize(("left", "right"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_a_large_value_deep_inside_others_is_refused(left: bytes, right: bytes) -> None:
    """Each level costs another look at all bytes."""

    def nested(depth: int, size: int) -> bytes:
        return b'{"value":' + left * depth + b"[" + b"7," * (size // 2) + b"7]" + right * depth + b"}"

    assert parse_object(nested(7, 2**21))
    assert parse_object(nested(100, 2**19)) == msgspec.json.decode(nested(100, 2**19))
    for depth in (8, 100, 900):
        assert "inside 8 arrays and objects" in refused(nested(depth, 2**21))


# ---- keys


@pytest.mark.parametrize(
    "data",
    [
        b'{"n":1,"n":1}',
        b'{"n":1,"\\u006e":1}',
        b'{"a":{"b":1,"b":2}}',
        b'{"a":[[{"b":1,"b":2}]]}',
        b'{"a":":","a":"::"}',
        b'{"a":1,' + PAD + b',"a":":"}',
        b'{"a":[{"x":1,"x":1}],' + PAD + b"}",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_a_key_that_comes_twice_is_refused(data: bytes) -> None:
    assert "twice" in refused(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":":","b":"\\":\\\\"}',
        b'{"a":{"a":{"a":1}},"b":[{"a":1},{"a":1}]}',
        b'{"a:":[":",{"::":":"}],' + PAD + b"}",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_colons_in_strings_are_not_counted_as_keys(data: bytes) -> None:
    assert parse_object(data) == json.loads(data)


# ---- characters


@pytest.mark.parametrize(
    "text",
    [
        rb"\ud800",
        rb"a\uDBFFb",
        rb"\udc00",
        rb"\ud83d\u0041",
        rb"\ud800\ud83d\ude00",
        rb"\ud83d\ude00\ude00",
        rb"\\\ud800",
        b"\xed\xa0\x80",
    ],
)
@pytest.mark.parametrize("form", [b'{"prompt":"%b"}', b'{"%b":1}', b'{"prompt":["a","%b"],' + PAD + b"}"])
def test_a_lone_surrogate_is_named(text: bytes, form: bytes) -> None:
    assert "lone surrogate" in refused(form % text)


@pytest.mark.parametrize("text", [rb"\ud83d\ude00", rb"\\ud800", rb"\\\\udc00", rb"\ud83d\ude00\ud83d\ude00"])
def test_surrogate_pairs_and_escaped_backslashes_are_accepted(text: bytes) -> None:
    data = b'{"prompt":"%b"}' % text
    assert parse_object(data) == json.loads(data)
    assert "surrogate" not in refused(data[:-1])


@pytest.mark.parametrize("start", range(-14, 3))
@pytest.mark.parametrize("text", [rb"\ud83d\ude00", rb"\ud83d", rb"\ude00", rb"\ud83d\ud83d\ude00", b"\xed\xa0\x80"])
def test_a_lone_surrogate_is_named_wherever_a_piece_ends(start: int, text: bytes) -> None:
    data = b'{"prompt":"' + b"a" * (json_body._PIECE - 11 + start) + text
    assert ("lone surrogate" in refused(data + b" " * json_body._PIECE)) == (text != rb"\ud83d\ude00")


@pytest.mark.parametrize("data", [b"{}", b'{"a":1}', b'{"a":1,' + PAD + b"}"], ids=lambda data: repr(data[:20]))
def test_a_byte_order_mark_is_skipped_once(data: bytes) -> None:
    assert parse_object(b"\xef\xbb\xbf" + data) == json.loads(data)
    assert "not valid JSON" in refused(b"\xef\xbb\xbf" * 2 + data)


@pytest.mark.parametrize("line_end", ["\u2028", "\u2029", "\x85"])
def test_line_ends_of_unicode_are_written_as_escapes(line_end: str) -> None:
    value = {f"k{line_end}": [f"a{line_end}{line_end}b", "“x”", "\xc2é"]}
    data = encode(value)
    assert json.loads(data) == value
    assert len(data.decode().splitlines()) == 1
    assert data.decode().count(f"\\u{ord(line_end):04x}") == 3
    assert "“x”".encode() in data


@pytest.mark.parametrize("line_end", ["\u2028", "\u2029", "\x85"])
@pytest.mark.parametrize("shift", range(4))
def test_line_ends_are_escaped_wherever_a_piece_ends(line_end: str, shift: int) -> None:
    value = "a" * (LARGE_BODY - 4 + shift) + line_end * LARGE_BODY + "é😀" + line_end
    assert encode(value) == msgspec.json.encode(value).replace(line_end.encode(), b"\\u%04x" % ord(line_end))


def test_values_without_such_line_ends_are_encoded_as_by_msgspec() -> None:
    for value in ("“é😀…”", {"a": [1.5, None, True]}, "\n\r\u200b\x84\x86\u2027\u202a"):
        assert encode(value) == msgspec.json.encode(value)
