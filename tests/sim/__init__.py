"""A deterministic simulator of everything between HTTP and the model, on a virtual clock. See README.md."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent

for folder in (str(TESTS), str(TESTS / "engine")):  # `python -m tests.sim` imports helpers of the tests
    if folder not in sys.path:
        sys.path.insert(0, folder)
