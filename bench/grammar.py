"""`python -m bench.grammar`: what a grammar costs, in one process and one run, without HTTP.

16 sequences write at a time, without and with a grammar, in turns whose order alternates. For each grammar: the time of
a step without and with it, by how much it is longer in the median turn, the range of the turns, the microseconds of a
mask (median and 99th percentile) in its own thread, and the time until the first use of the grammar is compiled.
`--vocabulary` adds made-up tokens to the masks of a small model, so that they cost what they would cost with a large
vocabulary; nothing of them is sampled.

`--llama-server` starts llama-server on the same file and measures its own grammars in the same turns, over HTTP: 16
whole responses at a time, with its default samplers, without and with the same schema or rules. It gets no further turn
of a grammar after `--peer-seconds`, and a response that takes longer is reported as missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from afterword.cli.model_setup import load_message
from afterword.config import EngineSettings
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.matcher import AllowedTokens
from afterword.engine.grammar import compiled_grammar
from afterword.engine.grammar.grammar_threads import GrammarThreads
from afterword.engine.llama import library
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.llama.vocabulary import Vocabulary
from afterword.engine.protocol import Grammar, GrammarKind, Job, Sampling
from afterword.models.gguf_facts import read_facts
from afterword.models.registry import Model, builtin_path
from bench.grammar_peer import LlamaServer, NotWritten, llama_server

SEQUENCES = 16
_RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 10, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 1},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A grammar, and the same for llama-server if it cannot read this one."""

    name: str
    kind: GrammarKind
    text: str
    rules: str = ""

    @property
    def for_llama_server(self) -> dict[str, Any]:
        """The fields of a request."""
        if self.kind == "json":
            return {"json_schema": json.loads(self.text)}
        return {"grammar": self.rules or self.text}


def cases(tokens: int) -> tuple[Case, ...]:
    """The measured grammars, of which no text of so many tokens is complete."""

    def items(schema: dict[str, Any]) -> str:
        return json.dumps({"type": "array", "items": schema, "minItems": tokens})

    pairs = 'root ::= pair+\npair ::= "(" [a-z]{1,8} pair* ")" | "[" [0-9]{1,4} pair* "]"'
    return (
        Case("records", "json", items(_RECORD)),
        Case("long strings", "json", json.dumps({"type": "string", "minLength": 10 * tokens})),
        Case("any JSON", "json", items({})),
        Case("regex of words", "regex", f"([a-z]{{1,12}} ){{{10 * tokens}}}", 'root ::= ([a-z]{1,12} " ")+'),
        Case("recursive grammar", "gbnf", pairs),
    )


@dataclass(slots=True)
class Turns:
    """Seconds for all tokens, without and with a grammar, one each a turn; and why there are none.

    The machine's speed changes between turns, so turns are compared by the ratios of their own two numbers.
    """

    free: list[float]
    bound: list[float]
    refused: str = ""

    def columns(self, tokens: int) -> str:
        """Milliseconds a step without and with the grammar, and by how many percent it is longer in the turns."""
        if self.refused:
            return f"  {self.refused}"
        plain, constrained = (1e3 * median(each) / tokens for each in (self.free, self.bound))
        more = [100 * (bound / free - 1) for free, bound in zip(self.free, self.bound, strict=True)]
        turns = f"{min(more):.1f} to {max(more):.1f} ({len(more)})"
        return f"{plain:10.2f}{constrained:10.2f}{median(more):8.1f}%{turns:>22}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = _options().parse_args(arguments)
    library.initialize(False)
    model = Model(options.model.stem, options.model, "file")
    settings = EngineSettings(threads=options.threads, parallel=SEQUENCES, context=2048)
    runner = LlamaRunner(load_message(model, read_facts(options.model), settings))
    texts = list(Vocabulary(runner.model).texts())
    rng = random.Random(0)
    texts += [_made_up(rng) for _ in range(options.vocabulary - len(texts))]
    print(f"{options.model.name}: {SEQUENCES} sequences, {options.tokens} tokens each, {len(texts)} tokens in masks")
    times = f"{'ms a step':>10}{'with':>10}{'more':>9}{'in turns':>22}"
    print(f"{'':20}{times}{'us a mask':>11}{'99 %':>9}{'ms to compile':>15}")
    loop = EngineLoop(runner, threads=options.threads or 1, thread_pool=runner.thread_pool)
    began = time.perf_counter()
    threads = GrammarThreads(texts)
    vocabulary = time.perf_counter() - began
    loop.use_grammars(threads)
    try:
        for case in cases(options.tokens):
            if options.only and case.name not in options.only:
                continue

            with ExitStack() as stack:
                peer = None
                if options.llama_server:  # a server for each grammar, because one that it cannot compute may end it
                    cores = options.threads or os.cpu_count() or 1
                    server = llama_server(options.model, cores, SEQUENCES, options.peer_seconds)
                    peer = stack.enter_context(server)
                _measure(loop, threads, case, peer, options)
    finally:
        threads.close()
    print(f"The tokens are prepared once, when a model is loaded: here in {vocabulary:.2f} s.")


