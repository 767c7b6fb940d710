"""A deterministic simulator: everything between the door and the model, on a clock of its own. README.md says more."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent

for place in (str(TESTS), str(TESTS / "engine")):  # `python -m tests.sim` needs the tests' own helpers too
    if place not in sys.path:
        sys.path.insert(0, place)
