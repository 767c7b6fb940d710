"""`TextStream` and `StopMatcher`, compared with a reference that has the whole text at once."""

import codecs
from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterword.completion.text_stream import StopMatcher, StopStrings, TextStream

thorough = settings(deadline=None, max_examples=150)
# Few characters, so that stop strings occur; then bytes that are not characters, some of which start one.
CHARACTERS = st.sampled_from("aab é😀\ufffd")
BROKEN = st.sampled_from([b"\x80", b"\xc3", b"\xe2\x82", b"\xf0\x9f", b"\xff"])
TEXTS = st.text(CHARACTERS, max_size=12)
BYTES = st.lists(CHARACTERS.map(str.encode) | BROKEN, max_size=12).map(b"".join)
STOPS = st.lists(st.text(CHARACTERS, min_size=1, max_size=4), max_size=4)
CUTS = st.sets(st.integers(1, 24))


def cut(data: bytes, cuts: set[int]) -> list[bytes]:
    """The same bytes as non-empty pieces."""
    positions = [0, *sorted(position for position in cuts if position < len(data)), len(data)]
    return [data[start:end] for start, end in pairwise(positions) if start < end]


class Reader:
    """Pushes pieces into a stream, with their indexes as tokens, and records the text and tokens after each push."""

    def __init__(self, stops: Sequence[str] = (), start: int = 0) -> None:
        self.stream: TextStream[int] = TextStream(StopStrings.prepare(stops), start)
        self.texts: list[str] = []
        self.tokens: list[tuple[int, int]] = []

    def read(self, pieces: Sequence[bytes]) -> "Reader":
        for token, piece in enumerate(pieces):
            self.stream.push(token, piece)
            self._record(last=False)
        self._record(last=True)
        return self

    def _record(self, last: bool) -> None:
        released = self.stream.finish() if last else self.stream.release()
        self.texts.append(released.text)
        self.tokens += [(placed.token, placed.offset) for placed in released.tokens]

    @property
    def text(self) -> str:
        return "".join(self.texts)


def read(*pieces: bytes, stops: Sequence[str] = (), start: int = 0) -> Reader:
    return Reader(stops, start).read(pieces)


# ---- the reference


