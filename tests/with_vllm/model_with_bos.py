"""The cases of tests/conformance on a model that has a BOS."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "conformance"))

from probe import Probe
from verdict import Case, NotApplicable

COUNTS_NO_BOS = "a completion may fill the context"
"""It takes the length of the prompt from `usage`, which does not count the BOS that the server adds for this model."""


def check_case(case: Case, api: Probe) -> None:
    """Check a case, or skip the test if the case does not apply."""
    if case.rule == COUNTS_NO_BOS:
        pytest.skip("the model has a BOS, which usage does not count")
    try:
        case.check(api)
    except NotApplicable as why:
        pytest.skip(str(why))
