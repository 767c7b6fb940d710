"""Finds out at the start whether the upstream computes what is promised, by a few requests for one token each.

It checks the route, the size of the vocabulary, that bias forces a token, that log probabilities are those of the
unmodified model, that prompts have scores, and the tokenizer where the upstream has a route for it.
"""

from __future__ import annotations

from contextlib import aclosing

import msgspec

from afterword.engine.http.failures import Malformed, Refused, TooFewAlternatives
from afterword.engine.http.identity import Identity
from afterword.engine.http.upstream import GENERATE, Upstream
from afterword.engine.http.wire import PARSE_ERRORS, most_bytes, read_part, request_body
from afterword.engine.protocol import Job, Sampling
from afterword.engine.vllm.requests import SampleOutput, sample_request
from afterword.engine.vllm.tokenizer import FolderTokenizer
from afterword.errors import SettingError

TEXT = "The 3 naïve   tests:\n\tif x == 1024 — 日本語 🙂"
_NO_ROUTE = (403, 404, 405)  # 403: vLLM was started without the flag
_TOLERANCE = 0.5  # between a log probability and the same as score of a prompt; types of 8 bits stay far below it


class Probe:
    """The requests to one upstream. All methods raise `SettingError` and `UpstreamFailure`."""

    def __init__(self, upstream: Upstream, identity: Identity, tokenizer: FolderTokenizer) -> None:
        self._upstream = upstream
        self._identity = identity
        self._tokenizer = tokenizer
        self._vocabulary = len(tokenizer.pieces)
        self._prompt = tuple(tokenizer.tokenize(TEXT, False))[:16]

    async def check(self) -> None:
        """Check everything but the number of alternatives."""
        await self._check_tokenizer()
        try:
            plain = await self._ask()
        except Refused as problem:
            if problem.status in _NO_ROUTE:
                raise SettingError(
                    f"The upstream has no route POST {GENERATE} ({problem.detailed}). Start vLLM with "
                    "--enable-scale-out or --tokens-only; a gateway must let the route pass."
                ) from None
            raise
        best, logprob = _token(plain)
        await self._check_vocabulary(best, logprob)
        scored = await self._ask(prompt=(*self._prompt, best), scores=0)
        score = dict(scored.scores[-1].alternatives)[best]
        if logprob > 0 or abs(score - logprob) > _TOLERANCE:
            raise SettingError(
                f"The upstream reports {logprob:g} for a token when it generates it and {score:g} when it reads it: "
                "these are not log probabilities. Start vLLM without --logprobs-mode."
            )

    async def most_alternatives(self, wanted: int) -> int:
        """How many alternatives of a generated token the upstream reports: at most `wanted`."""
        fits, fails = 0, wanted + 1
        candidate = min(wanted, self._vocabulary)
        while fits + 1 < fails:
            try:
                await self._ask(alternatives=candidate)
                fits = candidate
            except (Refused, TooFewAlternatives):
                fails = candidate
            candidate = (fits + fails) // 2
            if fits == min(wanted, self._vocabulary):
                return wanted
        return fits

    async def scores_with(self, alternatives: int) -> bool:
        """Whether scores of a prompt can have this many alternatives."""
        try:
            await self._ask(scores=min(alternatives, self._vocabulary))
        except (Refused, TooFewAlternatives):
            return False
        return True

    async def _check_vocabulary(self, best: int, logprob: float) -> None:
        """Force the last token of the vocabulary; the one after it must be refused."""
        size = self._vocabulary
        last = size - 1 if best != size - 1 else size - 2
        try:
            forced, unbiased = _token(await self._ask(bias=last))
        except Refused as problem:
            raise SettingError(
                f"The upstream's model has less than the {size} tokens of the folder: {problem.detailed}"
            ) from None
        if forced != last:
            raise SettingError(f"The upstream ignores logit_bias: it generated token {forced} and not {last}.")
        if unbiased >= logprob:
            raise SettingError(
                "The upstream reports log probabilities after bias and temperature, not those of the unmodified model. "
                "Start vLLM without --logprobs-mode."
            )
        if not self._identity.version:  # without vLLM's check of ids, the request could end the upstream
            return
        try:
            await self._ask(bias=size)
        except Refused:
            return
        raise SettingError(
            f"The upstream's model has more than the {size} tokens that the folder's config.json states."
        )

    async def _check_tokenizer(self) -> None:
        body = {"model": self._identity.model, "prompt": TEXT, "add_special_tokens": False}
        try:
            answer = msgspec.json.decode(await self._upstream.post("/tokenize", msgspec.json.encode(body)))
            found = answer["tokens"]
        except Refused:  # with --tokens-only vLLM has no tokenizer
            return
        except (*PARSE_ERRORS, LookupError, TypeError) as problem:
            raise Malformed(f"/tokenize: {problem!r}") from None
        if found != list(self._tokenizer.tokenize(TEXT, False)):
            raise SettingError("The upstream's tokenizer gives other token ids for a text than that of the folder.")

    async def _ask(
        self,
        prompt: tuple[int, ...] | None = None,
        bias: int | None = None,
        alternatives: int = 0,
        scores: int | None = None,
    ) -> SampleOutput:
        """Generate one token: as a stream, or with `scores` as a whole response."""
        sampling = Sampling(temperature=0.0, logit_bias=() if bias is None else ((bias, 100.0),))
        job = Job(
            prompt or self._prompt, 1, 1, sampling, (), bytes(16), alternatives=alternatives, prompt_alternatives=scores
        )
        request = sample_request(0, job, 0, self._vocabulary)
        stream = scores is None
        body, most = (
            request_body(self._identity.model, request, self._vocabulary, stream=stream),
            most_bytes(request, stream=stream),
        )
        if not stream:
            data = await self._upstream.post(GENERATE, body, most)
            return read_part(data, request, self._vocabulary, stream=False).output
        async with aclosing(self._upstream.events(GENERATE, body, most)) as events:
            async for data in events:
                return read_part(data, request, self._vocabulary, stream=True).output
        raise Malformed("a stream has no event")


def _token(output: SampleOutput) -> tuple[int, float]:
    """The only token of an output, and its log probability."""
    if len(output.ids) != 1 or output.alternatives is None:
        raise Malformed("a response to a request for one token has not exactly one")
    return output.ids[0], dict(output.alternatives[0])[output.ids[0]]
