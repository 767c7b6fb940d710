"""`python tests/conformance --url http://host:port/v1`: hold any server to the cases, and print what comes of it."""

from __future__ import annotations

import argparse
import sys

import httpx
from cases import CASES
from probe import Probe
from verdict import judge, report


def main() -> int:
    """The exit status: 1 if the server breaks a rule that it MUST keep, 2 if it cannot be asked at all."""
    parser = argparse.ArgumentParser(prog="python tests/conformance", description=__doc__)
    parser.add_argument("--url", required=True, help="base URL of the API, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--key", help="API key; without one the cases about keys do not apply")
    parser.add_argument("--model", help="model to ask for; the first that the server lists if not given")
    options = parser.parse_args()
    try:
        probe = Probe(options.url, options.key, options.model)
    except (httpx.HTTPError, LookupError, ValueError) as problem:
        print(f"No model can be found at {options.url}: {problem!r}", file=sys.stderr)
        return 2
    with probe:
        return report(judge(case, probe) for case in CASES)


if __name__ == "__main__":
    sys.exit(main())
