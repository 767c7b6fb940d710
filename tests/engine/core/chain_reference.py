"""Reference implementations of llama-server's samplers in plain Python floats, token by token and without numpy.

They follow the definitions literally and share no code with `core.sampler_chain`. A distribution is a dict from id to
logit; `probabilities` makes probabilities of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from afterword.engine.protocol import Dry, SamplerChain, Sampling

Logits = dict[int, float]


def distribution(
    row: Sequence[float],
    sampling: Sampling,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    excludes_top: bool = False,
) -> Logits:
    """The logits of the tokens that can be drawn. `excludes_top`: XTC takes effect."""
    chain = sampling.chain or SamplerChain(())
    logits = {token: float(logit) for token, logit in enumerate(row)}
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    if chain.allowed:
        logits = {t: x for t, x in logits.items() if t < 8 * len(chain.allowed) and chain.allowed[t // 8] & 1 << t % 8}
    steps: dict[str, Callable[[Logits], Logits]] = {
        "penalties": lambda x: penalized(x, sampling, prompt, generated),
        "dry": lambda x: dried(x, chain.dry, [*prompt, *generated]) if chain.dry else x,
        "top_n_sigma": lambda x: within_sigma(x, chain.top_n_sigma) if chain.top_n_sigma else x,
        "top_k": lambda x: dict(ordered(x)[: sampling.top_k or None]),
        "typ_p": lambda x: typical(x, chain.typical_p, chain.min_keep) if chain.typical_p < 1 else x,
        "top_p": lambda x: nucleus(x, sampling.top_p, chain.min_keep) if sampling.top_p < 1 else x,
        "min_p": lambda x: likely(x, sampling.min_p, chain.min_keep),
        "infill": lambda x: likely(x, 0.2),
        "xtc": lambda x: without_top(x, chain.xtc_threshold, chain.min_keep) if excludes_top else x,
        "temperature": lambda x: tempered(x, sampling.temperature, chain),
    }
    for step in chain.order:
        logits = steps[step](logits)
    return logits


def probabilities(logits: Logits) -> dict[int, float]:
    highest = max(logits.values())
    weights = {token: math.exp(logit - highest) for token, logit in logits.items()}
    total = math.fsum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def ordered(logits: Logits) -> list[tuple[int, float]]:
    """Most likely first; ties by id."""
    return sorted(logits.items(), key=lambda pair: (-pair[1], pair[0]))


def penalized(logits: Logits, sampling: Sampling, prompt: Sequence[int], generated: Sequence[int]) -> Logits:
    if sampling.chain and sampling.chain.last_n is not None:
        return penalized_in_window(logits, sampling, [*prompt, *generated], sampling.chain.last_n)
    found = {}
    for token, logit in logits.items():
        factor = sampling.repetition_penalty if token in prompt or token in generated else 1.0
        count = list(generated).count(token)
        lowered = count * sampling.frequency_penalty + (count > 0) * sampling.presence_penalty
        found[token] = (logit / factor if logit > 0 else logit * factor) - lowered
    return found


def penalized_in_window(logits: Logits, sampling: Sampling, text: Sequence[int], last_n: int) -> Logits:
    """llama.cpp's penalties: all of them count the last tokens, of the prompt too."""
    window = list(text) if last_n < 0 else list(text)[max(0, len(text) - last_n) :]
    found = {}
    for token, logit in logits.items():
        count, factor = window.count(token), sampling.repetition_penalty
        lowered = count * sampling.frequency_penalty + sampling.presence_penalty
        found[token] = (logit * factor if logit <= 0 else logit / factor) - lowered if count else logit
    return found


def adaptive(logits: Logits, target: float, mean: float) -> tuple[Logits, dict[int, float]]:
    """llama.cpp's adaptive-p: the logits from which it draws, and the probabilities before it, which it remembers."""
    p = probabilities(logits)
    adapted = min(max(2 * target - mean, 0.0), 1.0)
    distances = {token: abs((x - adapted) / 0.3) for token, x in p.items()}
    return {token: 5.0 - 10.0 * d * d / (1.0 + d) for token, d in distances.items()}, p


