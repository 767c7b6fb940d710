"""Generates short stories from stories.txt. All sentences of a story are about the same hero and things.

A seed always gives the same stories. A story is a plot whose steps have several wordings. Its slots are filled once:
names, pronouns, things, places.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from training.slots import Slots, sections, ways

SOURCE = Path(__file__).with_name("stories.txt")
USUAL = "Once upon a time, there was a little {kind} named {N}."
USUAL_SHARE = 0.5
OPENINGS = (
    "Once upon a time, there was a little {kind} called {N}.",
    "Once upon a time, there was a {trait} little {kind} named {N}.",
    "Once upon a time, there was a {kind} named {N}.",
    "Once upon a time, there lived a little {kind} named {N}.",
    "Once upon a time, in {home}, there lived a {kind} named {N}.",
    "Once upon a time, a little {kind} named {N} lived in {home}.",
    "Once there was a {trait} {kind} named {N}.",
    "There once was a little {kind} named {N}.",
    "{N} was a little {kind}.",
    "{N} was a {trait} little {kind} who lived in {home}.",
    "{N} was a {trait} {kind}.",
    "In {home}, there lived a little {kind}. {his} name was {N}.",
    "In a quiet forest, there lived a {trait} {kind} named {N}.",
    "Long ago, there was a little {kind} named {N}.",
)
SECONDS = (
    "{he} lived in {home}.",
    "{he} lived in {home} with {his} {elder}.",
    "{he} was very {trait}.",
    "{N} was a {trait} {kind}.",
    "{N} lived with {his} {elder} near {place}.",
)
SECOND_SHARE = 0.3


def story(rng: random.Random) -> tuple[str, str]:
    """The plot and hero of a story, and the story."""
    lists, plots = sections(SOURCE)
    title, steps = rng.choice(plots)
    slots = _cast(title.split()[1], Slots(lists, rng), rng)
    paragraphs: list[list[str]] = [[]]
    for step in steps:
        if not step:
            paragraphs.append([])
        elif way := rng.choice(ways(step)):
            paragraphs[-1].append(polished(slots.fill(way.replace("{open}", _opening(rng)))))
    return slots.fill(f"{title.split()[0]} {{kind}} {{N}}"), "\n".join(map(" ".join, paragraphs))


def _cast(heroes: str, slots: Slots, rng: random.Random) -> Slots:
    """The hero and the friend: both children, or both animals."""
    animal = heroes == "animal" or (heroes == "any" and rng.random() < 0.5)
    for prefix, name in (("", "N"), ("f", "F")):
        girl = rng.random() < 0.5
        if animal:
            slots.draw("animals", prefix + "kind")
        else:
            slots.put(prefix + "kind", "girl" if girl else "boy")
        for slot, hers in (("he", "she"), ("his", "her"), ("him", "her")):
            slots.put(prefix + slot, hers if girl else slot)
        slots.draw("girls" if girl else "boys", name)
    return slots


def _opening(rng: random.Random) -> str:
    """The hero's introduction, without repetitions."""
    opening = USUAL if rng.random() < USUAL_SHARE else rng.choice(OPENINGS)
    second = rng.choice(SECONDS)
    new = not {"{trait}", "{home}"} & set(re.findall(r"\{\w+\}", opening)) & set(re.findall(r"\{\w+\}", second))
    return f"{opening} {second}" if new and rng.random() < SECOND_SHARE else opening


def polished(text: str) -> str:
    """Capitals where sentences and quotations begin, and "an" before a vowel."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r'(?:^|[.!?] "?|(?<= )")[a-z]', lambda found: found[0].upper(), text)


def stories(seed: int) -> Iterator[tuple[str, str]]:
    """Endless different stories, each after its plot and hero."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        about, text = story(rng)
        if text not in seen:
            seen.add(text)
            yield about, text