def _compile(threads: GrammarThreads, grammar: Grammar) -> float:
    """The seconds in which a grammar is compiled."""
    began = time.perf_counter()
    threads.start(grammar)
    while (found := threads.result()) is None:
        threads.wait(1)
    assert not isinstance(found, str), found
    return time.perf_counter() - began


def _measure(
    loop: EngineLoop, threads: GrammarThreads, case: Case, peer: LlamaServer | None, options: argparse.Namespace
) -> None:
    """Print the line of a grammar, and the one of llama-server below it."""
    grammar = Grammar(case.kind, case.text, "bench")
    compiling = _compile(threads, grammar)
    ours, theirs = Turns([], []), Turns([], [])
    masks: list[float] = []
    allowed = compiled_grammar.Place.allowed
    compiled_grammar.Place.allowed = _timed(allowed, masks)  # type: ignore[method-assign]
    try:
        for number in range(options.repeat):
            turn = [(None, ours.free), (grammar, ours.bound)]
            for each, times in turn if number % 2 == 0 else reversed(turn):
                times.append(_seconds(loop, each, options.tokens))
            spent = sum(theirs.free + theirs.bound)
            if peer is not None and not theirs.refused and spent < options.peer_seconds:
                _peer_turn(peer, case, options.tokens, theirs)
    finally:
        compiled_grammar.Place.allowed = allowed  # type: ignore[method-assign]
    micro = 1e6 * np.percentile(masks, [50, 99])
    masks_and_compiling = f"{micro[0]:11.0f}{micro[1]:9.0f}{1e3 * compiling:15.1f}"
    print(f"{case.name:20}{ours.columns(options.tokens)}{masks_and_compiling}", flush=True)
    if peer is not None:
        print(f"{'  llama-server':20}{theirs.columns(options.tokens)}", flush=True)


def _peer_turn(peer: LlamaServer, case: Case, tokens: int, turns: Turns) -> None:
    try:
        turns.free.append(peer.seconds({}, tokens))
        turns.bound.append(peer.seconds(case.for_llama_server, tokens))
    except NotWritten as why:
        turns.refused = str(why)


def _seconds(loop: EngineLoop, grammar: Grammar | None, tokens: int) -> float:
    """The time in which 16 sequences write so many tokens each."""
    rng = random.Random(1)
    for number in range(SEQUENCES):
        prompt = tuple(rng.randrange(5, 1000) for _ in range(8))
        key = rng.randbytes(16)
        loop.start(number, Job(prompt, 1, tokens, Sampling(0.8, 0.95), (), key, grammar=grammar))
    written, began = 0, time.perf_counter()
    while (steps := loop.step()) is not None:
        written += sum(len(step.sampled) for step in steps.values())
        assert not any(step.failed for step in steps.values())
    assert written == SEQUENCES * tokens, "no text was complete"
    return time.perf_counter() - began


def _timed(
    allowed: Callable[[compiled_grammar.Place], AllowedTokens], seconds: list[float]
) -> Callable[[compiled_grammar.Place], AllowedTokens]:
    def measured(place: compiled_grammar.Place) -> AllowedTokens:
        began = time.perf_counter()
        found = allowed(place)
        seconds.append(time.perf_counter() - began)
        return found

    return measured


def _made_up(rng: random.Random) -> bytes:
    letters = 'etaoinshrdlu0123456789"{}[]:,.-_ ABC'
    return "".join(rng.choices(letters, k=rng.randrange(2, 10))).encode()


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.grammar", description=__doc__)
    parser.add_argument(
        "model", nargs="?", type=Path, default=builtin_path(), help="a GGUF file; default: the built-in model"
    )
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each sequence")
    parser.add_argument("--repeat", type=int, default=5, help="turns, of which the median counts")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--vocabulary", type=int, default=0, help="tokens in the masks, at least those of the model")
    parser.add_argument("--llama-server", action="store_true", help="measure llama-server too (--threads for both)")
    parser.add_argument(
        "--peer-seconds", type=float, default=240, help="seconds after which a grammar gets no turn of llama-server"
    )
    parser.add_argument(
        "--only", action="append", choices=[case.name for case in cases(1)], help="these grammars alone"
    )
    return parser


if __name__ == "__main__":
    main()
