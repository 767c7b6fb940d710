"""Banned phrases with the library that computes: the same tokens and floats alone and in a crowd."""

from __future__ import annotations

import random
from typing import Any, Literal

import msgspec
import pytest

from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.llama import library
from afterword.engine.llama.vocabulary import Vocabulary
from afterword.engine.protocol import BannedText, Job, RepetitionDetection, Token
from afterword.models.registry import builtin_path
from engine.test_reproducible import concurrent, open_runner, requests, sequential

library.initialize(verbose=False)


def banning(plain: list[Job]) -> list[Job]:
    """The jobs, most of them with texts that the built-in model writes often; some end when they loop."""
    rng = random.Random(5)
    phrases = ("the", "and", " a", ".", "he", "in", " to the", "s", "and the", "ly")
    jobs = []
    for job in plain:
        banned = BannedText(tuple(rng.sample(phrases, 2)), tuple(rng.sample(phrases, 3)))
        detection = RepetitionDetection(4, 1, 3)
        fields: dict[str, Any] = {"banned_text": rng.choice([banned, banned, None])}
        jobs.append(msgspec.structs.replace(job, repetition_detection=rng.choice([detection, None]), **fields))
    return jobs


@pytest.mark.parametrize("kv_type", ["exact", "f16"])
def test_texts_with_bans_are_reproducible_alone_and_in_a_crowd(kv_type: Literal["exact", "f16"]) -> None:
    runner = open_runner(builtin_path(), kv_type)
    pieces = Vocabulary(runner.model).pieces()
    loop = EngineLoop(runner)
    loop.use_pieces(pieces)
    jobs = banning(requests(60, seed=8))
    expected = sequential(loop, jobs)
    for job, mine, wanted in zip(jobs, concurrent(loop, jobs, seed=2), expected, strict=True):
        assert mine == wanted, job
    loop.check()
    for job, (_, samples, _) in zip(jobs, expected, strict=True):
        for tokens in samples:
            assert not job.banned_text or not contains(job.banned_text, tokens, pieces)


def contains(banned: BannedText, tokens: list[Token], pieces: tuple[bytes, ...]) -> bool:
    text = b"".join(pieces[token.id] for token in tokens).decode("utf-8", "replace")
    return any(each in text for each in banned.exact) or any(each in text.casefold() for each in banned.folded)
