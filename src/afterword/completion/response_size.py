"""Estimates the size of a response from its plan, so that one that is too large is refused before any work.

The estimates are for ordinary text. A response whose choices end before `max_tokens` is smaller.
"""

from __future__ import annotations

from afterword.completion.plan import Plan, PromptPlan
from afterword.engine.token_row import MAX_HELD_BYTES, PACKED_BYTES, is_packed
from afterword.errors import RequestError

_TEXT = 8  # bytes of a generated token's text
_ID = 7  # of a token id
_ENTRY = 56  # of a token in the columns of `logprobs` without `top_logprobs`
_ALTERNATIVE = 36  # of an entry in `top_logprobs`
_LOGIT = 4  # of a logit in the worker
_RANKED = 80  # of an entry in `prompt_logprobs`


def estimate_bytes(plan: Plan) -> int:
    """Bytes of the whole response. The prompt's part counts for each choice, because it is sent with each.

    Alternatives that a stream sends token by token do not count. Rows of candidates, which are kept until the best ones
    are known, count in memory.
    """
    size = plan.n * sum(_shared(plan, prompt) + _own(plan, prompt) for prompt in plan.prompts)
    kept = plan.best_of * sum(prompt.job.max_tokens for prompt in plan.prompts) * _row_bytes(plan)
    return max(size, kept) if plan.best_of > plan.n else size


def check_size(plan: Plan, max_bytes: int) -> None:
    """Raises `RequestError` if the response is estimated to have more than `max_bytes` bytes, or needs more memory."""
    _check_held(plan)
    size = estimate_bytes(plan)
    if size > max_bytes:
        fields = ", ".join(f"'{name}'" for name in _fields(plan))
        raise RequestError(
            f"The response is estimated to have {size} bytes, but it can have at most {max_bytes}. (HINT: lower or "
            f"leave out {fields}, or send fewer prompts at a time.)",
            param=_fields(plan)[0],
            code="answer_too_large",
        )


def _check_held(plan: Plan) -> None:
    """Check how much a stop string or a banned text can hold back: a token of each candidate for each of its bytes.

    While tokens wait in the worker for a banned text, each has the logits of the whole vocabulary.
    """
    if not (row := _row_bytes(plan)):
        return
    samples = plan.best_of * len(plan.prompts)
    in_worker = max(row, _LOGIT * len(plan.pieces))
    banned = plan.prompts[0].job.banned_text
    phrases = {"bad_words": banned.exact, "banned_strings": banned.folded} if banned else {}
    checks = [("stop", plan.stop.texts, row), *((name, texts, in_worker) for name, texts in phrases.items())]
    for name, texts, size in checks:
        longest = max((len(text.encode()) for text in texts), default=0)
        most = MAX_HELD_BYTES // (size * samples)
        if longest > most:
            raise RequestError(
                f"A text in '{name}' has {longest} bytes, but with {plan.logprobs} alternatives for each token of "
                f"{samples} completions it can have at most {most}: the server holds back as many tokens. Shorten it, "
                "lower 'logprobs', or request fewer completions at a time.",
                param=name,
            )


def _row_bytes(plan: Plan) -> int:
    """Bytes of the packed alternatives of a generated token; 0 if they are not packed."""
    return (plan.logprobs or 0) * PACKED_BYTES if is_packed(plan.logprobs, plan.reports_ids) else 0


def _counted(plan: Plan, alternatives: int) -> int:
    """The alternatives that count in the size of the response."""
    return 0 if plan.streams and is_packed(alternatives, plan.reports_ids) else alternatives


def _shared(plan: Plan, prompt: PromptPlan) -> int:
    """Bytes of the prompt's part of one choice: echo, token ids and `prompt_logprobs`."""
    tokens = len(prompt.job.prompt)
    echoed = len(prompt.text.encode()) + tokens * _columns(plan) if plan.echo else 0
    ids = tokens * _ID if plan.return_token_ids else 0
    ranked = 0 if plan.prompt_logprobs is None else tokens * (1 + _counted(plan, plan.prompt_logprobs)) * _RANKED
    return echoed + ids + ranked


def _own(plan: Plan, prompt: PromptPlan) -> int:
    """Bytes of the generated part of one choice."""
    return prompt.job.max_tokens * (_TEXT + _columns(plan) + (_ID if plan.return_token_ids else 0))


def _columns(plan: Plan) -> int:
    if plan.logprobs is None:
        return 0
    return _ENTRY + ((1 + _counted(plan, plan.logprobs)) * _ALTERNATIVE if plan.logprobs else 0)


def _fields(plan: Plan) -> list[str]:
    """The given fields that make the response large, those with the largest effect first."""
    given = {
        "prompt_logprobs": plan.prompt_logprobs is not None,
        "logprobs": plan.logprobs is not None,
        "echo": plan.echo,
        "return_token_ids": plan.return_token_ids,
        "n": plan.n > 1,
        "max_tokens": True,
    }
    return [name for name, is_given in given.items() if is_given]
