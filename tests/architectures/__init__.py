"""Judges tiny models of all architectures that llama.cpp knows: `python -m tests.architectures`."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent

if str(TESTS) not in sys.path:  # the helper modules of the tests, as with pytest
    sys.path.insert(0, str(TESTS))
