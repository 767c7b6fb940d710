"""The token stream: documents drawn by weight, half of them turned for infill, packed into rows.

Knows documents and the tokenizer; the result is one array of ids, cut by the trainer into rows. The first two runs
were trained on `stream`, the third on `blend`, whose infill documents are shorter and whose rows begin with a document.
"""

import random
import re
from bisect import bisect, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from training.data import Document, functions, pieces
from training.gaps import code_gap, prose_gap

ROW = 512
INFILL_SHARE = 0.5
INFILL_LONGEST = 1000  # characters of one infill document, so that it falls into one row
LENGTHS = (INFILL_LONGEST,)
SHORT_LENGTHS = (250, 500, INFILL_LONGEST)  # more gaps for the same text
BLEND_LENGTHS = (200, 400, INFILL_LONGEST)
CODE = {"python", "made python"}
OTHERS = {"stories", "truecased"}  # their stories that begin as the made ones mostly do are left out
USUAL = "Once upon a time, there was a little"
POOL = 2000  # documents that wait, so that nearly every row can be filled to its end
PROSE_LINES = 12  # a text of fewer lines is prose: its units are sentences
END, PREFIX, SUFFIX, MIDDLE = range(4)

Borders = Callable[[str, random.Random], tuple[int, int]]


@dataclass(frozen=True)
class Item:
    """One text to be packed; `middle` are the borders of the part to be filled in, if any."""

    text: str
    middle: tuple[int, int] | None = None


def stream(
    documents: list[Document],
    tokenizer: Tokenizer,
    *,
    size: int,
    seed: int,
    shares: dict[str, float],
    borders: Borders,
    lengths: tuple[int, ...] = LENGTHS,
) -> np.ndarray:
    """About `size` bytes of text, the sources by their shares, as token ids in whole rows."""
    dice = random.Random(seed)
    items = []
    for source, share in shares.items():
        texts = [document.text for document in documents if document.source == source]
        items += _draw(texts, int(share * size), dice, borders, lengths)
    dice.shuffle(items)
    return _pack(items, tokenizer)


def blend(
    documents: list[Document], tokenizer: Tokenizer, *, size: int, seed: int, shares: dict[str, float]
) -> np.ndarray:
    """About `size` characters of text, the sources by their shares, as token ids in rows that begin with a document."""
    dice = random.Random(seed)
    items: list[Item] = []
    for source, share in shares.items():
        texts = [document.text for document in documents if document.source == source]
        if source in OTHERS:
            texts = [text for text in texts if not text.startswith(USUAL)]
        left = int(share * size)
        while left > 0:
            for text in dice.sample(texts, len(texts)):
                if left <= 0:
                    break
                left -= len(text)
                items += _turned(text, source in CODE, dice) if dice.random() < INFILL_SHARE else [Item(text)]
    dice.shuffle(items)
    return _fill(items, tokenizer)


def _turned(text: str, code: bool, dice: random.Random) -> list[Item]:
    """A text as short infill documents: code by functions where it has any, prose by a few sentences."""
    if code:
        parts = [text] if len(text) <= INFILL_LONGEST else list(functions(text)) or pieces(text, INFILL_LONGEST)
        return [Item(part, code_gap(part, dice)) for part in parts]
    return [Item(part, prose_gap(part, dice)) for part in pieces(text, dice.choice(BLEND_LENGTHS))]


def _draw(texts: list[str], size: int, dice: random.Random, borders: Borders, lengths: tuple[int, ...]) -> list[Item]:
    """Go through the texts, shuffled anew each time, until `size` characters are taken."""
    items: list[Item] = []
    while size > 0:
        for text in dice.sample(texts, len(texts)):
            if size <= 0:
                break
            size -= len(text)
            if dice.random() < INFILL_SHARE:
                # One length asks nothing of the dice, so the first run's stream stays what it was.
                parts = pieces(text, lengths[0] if len(lengths) == 1 else dice.choice(lengths))
                items += [Item(part, borders(part, dice)) for part in parts]
            else:
                items.append(Item(text))
    return items


