"""JSON of the responses and events of `/infill`, with llama-server's names. The order of the keys is llama-server's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from afterword.completion.infill_request import UNLIMITED, InfillRequest
from afterword.completion.middle import Middle, MiddlePart


@dataclass(frozen=True, slots=True)
class InfillTimes:
    """Milliseconds until the first token, including the wait in the queue, and from then on; and numbers of tokens.

    `cached`: tokens of the prompt that came from the prefix cache.
    """

    prompt_ms: float
    predicted_ms: float
    prompt: int
    cached: int
    predicted: int


@dataclass(frozen=True, slots=True)
class InfillHead:
    """What all middles of a response share. `context`: tokens of a prompt and its middle together."""

    model: str
    context: int
    prompt_tokens: int
    infill: InfillRequest


def part_object(head: InfillHead, part: MiddlePart, predicted: int) -> dict[str, Any]:
    """An event before the end of a middle. `predicted`: how many tokens the middle has."""
    return {
        "index": part.index,
        "content": part.text,
        "tokens": part.tokens if head.infill.return_tokens else (),
        "stop": False,
        "id_slot": -1,
        "tokens_predicted": predicted,
        "tokens_evaluated": head.prompt_tokens,
    }


def final_object(head: InfillHead, index: int, middle: Middle, times: InfillTimes, streamed: bool) -> dict[str, Any]:
    """A whole middle, or, if it was `streamed`, its last event, without text and tokens."""
    value = {
        "index": index,
        "content": "" if streamed else middle.text,
        "tokens": middle.tokens if head.infill.return_tokens and not streamed else (),
        "id_slot": -1,
        "stop": True,
        "model": head.model,
        "tokens_predicted": len(middle.tokens),
        "tokens_evaluated": head.prompt_tokens,
        "generation_settings": _settings(head),
        "has_new_line": "\n" in middle.text,
        "truncated": middle.truncated,
        "stop_type": middle.stop,
        "stopping_word": middle.stop_word,
        "tokens_cached": head.prompt_tokens + len(middle.tokens),
        "timings": timings(times),
    }
    return selected(value, head.infill.response_fields)


def timings(times: InfillTimes) -> dict[str, Any]:
    """llama-server's `timings`, in milliseconds, and in tokens per second."""
    computed = times.prompt - times.cached
    return {
        "cache_n": times.cached,
        **_speed("prompt", computed, times.prompt_ms),
        **_speed("predicted", times.predicted, times.predicted_ms),
    }


def selected(value: dict[str, Any], paths: Sequence[str] | None) -> dict[str, Any]:
    """The members at these paths, each with its path as name; members that do not exist are left out."""
    if paths is None:
        return value
    found: dict[str, Any] = {}
    for path in paths:
        inner: Any = value
        for name in path.split("/"):
            if not isinstance(inner, dict) or name not in inner:
                break
            inner = inner[name]
        else:
            found[path] = inner
    return found


def _speed(name: str, count: int, milliseconds: float) -> dict[str, Any]:
    return {
        f"{name}_n": count,
        f"{name}_ms": round(milliseconds, 3),
        f"{name}_per_token_ms": round(milliseconds / count, 3) if count else 0.0,
        f"{name}_per_second": round(count / milliseconds * 1000, 3) if milliseconds > 0 else 0.0,
    }


def _settings(head: InfillHead) -> dict[str, Any]:
    request = head.infill.completion
    return {
        "n_ctx": head.context,
        "n_predict": -1 if request.max_tokens == UNLIMITED else request.max_tokens,
        "n_indent": head.infill.indent,
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repeat_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "seed": -1 if request.seed is None else request.seed,
        "stop": request.stop,
    }
