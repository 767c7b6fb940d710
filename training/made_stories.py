"""Short stories made of stories.txt: every sentence is about the same hero and the same things.

Knows that file and dice; a seed gives the same stories. Every story is a plot, whose steps have several wordings, with
slots that are filled once and stay: names, pronouns, things, places.
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


def story(dice: random.Random) -> tuple[str, str]:
    """One story, and what it is about: its plot and its hero."""
    lists, plots = sections(SOURCE)
    title, steps = dice.choice(plots)
    slots = _cast(title.split()[1], Slots(lists, dice), dice)
    paragraphs: list[list[str]] = [[]]
    for step in steps:
        if not step:
            paragraphs.append([])
        elif way := dice.choice(ways(step)):
            paragraphs[-1].append(polished(slots.fill(way.replace("{open}", _opening(dice)))))
    return slots.fill(f"{title.split()[0]} {{kind}} {{N}}"), "\n".join(map(" ".join, paragraphs))


def _cast(heroes: str, slots: Slots, dice: random.Random) -> Slots:
    """The hero and the friend: both children, or both animals."""
    animal = heroes == "animal" or (heroes == "any" and dice.random() < 0.5)
    for prefix, name in (("", "N"), ("f", "F")):
        girl = dice.random() < 0.5
        if animal:
            slots.draw("animals", prefix + "kind")
        else:
            slots.put(prefix + "kind", "girl" if girl else "boy")
        for slot, hers in (("he", "she"), ("his", "her"), ("him", "her")):
            slots.put(prefix + slot, hers if girl else slot)
        slots.draw("girls" if girl else "boys", name)
    return slots


def _opening(dice: random.Random) -> str:
    """The hero's introduction, which says nothing twice."""
    opening = USUAL if dice.random() < USUAL_SHARE else dice.choice(OPENINGS)
    second = dice.choice(SECONDS)
    new = not {"{trait}", "{home}"} & set(re.findall(r"\{\w+\}", opening)) & set(re.findall(r"\{\w+\}", second))
    return f"{opening} {second}" if new and dice.random() < SECOND_SHARE else opening


def polished(text: str) -> str:
    """Capitals where sentences and quotations begin, and "an" before a vowel."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r'(?:^|[.!?] "?|(?<= )")[a-z]', lambda found: found[0].upper(), text)


def stories(seed: int) -> Iterator[tuple[str, str]]:
    """What a story is about, and the story; without end, none twice."""
    dice = random.Random(seed)
    seen: set[str] = set()
    while True:
        about, text = story(dice)
        if text not in seen:
            seen.add(text)
            yield about, text
