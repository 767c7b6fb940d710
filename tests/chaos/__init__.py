"""Gates: tests of the failures that the server must survive, on real processes.

README.md describes how to run and add a gate.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent

if str(TESTS) not in sys.path:  # `python -m tests.chaos` needs the helper modules of the tests, as pytest does
    sys.path.insert(0, str(TESTS))
