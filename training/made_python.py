"""Small Python programs made of functions.txt: names, docstrings and bodies that agree.

Knows that file and dice; a seed gives the same programs. A program is one to three functions or a class, often with a
call whose result was found by running it; every program compiles.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from training.slots import Section, Slots, sections, ways

SOURCE = Path(__file__).with_name("functions.txt")
KEPT_OUT = "def add(a, b):"  # what the card shows as an example is in no made program
MOST = 3  # functions of one program
BARE_SHARE = 0.05  # functions without a docstring
TALL_SHARE = 0.08  # docstrings with their quotes on lines of their own
CALL_SHARE = 0.5


def program(dice: random.Random) -> tuple[list[str], str]:
    """The functions and classes of one program, and the program, which ends with a newline."""
    _, kinds = sections(SOURCE)
    parts, heads = [], []
    for _ in range(min(dice.randint(1, MOST), dice.randint(1, MOST))):
        head, code, call = part(dice.choice(kinds), dice)
        parts.append(code)
        heads += [head] if head and head not in heads else []
    use = [_use(code, call, dice)] if call and dice.random() < CALL_SHARE else []
    return parts, "\n\n\n".join([*heads, *parts, *use]) + "\n"


def part(kind: Section, dice: random.Random) -> tuple[str, str, str]:
    """What is to be imported, a function or class, and a call of it; the first and the last may be empty."""
    lists, _ = sections(SOURCE)
    title, lines = kind
    fields = dict(line.split(": ", 1) for line in lines)
    slots = Slots(lists, dice)
    name = dice.choice(title.split("; "))
    slots.put("f", name)
    if "code" in fields:
        return "", _plain(slots.fill(dice.choice(ways(fields["code"])))), ""
    arguments = slots.fill(dice.choice(ways(fields["args"])))
    for number, argument in enumerate(arguments.split(", ")):
        slots.put(str(number), argument)
    doc = slots.fill(dice.choice(ways(fields["doc"])))
    body = _plain(slots.fill(dice.choice(ways(fields["body"]))))
    call = f"{name}({slots.fill(fields['call'])})" if "call" in fields else ""
    return fields.get("head", ""), _function(name, arguments, doc, body, dice), call


def _function(name: str, arguments: str, doc: str, body: str, dice: random.Random) -> str:
    shape = dice.random()
    if shape < BARE_SHARE:
        lines = []
    elif shape < BARE_SHARE + TALL_SHARE:
        lines = ['"""', doc, '"""']
    else:
        lines = [f'"""{doc}"""']
    lines += body.split("\n")
    return "\n".join([f"def {name}({arguments}):", *(f"    {line}" for line in lines)])


def _use(code: str, call: str, dice: random.Random) -> str:
    """A line that calls the function; some say what it returns."""
    kind = dice.random()
    if kind < 0.5:
        return f"print({call})"
    names: dict[str, object] = {}
    exec(code, names)
    value = eval(call, names)
    return f"assert {call} == {value!r}" if kind < 0.75 else f"print({call})  # {value!r}"


def _plain(text: str) -> str:
    return text.replace(r"\n", "\n").replace(r"\t", "    ")


def programs(seed: int) -> Iterator[tuple[list[str], str]]:
    """The functions and classes of a program, and the program; without end, none twice."""
    dice = random.Random(seed)
    seen: set[str] = set()
    while True:
        parts, text = program(dice)
        if text not in seen and KEPT_OUT not in text:
            seen.add(text)
            yield parts, text
