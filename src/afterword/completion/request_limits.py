"""The limits on one request, and how strictly it is parsed."""

from __future__ import annotations

from dataclasses import dataclass

from afterword.settings.limit_table import limit


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The defaults are above OpenAI's limits where that does no harm.

    `strict`: refuse what OpenAI refuses, including extensions, and clamp `logprobs` as OpenAI's server did.
    `ignore_unknown`: ignore unknown fields, and list them in a header of the response.
    """

    max_logprobs: int = limit(20, "alternatives for each token; -1: no limit")
    max_stop: int = limit(16, "stop strings")
    max_n: int = limit(128, "choices for each prompt")
    max_best_of: int = limit(20, "candidates for each prompt")
    max_completions: int = limit(2048, "prompts times candidates")
    max_request_tokens: int = limit(2**22, "token ids in the prompts plus tokens that can be generated")
    max_answer: int = limit(2**29, "bytes of a response, as estimated from the request")
    max_batch_answer: int = limit(2**24, "bytes of the response to a line of a batch, if max_answer is not less")
    max_bias: int = limit(1024, "entries of logit_bias, of stop_token_ids and of logprob_token_ids")
    max_name: int = limit(256, "characters of model and of user")
    max_salt: int = limit(1024, "characters of cache_salt")
    max_grammar: int = limit(2**17, "characters of a JSON schema, a regular expression or a grammar")
    strict: bool = False
    ignore_unknown: bool = False

    def most_bytes(self, in_batch: bool) -> int:
        """The most bytes of a response."""
        return min(self.max_answer, self.max_batch_answer) if in_batch else self.max_answer

    @property
    def most_logprobs(self) -> int:
        """The largest number of alternatives for each token."""
        return self.max_logprobs if self.max_logprobs >= 0 else 2**31 - 1


STRICT = RequestLimits(max_logprobs=5, max_stop=4, strict=True)
"""OpenAI's limits."""
