"""Bytes to text: whole characters, nothing of a stop string; checked against a reference that sees all at once."""

import codecs
from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterword.completion.text_stream import StopMatcher, StopStrings, TextStream

thorough = settings(deadline=None, max_examples=150)
# Few characters, so that stops are found; then bytes that are no characters, some of which begin one.
CHARACTERS = st.sampled_from("aab é😀\ufffd")
BROKEN = st.sampled_from([b"\x80", b"\xc3", b"\xe2\x82", b"\xf0\x9f", b"\xff"])
TEXTS = st.text(CHARACTERS, max_size=12)
BYTES = st.lists(CHARACTERS.map(str.encode) | BROKEN, max_size=12).map(b"".join)
STOPS = st.lists(st.text(CHARACTERS, min_size=1, max_size=4), max_size=4)
CUTS = st.sets(st.integers(1, 24))


def cut(data: bytes, cuts: set[int]) -> list[bytes]:
    """The same bytes as tokens, none of them empty."""
    places = [0, *sorted(place for place in cuts if place < len(data)), len(data)]
    return [data[start:end] for start, end in pairwise(places) if start < end]


class Reader:
    """Takes tokens (their numbers, for short) and notes what is released after each."""

    def __init__(self, stops: Sequence[str] = (), start: int = 0) -> None:
        self.stream: TextStream[int] = TextStream(StopStrings.prepare(stops), start)
        self.texts: list[str] = []
        self.tokens: list[tuple[int, int]] = []

    def read(self, pieces: Sequence[bytes]) -> "Reader":
        for token, piece in enumerate(pieces):
            self.stream.push(token, piece)
            self._note(last=False)
        self._note(last=True)
        return self

    def _note(self, last: bool) -> None:
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
    """Characters, each with the place of the byte after it. What is no character is U+FFFD."""
    found, place = [], 0
    while place < len(data):
        try:
            good, bad = data[place:].decode(), 0
        except UnicodeDecodeError as error:
            good, bad = data[place : place + error.start].decode(), error.end
        place += len(good[0].encode()) if good else bad
        found.append((good[0] if good else "\ufffd", place))
    return found


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is complete first; of several, the longest."""
    for end in range(len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, complete))]
    return text


@given(BYTES)
def test_the_reference_decodes_as_python_does(data: bytes) -> None:
    assert "".join(character for character, _ in characters(data)) == data.decode("utf-8", "replace")


# ---- the laws


@thorough
@given(BYTES, CUTS, STOPS)
def test_the_text_is_all_before_the_first_stop_however_it_is_cut(data: bytes, cuts: set[int], stops: list[str]) -> None:
    whole = data.decode("utf-8", "replace")
    reader = read(*cut(data, cuts), stops=stops)
    assert reader.text == before_stop(whole, stops)
    assert reader.stream.stopped == (reader.text != whole)


@thorough
@given(BYTES, CUTS, STOPS, st.integers(0, 5))
def test_tokens_that_gave_a_character_are_kept_at_their_offset(
    data: bytes, cuts: set[int], stops: list[str], start: int
) -> None:
    pieces = cut(data, cuts)
    ends = [end for _, end in characters(data)]
    kept = len(before_stop(data.decode("utf-8", "replace"), stops))
    size = ends[kept - 1] if kept else 0
    places = [0, *accumulate(map(len, pieces))][:-1]
    expected = [
        (token, start + sum(end <= place for end in ends)) for token, place in enumerate(places) if place < size
    ]
    assert read(*pieces, stops=stops, start=start).tokens == expected


@thorough
@given(TEXTS, CUTS, STOPS)
def test_text_appears_as_soon_as_it_is_settled_and_no_sooner(text: str, cuts: set[int], stops: list[str]) -> None:
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
def test_tokens_without_text_change_no_text(text: str, cuts: set[int], stops: list[str], place: int) -> None:
    pieces = cut(text.encode(), cuts)
    assert read(*pieces[:place], b"", *pieces[place:], stops=stops).text == read(*pieces, stops=stops).text


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


def test_a_character_appears_when_its_last_byte_does() -> None:
    reader = read(b"caf", b"\xc3", b"\xa9", b"!")
    assert reader.texts == ["caf", "", "é", "!", ""]
    assert reader.tokens == [(0, 0), (1, 3), (2, 3), (3, 4)]


def test_a_token_that_ends_inside_a_character_waits_whole() -> None:
    assert read(b"ab\xf0\x9f", b"\x98\x80c").texts == ["", "ab😀c", ""]


def test_what_could_become_a_stop_waits_until_it_does_not() -> None:
    assert read(b"one", b"\n", b"two", b"\n", b"\nthree", stops=["\n\n"]).texts == ["one", "", "\ntwo", "", "", ""]


def test_a_token_is_held_for_the_part_of_it_that_could_be_a_stop() -> None:
    assert read(b"to be", b" or", stops=["be not"]).texts == ["", "to be or", ""]


def test_what_was_held_comes_out_at_the_end() -> None:
    assert read(b"a", b"EN", stops=["END"]).texts == ["a", "", "EN"]


def test_a_token_that_a_stop_begins_in_is_kept_whole_and_its_text_is_not() -> None:
    reader = read(b"yes. N", b"o.", b" Yes", stops=[". No"])
    assert (reader.text, reader.tokens) == ("yes", [(0, 0)])


def test_a_stop_at_the_very_beginning_leaves_nothing() -> None:
    reader = read(b"\n", b"\n", stops=["\n\n"])
    assert (reader.text, reader.tokens, reader.stream.stopped) == ("", [], True)


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["bcd", "c"], "ab"),  # complete first
        (["cd", "bcd"], "a"),  # complete together: the longest
        (["cdx", "d"], "abc"),  # half a stop is none
        (["abcd"], ""),
        (["c", "c"], "ab"),
    ],
)
def test_which_of_several_stops_ends_the_text(stops: list[str], text: str) -> None:
    for pieces in ([b"abcde"], [b"a", b"b", b"c", b"d", b"e"], [b"ab", b"cde"]):
        assert read(*pieces, stops=stops).text == text


def test_a_stop_is_found_inside_its_own_false_start() -> None:
    assert read(b"aa", b"b", b"aab", b"aac", stops=["aabaac"]).text == "aab"


def test_a_stop_may_be_part_of_a_token_with_more_after_it() -> None:
    reader = read(b"Q: why? A: so", stops=[" A:"])
    assert (reader.text, reader.tokens, reader.stream.end) == ("Q: why?", [(0, 0)], 7)


def test_an_unfinished_character_becomes_one_replacement_at_the_end() -> None:
    assert read(b"a", b"\xf0\x9f", b"\x98").texts == ["a", "", "", "\ufffd"]


def test_a_replacement_can_complete_a_stop_even_at_the_end() -> None:
    reader = read(b"a", b"\xe2", stops=["\ufffd"])
    assert (reader.text, reader.tokens, reader.stream.stopped) == ("a", [(0, 0)], True)


def test_bytes_that_break_a_character_off_start_at_the_next() -> None:
    reader = read(b"\xe2", b"a", b"b")
    assert (reader.text, reader.tokens) == ("\ufffdab", [(0, 0), (1, 1), (2, 2)])


def test_a_token_that_only_breaks_a_character_off_is_not_kept_for_it() -> None:
    reader = read(b"\xe2", b"a", stops=["a"])
    assert (reader.text, reader.tokens) == ("\ufffd", [(0, 0)])


def test_offsets_count_characters_from_the_given_start() -> None:
    reader = read("é".encode(), "😀".encode(), b"x", start=13)
    assert (reader.tokens, reader.stream.end) == ([(0, 13), (1, 14), (2, 15)], 16)


def test_a_token_without_text_stands_where_it_is() -> None:
    assert read(b"a", b"", b"b").tokens == [(0, 0), (1, 1), (2, 1)]


def test_nothing_is_taken_after_a_stop() -> None:
    reader = read(b"a.", b"b", b"c.", stops=["."])
    assert (reader.text, reader.tokens) == ("a", [(0, 0)])


def test_an_encoded_surrogate_is_no_character() -> None:
    assert read(b"\xed", b"\xa0", b"\x80a").text == b"\xed\xa0\x80a".decode("utf-8", "replace")


def test_a_byte_order_mark_is_a_character() -> None:
    assert read(b"\xef\xbb\xbfa").text == "\ufeffa"
