"""Tests of `Draft`: which tokens it proposes, and what it counts."""

from __future__ import annotations

import random

import pytest

from afterword.engine.draft import (
    LENGTHS,
    PROBE,
    Draft,
    PredictedText,
    Prediction,
    ngram_places,
    own_text_draft,
    prediction_draft,
)


def follow(draft: Draft, tokens: list[int]) -> list[int]:
    """Append tokens, verifying each draft at once. Returns the lengths of the verified drafts."""
    lengths, index = [], 0
    while index < len(tokens):
        drafted = draft.rest
        if drafted:
            lengths.append(len(drafted))
        agreed = 0
        while agreed < len(drafted) and tokens[index : index + agreed + 1] == [*drafted[: agreed + 1]]:
            agreed += 1
        for token in tokens[index : index + agreed + 1]:
            draft.append(token)
        index += agreed + 1
    return lengths


def predicted(prediction: list[int], tokens: list[int]) -> tuple[list[int], int, int]:
    """The lengths of the verified drafts, the accepted and the rejected tokens of the prediction."""
    text = Prediction(PredictedText(prediction))
    draft = prediction_draft(text, len(tokens))
    lengths = follow(draft, tokens)
    draft.settle()
    return lengths, text.accepted, text.rejected


def test_drafts_become_longer_while_they_are_accepted() -> None:
    text = list(range(400))
    lengths, accepted, rejected = predicted(text, text)
    assert (lengths[:6], accepted, rejected) == ([8, 15, 31, 63, 63, 63], 400, 0)


def test_a_prediction_that_is_not_followed_is_never_verified() -> None:
    assert predicted(list(range(100)), list(range(500, 600))) == ([], 0, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: [*text[:200], 9999, *text[201:]],
        lambda text: [*text[:200], 9999, 9998, 9997, *text[200:]],
        lambda text: [*text[:200], *text[212:]],
        lambda text: [*text[200:300], *text[:200], *text[300:]],
    ],
    ids=["replaced", "inserted", "deleted", "moved"],
)
def test_after_a_change_the_draft_finds_its_place(change) -> None:
    text = list(range(400))
    tokens = change(text)
    lengths, accepted, rejected = predicted(text, tokens)
    assert len(lengths) < 25, "most tokens come from long drafts"
    assert accepted >= len(set(tokens) & set(text)) - 3 * 4
    assert accepted + rejected <= len(text)


def test_of_several_places_the_one_near_the_last_is_found() -> None:
    line = [1, 2, 3]
    text = [token for number in range(100) for token in (*line, 100 + number)]
    tokens = [*text[:200], 1, 2, 77, *text[203:]]
    lengths, accepted, _ = predicted(text, tokens)
    assert accepted >= len(text) - 10
    assert len(lengths) < 20


def test_counts_do_not_depend_on_what_was_verified_together() -> None:
    rng = random.Random(1)
    for _ in range(200):
        text = [rng.randrange(6) for _ in range(120)]
        tokens = [rng.randrange(6) if rng.random() < 0.1 else token for token in text]
        _, *counts = predicted(text, tokens)
        one = Prediction(PredictedText(text))
        draft = prediction_draft(one, len(tokens))
        for token in tokens:
            draft.append(token)
        draft.settle()
        assert [one.accepted, one.rejected] == counts


def test_a_draft_ends_with_the_tokens_that_may_be_generated() -> None:
    text = list(range(30))
    draft = prediction_draft(Prediction(PredictedText(text)), 14)
    for token in text[:11]:
        draft.append(token)
    assert draft.rest == (11, 12, 13)


def test_repeated_text_is_drafted_from_the_sample_itself() -> None:
    prompt = tuple(range(50))
    draft = own_text_draft(prompt, ngram_places(prompt), 400)
    lengths = follow(draft, [900, 901, *(list(range(10, 40)) * 8)])
    assert lengths[0] == LENGTHS[0]
    assert sum(lengths) > 180
    assert draft.acceptance > 0.7


def test_a_text_of_one_token_is_drafted_beyond_its_end() -> None:
    draft = own_text_draft((5, 6), ngram_places((5, 6)), 300)
    lengths = follow(draft, [7] * 300)
    assert max(lengths) == LENGTHS[-1] - 1


def test_text_without_repetition_is_not_drafted() -> None:
    draft = own_text_draft((1, 2, 3), ngram_places((1, 2, 3)), 300)
    assert follow(draft, list(range(10, 310))) == []


def test_a_text_across_the_end_of_the_prompt_is_found() -> None:
    prompt = (7, 8, 9, 10, 11, 12, 13, 14, 7, 8)
    draft = own_text_draft(prompt, ngram_places(prompt), 300)
    for token in (9, 10, 11, 12):
        draft.append(token)
    assert draft.rest[:3] == (13, 14, 7)


def test_own_texts_have_no_acceptance_before_a_draft_agreed() -> None:
    prompt = tuple(range(50))
    draft = own_text_draft(prompt, ngram_places(prompt), 300)
    for token in range(10, 13 + PROBE):
        draft.append(token)
    assert len(draft.rest) == LENGTHS[0]
    assert draft.acceptance == 0
    for token in draft.rest:
        draft.append(token)
    assert draft.acceptance > 0.8


def test_acceptance_falls_with_rejected_tokens() -> None:
    text = list(range(200))
    draft = prediction_draft(Prediction(PredictedText(text)), 1000)
    before = draft.acceptance
    follow(draft, [*range(PROBE + LENGTHS[0]), 999])
    assert draft.acceptance < before


@pytest.mark.parametrize(("agreed", "is_proven"), [(1, False), (4, False), (5, True)])
def test_drafts_from_own_texts_are_proven_once_more_than_half_of_one_agreed(agreed: int, is_proven: bool) -> None:
    prompt = tuple(range(50))
    draft = own_text_draft(prompt, ngram_places(prompt), 300)
    for token in range(10, 13 + PROBE + agreed):
        draft.append(token)
    draft.append(99)
    assert draft.is_proven == is_proven
    for token in range(100, 200):
        draft.append(token)
    assert draft.is_proven == is_proven, "it is proven once"
