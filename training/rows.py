"""The token stream: documents drawn by weight, half of them turned for infill, packed into rows.

Knows documents and the tokenizer; the result is one array of ids, cut by the trainer into rows.
"""

import random
from bisect import bisect, insort
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from training.data import SHARES, Document, pieces

ROW = 512
INFILL_SHARE = 0.5
INFILL_LONGEST = 1000  # characters of one infill document, so that it falls into one row
END, PREFIX, SUFFIX, MIDDLE = range(4)


@dataclass(frozen=True)
class Item:
    """One text to be packed; `middle` are the borders of the part to be filled in, if any."""

    text: str
    middle: tuple[int, int] | None = None


def stream(documents: list[Document], tokenizer: Tokenizer, size: int, seed: int) -> np.ndarray:
    """About `size` bytes of text, the sources by their shares, as token ids in whole rows."""
    dice = random.Random(seed)
    items = []
    for source, share in SHARES.items():
        texts = [document.text for document in documents if document.source == source]
        items += _draw(texts, int(share * size), dice)
    dice.shuffle(items)
    return _pack(items, tokenizer)


def _draw(texts: list[str], size: int, dice: random.Random) -> list[Item]:
    """Go through the texts, shuffled anew each time, until `size` characters are taken."""
    items: list[Item] = []
    while size > 0:
        for text in dice.sample(texts, len(texts)):
            if size <= 0:
                break
            size -= len(text)
            if dice.random() < INFILL_SHARE:
                items += [Item(piece, borders(piece, dice)) for piece in pieces(text, INFILL_LONGEST)]
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
    if len(starts) < 12:  # prose: few lines, so sentences
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
