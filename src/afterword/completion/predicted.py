"""Predicted outputs: the client sends the text that it expects, and the engine verifies many of its tokens in one pass.

This module makes the prediction's tokens and counts which of them are in a text. The counts follow from the text and
the prediction alone, so they do not depend on which tokens were verified together. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from afterword.completion.infill import before_suffix, suffix_tokens
from afterword.completion.request import CompletionRequest
from afterword.engine.draft import PredictedText, Prediction, prediction_draft
from afterword.engine.protocol import Job, ModelInfo

_LONGEST = 64  # characters of a token, where the tokenizer gives no bound


@dataclass(frozen=True, slots=True)
class PredictedTokens:
    """How many tokens of predictions were generated, and how many were verified and not generated."""

    accepted: int = 0
    rejected: int = 0

    def __add__(self, other: PredictedTokens) -> PredictedTokens:
        return PredictedTokens(self.accepted + other.accepted, self.rejected + other.rejected)


def predicted_text(request: CompletionRequest, model_info: ModelInfo) -> str:
    """The prediction as it is tokenized; empty if there is none, or if nothing is generated or verified.

    It follows the prompt, so the tokenizer must put no space before it: `predicted_tokens` removes what this function
    puts there. What is certainly longer than the context is cut off.
    """
    if not request.prediction or not request.max_tokens or not model_info.verifies_drafts:
        return ""
    longest = model_info.context * (model_info.longest_token or _LONGEST)
    return before_suffix(model_info) + request.prediction[:longest]


def predicted_tokens(ids: tuple[int, ...], model_info: ModelInfo) -> tuple[int, ...]:
    """The tokens of the prediction, at most as many as the context has, from those of `predicted_text`."""
    return suffix_tokens(ids, model_info)[: model_info.context]


class PredictionCounter:
    """Counts the predicted tokens of one choice. `text`: the prediction, which all choices of a prompt share."""

    def __init__(self, job: Job, text: PredictedText) -> None:
        self._prediction = Prediction(text)
        self._draft = prediction_draft(self._prediction, job.max_tokens)

    def add(self, token: int) -> None:
        """Count a token of the text."""
        self._draft.append(token)

    @property
    def predicted(self) -> PredictedTokens:
        """The tokens counted so far."""
        self._draft.settle()
        return PredictedTokens(self._prediction.accepted, self._prediction.rejected)