def borders(text: str, dice: random.Random) -> tuple[int, int]:
    """Where the middle begins and ends: at any characters, or at borders of lines or sentences."""
    if dice.random() < 0.5:
        length = min(int(2 ** dice.uniform(0, 8.7)), len(text))
        start = dice.randint(0, len(text) - length)
        return start, start + length
    starts = [0] + [at + 1 for at, sign in enumerate(text[:-1]) if sign == "\n"]
    if len(starts) < PROSE_LINES:
        starts += [at + 1 for at, sign in enumerate(text[:-1]) if sign in ".!?" and text[at + 1] == " "]
        starts.sort()
    first = dice.randrange(len(starts))
    last = min(first + int(2 ** dice.uniform(0, 2.6)), len(starts))
    start, end = starts[first], starts[last] if last < len(starts) else len(text)
    # As an editor asks: from after the indent to before the newline.
    if dice.random() < 0.7 and text[start:end].strip():
        end = start + len(text[start:end].rstrip("\n"))
        if dice.random() < 0.7:
            start = end - len(text[start:end].lstrip(" \n"))
    return start, end


def short_borders(text: str, dice: random.Random) -> tuple[int, int]:
    """Middles as an editor asks for them: a unit, the rest of one, or a few characters; now and then a long one.

    A unit is a line, or in prose a sentence. Spaces before it stay in the prefix or belong to the middle, by chance.
    """
    kind = dice.random()
    if kind < 0.1:
        return borders(text, dice)
    if kind < 0.4:
        start = dice.randrange(len(text))
        return start, min(start + int(61 ** dice.random()), len(text))
    first, end = dice.choice(units(text))
    start = end - len(text[first:end].lstrip())
    if kind < 0.7:
        return (start if dice.random() < 0.6 else first), end
    start = dice.randrange(start, end)
    if dice.random() < 0.6:  # the rest from a word on
        start = text.rfind(" ", first, start) + 1 or start
    if dice.random() < 0.4 and text[start - 1 : start] == " ":
        start -= 1
    return start, end


def units(text: str) -> list[tuple[int, int]]:
    """Where the lines with anything in them, or in prose the sentences, begin and end; never empty for a text."""
    pattern = r"[^\n]*\S" if text.count("\n") + 1 >= PROSE_LINES else r"[^\n]+?(?:[.!?][\"']*(?=\s|$)|(?=\s*(?:\n|$)))"
    found = [match.span() for match in re.finditer(pattern, text) if match.group().strip()]
    return found or [(0, len(text))]


def _pack(items: list[Item], tokenizer: Tokenizer) -> np.ndarray:
    """Every document follows END. Infill documents wait until a row has room for them as a whole."""
    ids: list[int] = []
    waiting: list[list[int]] = []  # by length
    for at in range(0, len(items), 1000):
        for infill, encoded in _encode(items[at : at + 1000], tokenizer):
            if infill and len(encoded) <= ROW:
                insort(waiting, encoded, key=len)
            elif not infill:
                ids += encoded
            while fitting := bisect(waiting, ROW - len(ids) % ROW, key=len):
                ids += waiting.pop(fitting - 1)
    print(f"{len(waiting)} infill documents found no room")
    return np.array(ids[: len(ids) // ROW * ROW], dtype=np.uint16)


def _fill(items: list[Item], tokenizer: Tokenizer) -> np.ndarray:
    """Every document ends with END, and rows begin with one; only documents longer than a row are cut, by its end.

    A row begins with the document that has waited longest and goes on with the longest that fits; the rest is END.
    """
    ids: list[int] = []
    waiting: dict[int, deque[list[int]]] = {}  # by length
    order: deque[list[int]] = deque()

    def close() -> None:
        while len(ids) % ROW:
            room = ROW - len(ids) % ROW
            fitting = next((length for length in range(room, 0, -1) if waiting.get(length)), 0)
            ids.extend(waiting[fitting].popleft() if fitting else [END] * room)

    for at in range(0, len(items), 1000):
        for _, encoded in _encode(items[at : at + 1000], tokenizer):
            document = [*encoded[1:], END]
            if len(document) > ROW:
                ids += document
                close()
                continue
            waiting.setdefault(len(document), deque()).append(document)
            order.append(document)
            while sum(map(len, waiting.values())) > POOL:
                oldest = order.popleft()
                same = waiting[len(oldest)]
                if same and same[0] is oldest:  # otherwise it has already found a row
                    ids += same.popleft()
                    close()
    return np.array(ids, dtype=np.uint16)


def _encode(items: list[Item], tokenizer: Tokenizer) -> list[tuple[bool, list[int]]]:
    parts: list[str] = []
    for item in items:
        start, end = item.middle or (0, 0)
        parts += [item.text[:start], item.text[start:end], item.text[end:]]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(parts, add_special_tokens=False)]
    found = []
    for item, before, middle, after in zip(items, ids[0::3], ids[1::3], ids[2::3], strict=True):
        if item.middle:
            found.append((True, [END, PREFIX, *before, SUFFIX, *after, MIDDLE, *middle]))
        else:
            found.append((False, [END, *after]))
    return found
