"""What the built-in model's made training text promises: stories and programs that are whole, and gaps within them."""

from __future__ import annotations

import random
import re
import sys
from itertools import islice
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # training/ is no part of the package

from training import made_python, made_stories
from training.data import compiles
from training.gaps import code_gap, prose_gap
from training.slots import sections, ways

STORIES = [text for _, text in islice(made_stories.stories(1), 400)]
PROGRAMS = [text for _, text in islice(made_python.programs(1), 400)]
FUNCTIONS = [kind for kind in sections(made_python.SOURCE)[1] if any(line.startswith("call: ") for line in kind[1])]


@pytest.mark.parametrize("maker", [made_stories.stories, made_python.programs])
def test_a_seed_gives_the_same_text(maker):
    first, again, other = (list(islice(maker(seed), 20)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_nothing_of_the_notation_is_left():
    left = re.compile(r"\|\||\\[nt]|\{\w+\.\d\}|\{(?:he|his|him|N|F|open|pair|list|words|text)\}")
    assert [text for text in STORIES + PROGRAMS if left.search(text)] == []


def test_a_story_is_made_of_whole_sentences():
    for paragraph in "\n".join(STORIES).split("\n"):
        assert re.match(r'"?[A-Z]', paragraph)
        assert re.search(r'[.!?]"?$', paragraph)
        assert not re.search(r"  |\s[.,!?]|\b[Aa] [aeiou]|[{}]", paragraph)


def test_a_story_keeps_its_hero():
    for about, text in islice(made_stories.stories(3), 200):
        assert about.split()[-1] in text.split("\n")[0]


def test_every_program_compiles():
    assert all(map(compiles, PROGRAMS))


def test_no_program_holds_the_example_of_the_card():
    assert not any(made_python.KEPT_OUT in text for text in PROGRAMS)


@pytest.mark.parametrize("kind", FUNCTIONS, ids=lambda kind: kind[0].split(";")[0])
def test_all_bodies_of_a_function_do_the_same(kind):
    title, lines = kind
    body = next(line for line in lines if line.startswith("body: "))
    found, calls = [], []
    for way in ways(body.removeprefix("body: ")):
        one = (title, tuple(f"body: {way}" if line == body else line for line in lines))
        head, code, call = made_python.part(one, random.Random(5))
        calls.append(call)
        names: dict[str, object] = {}
        exec(f"{head}\n{code}", names)
        found.append(eval(calls[0], names))
    assert all(value == pytest.approx(found[0]) if isinstance(value, float) else value == found[0] for value in found)


def test_gaps_lie_within_their_text():
    dice = random.Random(1)
    for gap, texts in ((prose_gap, STORIES), (code_gap, PROGRAMS)):
        for text in texts:
            start, end = gap(text, dice)
            assert 0 <= start < end <= len(text)