def longest_repetitions(dry: Dry, text: Sequence[int]) -> dict[int, int]:
    """For each token that would continue a repetition: how many tokens before it are repeated."""
    window = list(text) if dry.last_n < 0 else list(text)[len(text) - min(dry.last_n, len(text)) :]
    free = len(window)  # tokens after the last breaker
    for count in range(len(window)):
        if ends_with_breaker(dry, window[: len(window) - count]):
            free = count
            break
    found: dict[int, int] = {}
    for place, token in list(enumerate(window))[1:]:  # before the first token there is nothing that could be repeated
        for length in range(min(place, free), -1, -1):
            if window[place - length : place] == window[len(window) - length :]:
                if length >= dry.allowed_length and not is_breaker(dry, token):
                    found[token] = max(found.get(token, 0), length)
                break
    return found


def is_breaker(dry: Dry, token: int) -> bool:
    return token // 8 < len(dry.breakers) and bool(dry.breakers[token // 8] & 1 << token % 8)


def ends_with_breaker(dry: Dry, text: list[int]) -> bool:
    return is_breaker(dry, text[-1]) or any(
        any(text[-1 - len(tail) :] == [head, *tail] for head in heads) for heads, tail in dry.sequences
    )


def dried(logits: Logits, dry: Dry, text: Sequence[int]) -> Logits:
    found = longest_repetitions(dry, text)
    most = 88.7228391 // math.log(dry.base) if dry.base > 1.000001 else math.inf
    return {
        token: logit - dry.multiplier * dry.base ** min(found[token] - dry.allowed_length, most)
        if token in found
        else logit
        for token, logit in logits.items()
    }


def likely(logits: Logits, fraction: float, least: int = 0) -> Logits:
    highest = max(logits.values())
    kept = {token: logit for token, logit in logits.items() if math.exp(logit - highest) >= fraction}
    return kept if len(kept) >= least else dict(ordered(logits)[:least])


def within_sigma(logits: Logits, sigmas: float) -> Logits:
    mean = math.fsum(logits.values()) / len(logits)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in logits.values()) / len(logits))
    least = max(logits.values()) - sigmas * deviation
    return {t: x for t, x in logits.items() if x >= least}


def nucleus(logits: Logits, wanted: float, least: int = 0) -> Logits:
    kept, total = {}, 0.0
    p = probabilities(logits)
    for token, logit in ordered(logits):
        kept[token] = logit
        total += p[token]
        if total >= wanted and len(kept) >= least:
            break
    return kept


def typical(logits: Logits, wanted: float, least: int = 0) -> Logits:
    p = probabilities(logits)
    entropy = -math.fsum(x * math.log(x) for x in p.values())
    kept, total = {}, 0.0
    for token in sorted(p, key=lambda token: (abs(-math.log(p[token]) - entropy), token)):
        kept[token] = logits[token]
        total += p[token]
        if total > wanted and len(kept) >= least:
            break
    return kept


def without_top(logits: Logits, threshold: float, least: int = 0) -> Logits:
    p = probabilities(logits)
    likely = [token for token, _ in ordered(logits) if p[token] >= threshold]
    kept = {token: logit for token, logit in logits.items() if token not in likely[:-1]}
    return kept if len(kept) >= least else logits


def tempered(logits: Logits, temperature: float, chain: SamplerChain) -> Logits:
    if chain.dynatemp_range > 0 and not chain.mirostat:
        if len(logits) == 1:
            return logits
        p = probabilities(logits)
        entropy = -math.fsum(x * math.log(x) for x in p.values() if x > 0) / math.log(len(p))
        low = max(0.0, temperature - chain.dynatemp_range)
        high = temperature + chain.dynatemp_range
        temperature = low + (high - low) * entropy**chain.dynatemp_exponent
    if temperature < 1e-6:
        return dict(ordered(logits)[:1])
    return {token: logit / temperature for token, logit in logits.items()}


def mirostat_1(logits: Logits, limit: float, vocabulary: int) -> Logits:
    p = [x for _, x in sorted(probabilities(logits).items(), key=lambda pair: (-pair[1], pair[0]))][:100]
    steps = [math.log((i + 2) / (i + 1)) for i in range(len(p) - 1)]
    falls = [math.log(before / after) for before, after in itertools.pairwise(p)]
    exponent = math.fsum(t * b for t, b in zip(steps, falls, strict=True)) / math.fsum(t * t for t in steps)
    excess = exponent - 1
    count = (excess * 2**limit / (1 - vocabulary**-excess)) ** (1 / exponent)
    return dict(ordered(logits)[: max(int(count), 1)])


def mirostat_2(logits: Logits, limit: float) -> Logits:
    p = probabilities(logits)
    kept = {token: logit for token, logit in logits.items() if -math.log2(p[token]) <= limit}
    return kept or dict(ordered(logits)[:1])
