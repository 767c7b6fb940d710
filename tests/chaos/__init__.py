"""Gates: what the server must survive, measured on real processes. README.md says how to run them and add one."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent

if str(TESTS) not in sys.path:  # where pytest finds the tests' own helpers; `python -m tests.chaos` needs them too
    sys.path.insert(0, str(TESTS))
