"""`python -m bench.schema_suite FOLDER --url URL`: the public JSON-Schema-Test-Suite against the grammars of a server.

FOLDER is that of a draft, such as `JSON-Schema-Test-Suite/tests/draft2020-12`. Each schema is compiled here, with one
token for each byte. It is refused with the place in the schema, or its tests follow: no text of an instance that the
suite calls invalid may be accepted, in any order of members. Then a running server writes answers for each compiled
schema; an answer that ended by itself must parse and validate, formats included. The exit status is 1 if anything is
wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs

from afterword.engine.grammar.compiled_grammar import GrammarTokens, InvalidGrammar, Place, compile_grammar
from afterword.engine.protocol import Grammar

_MOST_TEXTS = 200  # of one instance: orders of its members
_FEW = 24  # orders of one object
_TEXTS_OF_MEMBERS = 8


@dataclass(slots=True)
class Findings:
    """Counts, and what is wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def fault(self, kind: str, where: str, what: object) -> None:
        self.counts[kind] += 1
        self.faults.append(f"{kind}: {where}: {str(what)[:300]}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the counts and the faults."""
    options = _options().parse_args(arguments)
    tokens = GrammarTokens(
        [bytes([byte]) for byte in range(0xFF)]
    )  # 0xff is in no UTF-8 text, and marks special tokens
    findings = Findings()
    compiled = [found for found in _groups(options.folder) if follow_tests(*found, tokens, findings)]
    if options.url:
        with httpx.Client(base_url=options.url, timeout=600) as http, ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda found: check_answers(http, *found, options.samples, findings), compiled))
    for kind, count in sorted(findings.counts.items()):
        print(f"{count:6} {kind}")
    print(*findings.faults, sep="\n")
    sys.exit(bool(findings.faults))


def _groups(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(folder.rglob("*.json")):
        for group in json.loads(path.read_text("utf-8")):
            yield f"{path.relative_to(folder)}: {group['description']}", group


def follow_tests(where: str, group: dict[str, Any], tokens: GrammarTokens, findings: Findings) -> bool:
    """Compile a schema, and follow the instances of its tests. Returns whether it was compiled."""
    findings.counts["schemas"] += 1
    try:
        place = compile_grammar(Grammar("json", json.dumps(group["schema"], ensure_ascii=False), "json_schema"), tokens)
    except InvalidGrammar as problem:
        findings.counts["schemas refused"] += 1
        if "of the schema)" not in str(problem):
            findings.fault("refused without the place", where, problem)
        return False
    for test in group["tests"]:
        accepted = any(accepts(place, text) for text in texts_of(test["data"]))
        if accepted and not test["valid"]:
            findings.fault("invalid instance accepted", f"{where}: {test['description']}", test["data"])
        else:
            findings.counts[f"{'valid' if test['valid'] else 'invalid'} {'accepted' if accepted else 'rejected'}"] += 1
    return True


def accepts(place: Place, text: bytes) -> bool:
    """Whether a text is complete in a grammar."""
    at = place.copy()
    for byte in text:
        # The mask of the place, as the sampler uses it.
        allowed = at.allowed()
        if not int(allowed.mask[byte // 32]) >> byte % 32 & 1:
            return False
        at.append(byte)
    return at.allowed().complete


def texts_of(value: Any) -> list[bytes]:
    """JSON texts of a value, with the members of its objects in several orders."""
    return [text.encode("utf-8", "surrogatepass") for text in _texts(value, _MOST_TEXTS)]


def _texts(value: Any, most: int) -> list[str]:
    if isinstance(value, dict):
        members = [
            [f"{name}:{text}" for text in _texts(value[key], _TEXTS_OF_MEMBERS) for name in _texts(key, 2)]
            for key in value
        ]
        orders = itertools.islice(itertools.permutations(members), _FEW)
        products = (product for order in orders for product in itertools.islice(itertools.product(*order), _FEW))
        return [f"{{{','.join(each)}}}" for each in itertools.islice(products, most)]
    if isinstance(value, list):
        items = itertools.product(*(_texts(each, _TEXTS_OF_MEMBERS) for each in value))
        return [f"[{','.join(each)}]" for each in itertools.islice(items, most)]
    return list(dict.fromkeys([json.dumps(value, ensure_ascii=False), json.dumps(value)]))


def check_answers(http: httpx.Client, where: str, group: dict[str, Any], samples: int, findings: Findings) -> None:
    """Let the server write answers for a schema, and validate those that ended by themselves."""
    schema = group["schema"]
    body = {"prompt": "JSON: ", "max_tokens": 200, "temperature": 1, "n": samples, "json_schema": schema}
    response = http.post("/v1/completions", json={**body, "seed": 1, "logit_bias": _soon_closed(http)})
    if response.status_code != 200:
        findings.fault("no answer", where, response.text)
        return
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    for choice in response.json()["choices"]:
        if choice["finish_reason"] != "stop":
            findings.counts["answers cut off"] += 1
        elif _is_valid(validator, choice["text"]):
            findings.counts["answers valid"] += 1
        else:
            findings.fault("answer invalid", where, choice["text"])


def _is_valid(validator: Any, text: str) -> bool:
    try:
        return bool(validator.is_valid(json.loads(text, parse_float=_bounded)))
    except ValueError:
        return False


def _bounded(text: str) -> float:
    """A number without infinity, which the validator does not take: a model can write any exponent."""
    return min(max(float(text), -sys.float_info.max), sys.float_info.max)


def _soon_closed(http: httpx.Client) -> dict[str, float]:
    """A `logit_bias` with which a small model soon closes what it has opened."""
    ids = [http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in ('"', "}", "]", '"}', '",')]
    return {str(each[0]): 5.0 for each in ids if len(each) == 1}


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.schema_suite", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder of a draft in the suite")
    parser.add_argument("--url", help="a running server that writes answers; default: none are written")
    parser.add_argument("--samples", type=int, default=4, help="answers for each schema")
    return parser


if __name__ == "__main__":
    main()
