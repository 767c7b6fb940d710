"""Generates small Python programs from functions.txt, with matching names, docstrings and bodies.

A seed always gives the same programs. A program is one to three functions or a class, often with a call whose result
comes from running it. All programs compile.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from training.slots import Section, Slots, sections, ways

SOURCE = Path(__file__).with_name("functions.txt")
KEPT_OUT = "def add(a, b):"  # no generated program contains the example of the model card
MOST = 3  # functions of one program
BARE_SHARE = 0.05  # functions without a docstring
TALL_SHARE = 0.08  # docstrings with the quotes on separate lines
CALL_SHARE = 0.5


def program(rng: random.Random) -> tuple[list[str], str]:
    """The functions and classes of one program, and the program, which ends with a newline."""
    _, kinds = sections(SOURCE)
    parts, heads = [], []
    for _ in range(min(rng.randint(1, MOST), rng.randint(1, MOST))):
        head, code, call = part(rng.choice(kinds), rng)
        parts.append(code)
        heads += [head] if head and head not in heads else []
    use = [_use(code, call, rng)] if call and rng.random() < CALL_SHARE else []
    return parts, "\n\n\n".join([*heads, *parts, *use]) + "\n"


def part(kind: Section, rng: random.Random) -> tuple[str, str, str]:
    """An import line, a function or class, and a call of it. The first and the last may be empty."""
    lists, _ = sections(SOURCE)
    title, lines = kind
    fields = dict(line.split(": ", 1) for line in lines)
    slots = Slots(lists, rng)
    name = rng.choice(title.split("; "))
    slots.put("f", name)
    if "code" in fields:
        return "", _plain(slots.fill(rng.choice(ways(fields["code"])))), ""
    arguments = slots.fill(rng.choice(ways(fields["args"])))
    for number, argument in enumerate(arguments.split(", ")):
        slots.put(str(number), argument)
    doc = slots.fill(rng.choice(ways(fields["doc"])))
    body = _plain(slots.fill(rng.choice(ways(fields["body"]))))
    call = f"{name}({slots.fill(fields['call'])})" if "call" in fields else ""
    return fields.get("head", ""), _function(name, arguments, doc, body, rng), call


def _function(name: str, arguments: str, doc: str, body: str, rng: random.Random) -> str:
    shape = rng.random()
    if shape < BARE_SHARE:
        lines = []
    elif shape < BARE_SHARE + TALL_SHARE:
        lines = ['"""', doc, '"""']
    else:
        lines = [f'"""{doc}"""']
    lines += body.split("\n")
    return "\n".join([f"def {name}({arguments}):", *(f"    {line}" for line in lines)])


def _use(code: str, call: str, rng: random.Random) -> str:
    """A line that calls the function; some state the result."""
    kind = rng.random()
    if kind < 0.5:
        return f"print({call})"
    names: dict[str, object] = {}
    exec(code, names)
    value = eval(call, names)
    return f"assert {call} == {value!r}" if kind < 0.75 else f"print({call})  # {value!r}"


def _plain(text: str) -> str:
    return text.replace(r"\n", "\n").replace(r"\t", "    ")


def programs(seed: int) -> Iterator[tuple[list[str], str]]:
    """Endless different programs, each with a list of its functions and classes."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        parts, text = program(rng)
        if text not in seen and KEPT_OUT not in text:
            seen.add(text)
            yield parts, text
