"""`python tests/conformance --url http://host:port/v1`: run the conformance cases against a server; print verdicts."""

from __future__ import annotations

import argparse
import sys

import httpx
from cases import CASES
from extensions import extension_cases
from probe import Probe
from verdict import judge, report


def main() -> int:
    """Returns the exit status: 1 if a MUST case fails, 2 if the server cannot be reached or lists no model."""
    parser = argparse.ArgumentParser(prog="python tests/conformance", description=__doc__)
    parser.add_argument("--url", required=True, help="base URL of the API, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--key", help="API key; without it, the cases about keys do not apply")
    parser.add_argument("--model", help="model to request; by default the first that the server lists")
    parser.add_argument("--extensions", action="store_true", help="run the cases of extension fields instead")
    options = parser.parse_args()
    try:
        probe = Probe(options.url, options.key, options.model)
    except (httpx.HTTPError, LookupError, ValueError) as error:
        print(f"Cannot read the list of models at {options.url}: {error!r}", file=sys.stderr)
        return 2
    with probe:
        return report(judge(case, probe) for case in (extension_cases() if options.extensions else CASES))


if __name__ == "__main__":
    sys.exit(main())
