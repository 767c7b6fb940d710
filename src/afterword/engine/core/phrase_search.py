"""Searches a text that grows, and of which the end may be removed again, for phrases.

The search is an Aho-Corasick automaton: one step for each character, however many phrases have begun. Pure.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable

_CHARACTERS = 0x110000  # more than any code point

_MOST_STATES = 2**16  # in a cache, unless a single automaton has more: about 10 MiB

Mark = tuple[int, int]  # the state after a part of a text, and the number of characters in it


class Automaton:
    """The beginnings of phrases, numbered. The state after a text is the longest one with which the text ends.

    `lengths`: the number of characters of each state. `shortest`: the length of the shortest phrase with which a text
    in this state ends; 0 if there is none.
    """

    def __init__(self, phrases: Iterable[str]) -> None:
        self.lengths, self.shortest = array("i", [0]), array("i", [0])
        self._next: dict[int, int] = {}  # by state and character
        self._shorter = array("i", [0])  # the next shorter beginning with which the text ends
        before = array("i", [0])  # the state without its last character
        last = [""]
        for phrase in phrases:
            state = 0
            for character in phrase:
                parent, state = state, self._next.setdefault(state * _CHARACTERS + ord(character), len(last))
                if state == len(last):
                    before.append(parent)
                    last.append(character)
                    self.lengths.append(self.lengths[parent] + 1)
            self.shortest.extend([0] * (len(last) - len(self.shortest)))
            self.shortest[state] = len(phrase)
        self._shorter.extend([0] * (len(last) - 1))
        for state in sorted(range(1, len(last)), key=self.lengths.__getitem__):
            shorter = self.follow(self._shorter[before[state]], last[state]) if before[state] else 0
            self._shorter[state] = shorter
            self.shortest[state] = self.shortest[shorter] or self.shortest[state]

    def __len__(self) -> int:
        """The number of states."""
        return len(self.lengths)

    def follow(self, state: int, character: str) -> int:
        """The state after one more character."""
        code = ord(character)
        while (found := self._next.get(state * _CHARACTERS + code)) is None and state:
            state = self._shorter[state]
        return found or 0


class AutomatonCache:
    """The automata that were used last. One thread calls everything. `most`: states, but one automaton always stays."""

    def __init__(self, most: int = _MOST_STATES) -> None:
        self._most = most
        self._kept: OrderedDict[tuple[str, ...], Automaton] = OrderedDict()
        self.states = 0

    def get(self, phrases: tuple[str, ...]) -> Automaton:
        automaton = self._kept.pop(phrases, None)
        if automaton is None:
            automaton = Automaton(phrases)
            self.states += len(automaton)
        self._kept[phrases] = automaton
        while self.states > self._most and len(self._kept) > 1:
            self.states -= len(self._kept.popitem(last=False)[1])
        return automaton


class PhraseSearch:
    """The search in one text. Each character has a place, which never decreases."""

    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton
        self._state = self._read = 0
        self._places: deque[int] = deque()  # of the last characters

    @property
    def mark(self) -> Mark:
        return self._state, self._read

    @property
    def begun(self) -> int | None:
        """The place where the longest phrase begins that the text may end in; -1 if that place is forgotten."""
        return self._place(self._automaton.lengths[self._state])

    def add(self, character: str, place: int) -> int | None:
        """Append a character. Returns the place where the shortest phrase begins with which the text now ends."""
        self._state = self._automaton.follow(self._state, character)
        self._places.append(place)
        self._read += 1
        return self._place(self._automaton.shortest[self._state])

    def go_back(self, mark: Mark) -> None:
        """Remove the characters after a mark."""
        for _ in range(min(self._read - mark[1], len(self._places))):  # the first ones may be forgotten
            self._places.pop()
        self._state, self._read = mark

    def forget(self, first: int) -> None:
        """Forget the places before `first`, to which the search never goes back."""
        while self._places and self._places[0] < first:
            self._places.popleft()

    def _place(self, length: int) -> int | None:
        if not length:
            return None
        return self._places[-length] if length <= len(self._places) else -1