def characters(data: bytes) -> list[tuple[str, int]]:
    """Each character with the position of the byte after it. Invalid bytes give U+FFFD."""
    found, position = [], 0
    while position < len(data):
        try:
            good, bad = data[position:].decode(), 0
        except UnicodeDecodeError as error:
            good, bad = data[position : position + error.start].decode(), error.end
        position += len(good[0].encode()) if good else bad
        found.append((good[0] if good else "\ufffd", position))
    return found


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is complete first; of several that end together, the longest."""
    for end in range(len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, complete))]
    return text


@given(BYTES)
def test_the_reference_decodes_as_python_does(data: bytes) -> None:
    assert "".join(character for character, _ in characters(data)) == data.decode("utf-8", "replace")


# ---- properties


@thorough
@given(BYTES, CUTS, STOPS)
def test_the_text_is_all_before_the_first_stop_however_it_is_cut(data: bytes, cuts: set[int], stops: list[str]) -> None:
    whole = data.decode("utf-8", "replace")
    reader = read(*cut(data, cuts), stops=stops)
    assert reader.text == before_stop(whole, stops)
    assert reader.stream.stopped == (reader.text != whole)


@thorough
@given(BYTES, CUTS, STOPS, st.integers(0, 5))
def test_tokens_of_released_characters_have_their_offsets(
    data: bytes, cuts: set[int], stops: list[str], start: int
) -> None:
    pieces = cut(data, cuts)
    ends = [end for _, end in characters(data)]
    kept = len(before_stop(data.decode("utf-8", "replace"), stops))
    size = ends[kept - 1] if kept else 0
    positions = [0, *accumulate(map(len, pieces))][:-1]
    expected = [
        (token, start + sum(end <= position for end in ends))
        for token, position in enumerate(positions)
        if position < size
    ]
    assert read(*pieces, stops=stops, start=start).tokens == expected


@thorough
@given(TEXTS, CUTS, STOPS)
def test_text_is_released_as_soon_as_it_is_decided_and_not_before(text: str, cuts: set[int], stops: list[str]) -> None:
    pieces = cut(text.encode(), cuts)
    reader = read(*pieces, stops=stops)
    for count in range(1, len(pieces) + 1):
        seen = b"".join(pieces[:count])
        so_far, used = codecs.utf_8_decode(seen, "strict", False)
        if before_stop(so_far, stops) != so_far:
            return
        held = max((size for stop in stops for size in range(len(stop)) if so_far.endswith(stop[:size])), default=0)
        shown = len("".join(reader.texts[:count]))
        assert shown <= len(so_far) - held
        if used == len(seen) and not held:
            assert shown == len(so_far)


@thorough
@given(BYTES, CUTS, STOPS)
def test_text_and_tokens_are_released_together(data: bytes, cuts: set[int], stops: list[str]) -> None:
    stream: TextStream[bytes] = TextStream(StopStrings.prepare(stops), 0)
    for piece in cut(data, cuts):
        stream.push(piece, piece)
        if stream.stopped:
            return
        released = stream.release()
        assert released.text == b"".join(placed.token for placed in released.tokens).decode("utf-8", "replace")


@given(TEXTS, CUTS, STOPS, st.integers(0, 12))
def test_tokens_without_text_do_not_change_the_text(text: str, cuts: set[int], stops: list[str], position: int) -> None:
    pieces = cut(text.encode(), cuts)
    assert read(*pieces[:position], b"", *pieces[position:], stops=stops).text == read(*pieces, stops=stops).text


@given(TEXTS, STOPS)
def test_a_stop_is_found_at_the_character_that_completes_it(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(StopStrings.prepare(stops))
    for end, character in enumerate(text, 1):
        complete = [len(stop) for stop in stops if text[:end].endswith(stop)]
        assert matcher.feed(character) == ((1, max(complete)) if complete else None)
        assert text[:end].endswith(tuple(stop[: matcher.held] for stop in stops) or "")
        if complete:
            return


# ---- examples


def test_a_character_is_released_with_its_last_byte() -> None:
    reader = read(b"caf", b"\xc3", b"\xa9", b"!")
    assert reader.texts == ["caf", "", "é", "!", ""]
    assert reader.tokens == [(0, 0), (1, 3), (2, 3), (3, 4)]


def test_a_token_that_ends_inside_a_character_is_held_back_whole() -> None:
    assert read(b"ab\xf0\x9f", b"\x98\x80c").texts == ["", "ab😀c", ""]


def test_text_that_could_become_a_stop_string_is_held_back() -> None:
    assert read(b"one", b"\n", b"two", b"\n", b"\nthree", stops=["\n\n"]).texts == ["one", "", "\ntwo", "", "", ""]


def test_a_token_is_held_back_if_part_of_it_could_be_a_stop_string() -> None:
    assert read(b"to be", b" or", stops=["be not"]).texts == ["", "to be or", ""]


def test_held_text_is_released_at_the_end() -> None:
    assert read(b"a", b"EN", stops=["END"]).texts == ["a", "", "EN"]


def test_a_token_in_which_a_stop_string_starts_is_released_with_the_text_before() -> None:
    reader = read(b"yes. N", b"o.", b" Yes", stops=[". No"])
    assert (reader.text, reader.tokens) == ("yes", [(0, 0)])


def test_a_stop_string_at_the_start_leaves_no_text() -> None:
    reader = read(b"\n", b"\n", stops=["\n\n"])
    assert (reader.text, reader.tokens, reader.stream.stopped) == ("", [], True)


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["bcd", "c"], "ab"),  # the first to be complete
        (["cd", "bcd"], "a"),  # complete together: the longest counts
        (["cdx", "d"], "abc"),  # a partial match does not count
        (["abcd"], ""),
        (["c", "c"], "ab"),
    ],
)
def test_the_first_complete_stop_string_ends_the_text(stops: list[str], text: str) -> None:
    for pieces in ([b"abcde"], [b"a", b"b", b"c", b"d", b"e"], [b"ab", b"cde"]):
        assert read(*pieces, stops=stops).text == text


def test_a_stop_string_is_found_after_an_overlapping_partial_match() -> None:
    assert read(b"aa", b"b", b"aab", b"aac", stops=["aabaac"]).text == "aab"


def test_a_stop_string_in_the_middle_of_a_token_is_found() -> None:
    reader = read(b"Q: why? A: so", stops=[" A:"])
    assert (reader.text, reader.tokens, reader.stream.end) == ("Q: why?", [(0, 0)], 7)


def test_an_incomplete_last_character_becomes_one_replacement_character() -> None:
    assert read(b"a", b"\xf0\x9f", b"\x98").texts == ["a", "", "", "\ufffd"]


def test_a_replacement_character_at_the_end_can_complete_a_stop_string() -> None:
    reader = read(b"a", b"\xe2", stops=["\ufffd"])
    assert (reader.text, reader.tokens, reader.stream.stopped) == ("a", [(0, 0)], True)


def test_bytes_that_interrupt_a_character_start_at_the_next_offset() -> None:
    reader = read(b"\xe2", b"a", b"b")
    assert (reader.text, reader.tokens) == ("\ufffdab", [(0, 0), (1, 1), (2, 2)])


def test_a_token_that_interrupts_a_character_and_completes_a_stop_string_is_not_released() -> None:
    reader = read(b"\xe2", b"a", stops=["a"])
    assert (reader.text, reader.tokens) == ("\ufffd", [(0, 0)])


def test_offsets_count_characters_from_the_given_start() -> None:
    reader = read("é".encode(), "😀".encode(), b"x", start=13)
    assert (reader.tokens, reader.stream.end) == ([(0, 13), (1, 14), (2, 15)], 16)


def test_a_token_without_text_has_the_current_offset() -> None:
    assert read(b"a", b"", b"b").tokens == [(0, 0), (1, 1), (2, 1)]


def test_tokens_after_a_stop_string_are_ignored() -> None:
    reader = read(b"a.", b"b", b"c.", stops=["."])
    assert (reader.text, reader.tokens) == ("a", [(0, 0)])


def test_an_encoded_surrogate_becomes_replacement_characters() -> None:
    assert read(b"\xed", b"\xa0", b"\x80a").text == b"\xed\xa0\x80a".decode("utf-8", "replace")


def test_a_byte_order_mark_is_kept() -> None:
    assert read(b"\xef\xbb\xbfa").text == "\ufeffa"
