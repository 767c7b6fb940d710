"""The token stream: documents sampled by source share, half of them as infill documents, packed into rows.

The result is one array of token ids, which `train.py` splits into rows. The first two runs used `stream`. The third
used `blend`, whose infill documents are shorter and whose rows begin with a document.
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
INFILL_LONGEST = 1000  # characters of one infill document, so that it fits into one row
LENGTHS = (INFILL_LONGEST,)
SHORT_LENGTHS = (250, 500, INFILL_LONGEST)  # more gaps for the same text
BLEND_LENGTHS = (200, 400, INFILL_LONGEST)
CODE = {"python", "made python"}
OTHERS = {"stories", "truecased"}  # their stories with the usual opening of generated ones are left out
USUAL = "Once upon a time, there was a little"
POOL = 2000  # tokens of waiting documents, so that nearly all rows are filled to the end
PROSE_LINES = 12  # a text with fewer lines is prose: its units are sentences
END, PREFIX, SUFFIX, MIDDLE = range(4)

Borders = Callable[[str, random.Random], tuple[int, int]]


@dataclass(frozen=True)
class Item:
    """One text to be packed. `middle`: start and end of the part to be filled in, if any."""

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
    rng = random.Random(seed)
    items = []
    for source, share in shares.items():
        texts = [document.text for document in documents if document.source == source]
        items += _draw(texts, int(share * size), rng, borders, lengths)
    rng.shuffle(items)
    return _pack(items, tokenizer)


def blend(
    documents: list[Document], tokenizer: Tokenizer, *, size: int, seed: int, shares: dict[str, float]
) -> np.ndarray:
    """About `size` characters of text, the sources by their shares, as token ids in rows that begin with a document."""
    rng = random.Random(seed)
    items: list[Item] = []
    for source, share in shares.items():
        texts = [document.text for document in documents if document.source == source]
        if source in OTHERS:
            texts = [text for text in texts if not text.startswith(USUAL)]
        left = int(share * size)
        while left > 0:
            for text in rng.sample(texts, len(texts)):
                if left <= 0:
                    break
                left -= len(text)
                items += _turned(text, source in CODE, rng) if rng.random() < INFILL_SHARE else [Item(text)]
    rng.shuffle(items)
    return _fill(items, tokenizer)


def _turned(text: str, code: bool, rng: random.Random) -> list[Item]:
    """Split a text into short infill documents: code by functions if it has any, prose by a few sentences."""
    if code:
        parts = [text] if len(text) <= INFILL_LONGEST else list(functions(text)) or pieces(text, INFILL_LONGEST)
        return [Item(part, code_gap(part, rng)) for part in parts]
    return [Item(part, prose_gap(part, rng)) for part in pieces(text, rng.choice(BLEND_LENGTHS))]


def _draw(texts: list[str], size: int, rng: random.Random, borders: Borders, lengths: tuple[int, ...]) -> list[Item]:
    """Take texts in random order, repeatedly if necessary, until they have `size` characters."""
    items: list[Item] = []
    while size > 0:
        for text in rng.sample(texts, len(texts)):
            if size <= 0:
                break
            size -= len(text)
            if rng.random() < INFILL_SHARE:
                # A single length uses no random number, so the first run's stream stays reproducible.
                parts = pieces(text, lengths[0] if len(lengths) == 1 else rng.choice(lengths))
                items += [Item(part, borders(part, rng)) for part in parts]
            else:
                items.append(Item(text))
    return items


def borders(text: str, rng: random.Random) -> tuple[int, int]:
    """Start and end of the middle: at any characters, or at borders of lines or sentences."""
    if rng.random() < 0.5:
        length = min(int(2 ** rng.uniform(0, 8.7)), len(text))
        start = rng.randint(0, len(text) - length)
        return start, start + length
    starts = [0] + [at + 1 for at, sign in enumerate(text[:-1]) if sign == "\n"]
    if len(starts) < PROSE_LINES:
        starts += [at + 1 for at, sign in enumerate(text[:-1]) if sign in ".!?" and text[at + 1] == " "]
        starts.sort()
    first = rng.randrange(len(starts))
    last = min(first + int(2 ** rng.uniform(0, 2.6)), len(starts))
    start, end = starts[first], starts[last] if last < len(starts) else len(text)
    # Like an editor's request: from after the indent to before the newline.
    if rng.random() < 0.7 and text[start:end].strip():
        end = start + len(text[start:end].rstrip("\n"))
        if rng.random() < 0.7:
            start = end - len(text[start:end].lstrip(" \n"))
    return start, end


def short_borders(text: str, rng: random.Random) -> tuple[int, int]:
    """A middle like an editor's request: a unit, the rest of one, or a few characters; sometimes a long one.

    A unit is a line, or in prose a sentence. Spaces before it belong to the prefix or to the middle, at random.
    """
    kind = rng.random()
    if kind < 0.1:
        return borders(text, rng)
    if kind < 0.4:
        start = rng.randrange(len(text))
        return start, min(start + int(61 ** rng.random()), len(text))
    first, end = rng.choice(units(text))
    start = end - len(text[first:end].lstrip())
    if kind < 0.7:
        return (start if rng.random() < 0.6 else first), end
    start = rng.randrange(start, end)
    if rng.random() < 0.6:  # the rest from a word on
        start = text.rfind(" ", first, start) + 1 or start
    if rng.random() < 0.4 and text[start - 1 : start] == " ":
        start -= 1
    return start, end


def units(text: str) -> list[tuple[int, int]]:
    """Start and end of each nonblank line, or in prose of each sentence. At least one for any text."""
    pattern = r"[^\n]*\S" if text.count("\n") + 1 >= PROSE_LINES else r"[^\n]+?(?:[.!?][\"']*(?=\s|$)|(?=\s*(?:\n|$)))"
    found = [match.span() for match in re.finditer(pattern, text) if match.group().strip()]
    return found or [(0, len(text))]


def _pack(items: list[Item], tokenizer: Tokenizer) -> np.ndarray:
    """Pack documents, each after END. Infill documents wait until they fit into the rest of a row."""
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
    print(f"{len(waiting)} infill documents did not fit")
    return np.array(ids[: len(ids) // ROW * ROW], dtype=np.uint16)


def _fill(items: list[Item], tokenizer: Tokenizer) -> np.ndarray:
    """Pack documents, each followed by END. Rows begin with a document; only documents longer than a row span rows.

    A row begins with the document that has waited longest, then takes the longest that fits. The rest is END.
    """
    ids: list[int] = []
    waiting: dict[int, deque[list[int]]] = {}  # by length
    order: deque[list[int]] = deque()

    def close() -> None:
        while len(ids) % ROW:
            remaining = ROW - len(ids) % ROW
            fitting = next((length for length in range(remaining, 0, -1) if waiting.get(length)), 0)
            ids.extend(waiting[fitting].popleft() if fitting else [END] * remaining)

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
                if same and same[0] is oldest:  # otherwise it is already in a row
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
