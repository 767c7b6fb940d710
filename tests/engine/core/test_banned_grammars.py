"""Samples with a grammar and banned texts: the matcher goes back with the tokens that are taken back."""

from __future__ import annotations

import random
import re

import msgspec
import numpy as np
import pytest
from history_runner import HistoryRunner, logits_after
from test_grammar_keeper import END, LIST, PARTS, PATTERNS, TEXTS, job, make_jobs, play, samples, text

from afterword.engine.core.banned_text import BannedPhrases, HeldTokens
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.matcher import next_tokens
from afterword.engine.core.phrase_search import AutomatonCache
from afterword.engine.core.sampler import Sampler, SampleTokens
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.grammar.compiled_grammar import GrammarTokens, compile_grammar
from afterword.engine.grammar.grammar_threads import GrammarThreads
from afterword.engine.protocol import BannedText, Grammar, Job, Sampling, Token

NESTED = Grammar("gbnf", 'root ::= "[" root? "]" | "a" | "b" root', "grammar")
TOKENS = GrammarTokens(TEXTS)


def new_loop(slots: int = 3, **rules: int) -> EngineLoop:
    loop = EngineLoop(HistoryRunner(slots, 8, **rules))  # type: ignore[arg-type]
    loop.use_grammars(GrammarThreads(TEXTS))
    loop.use_pieces(tuple(TEXTS))
    return loop


def banning_jobs(count: int) -> list[Job]:
    rng = random.Random(7)
    phrases = ("a", "12", "ba", "1", ",0", "true,", "[[", "aab", "x")
    found = []
    for each in make_jobs(count):
        banned = BannedText(tuple(rng.sample(phrases, 2)), tuple(rng.sample(phrases, 1)), (END,))
        found.append(msgspec.structs.replace(each, banned_text=rng.choice([banned, banned, None]), prediction=()))
    return found


def reference(each: Job, sample: int) -> tuple[list[int], str]:
    """The tokens of a sample. The grammar is read from its beginning for each token, so nothing is taken back in it."""
    phrases = BannedPhrases.of(each, tuple(TEXTS), AutomatonCache())
    assert phrases is not None
    assert each.grammar is not None
    held, tokens = HeldTokens(phrases, each), []
    while not held.is_exhausted:
        place = compile_grammar(each.grammar, TOKENS)
        if [place.append(token) for token in tokens][-1:] == [True] or tokens[-1:] == [END]:
            return tokens, "stop"
        if len(tokens) == each.max_tokens:
            break
        mask = next_tokens(place.allowed(), each, len(tokens))
        if mask is None:
            return tokens, "stop"
        left = mask.copy()
        for token in held.banned(len(tokens)):
            left[token // 32] &= ~np.uint32(1 << token % 32)
        query = SampleTokens(each, (sample,), len(tokens), TokenCounts(tokens), mask=left if left.any() else mask)
        ((token,),) = Sampler().read(logits_after([*each.prompt, *tokens])[None], [query])
        tokens.append(token.id)
        if count := held.append(Token(token.id)):
            del tokens[-count:]
        else:
            held.release()
    return tokens, "length"


@pytest.mark.parametrize("rules", [{}, {"grid": 4}, {"capacity": 60}], ids=str)
def test_tokens_are_those_of_grammars_that_are_read_anew(rules: dict[str, int]) -> None:
    jobs = banning_jobs(80)
    loop = new_loop(**rules)
    crowd = play(loop, jobs)
    compared = taken_back = 0
    for each, steps in zip(jobs, crowd, strict=True):
        (own,) = play(new_loop(**rules), [each])
        assert samples(steps) == samples(own)
        taken_back += sum(step.taken_back for step in own) if each.grammar and each.banned_text else 0
        for sample, (tokens, reason) in samples(own).items():
            banned = each.banned_text
            if banned and each.grammar:
                assert ([token.id for token in tokens], reason) == reference(each, sample)
                assert not any(phrase in text(tokens) for phrase in (*banned.exact, *banned.folded))
                compared += 1
            if reason == "stop" and each.grammar:
                assert re.fullmatch(PATTERNS[each.grammar.text], text(tokens))
    assert compared > 40
    assert taken_back > 40


def test_a_place_that_goes_back_is_that_which_was_left() -> None:
    rng = random.Random(3)
    for grammar in (LIST, PARTS, NESTED):
        place, history = compile_grammar(grammar, TOKENS), []
        for _ in range(200):
            allowed = place.allowed()
            ids = [token for token in range(len(TEXTS)) if allowed.mask[token // 32] >> token % 32 & 1]
            if not ids or rng.random() < 0.3:
                count = rng.randrange(len(history) + 1)
                if count:
                    place.take_back(count)
                    del history[-count:]
                fresh = compile_grammar(grammar, TOKENS)
                for token in history:
                    fresh.append(token)
                assert place.allowed().mask.tolist() == fresh.allowed().mask.tolist()
                assert place.allowed().complete == fresh.allowed().complete
                continue
            history.append(rng.choice(ids))
            if place.append(history[-1]):  # such a token ends the sample, so it is never taken back
                place, history = compile_grammar(grammar, TOKENS), []


def test_a_grammar_that_leaves_only_banned_texts_ends_the_sample() -> None:
    only = Grammar("choice", '["abx"]', "grammar")
    banned = BannedText(("bx",), (), (END,))
    (steps,) = play(new_loop(), [job(only, samples=3, banned_text=banned, sampling=Sampling(0.0))])
    found = samples(steps)
    assert {reason for _, reason in found.values()} == {"length"}
    assert all("bx" not in text(tokens) for tokens, _ in found.values())
