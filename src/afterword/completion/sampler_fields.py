"""The fields for samplers that OpenAI's API does not have: their parsers, and the `Sampling` of a request.

The names and definitions are llama-server's. `engine.core.sampler_chain` applies them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afterword.completion import fields
from afterword.completion.dry_breakers import bit_set
from afterword.completion.fields import Field, field_parser
from afterword.completion.request_limits import RequestLimits
from afterword.engine.protocol import Dry, SamplerChain, Sampling
from afterword.errors import RequestError

if TYPE_CHECKING:
    from afterword.completion.request import CompletionRequest

LLAMA_ORDER = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
"""llama-server's samplers in its order."""

SAMPLER_NAMES = (*LLAMA_ORDER, "adaptive_p")
"""The names in `samplers`. `adaptive_p` draws the token, so it is last wherever it stands, as in llama-server."""

_OTHER_SAMPLER_NAMES = {
    **{name.replace("_", sign): name for name in (*SAMPLER_NAMES, "infill") if "_" in name for sign in ("-", "")},
    **{"nucleus": "top_p", "temp": "temperature", "typ": "typ_p"},
    **dict.fromkeys(("typical", "typical-p", "typical_p"), "typ_p"),
}
"""Other names that llama-server accepts, and their names here. `typical` and its forms are from older versions."""

OWN_ORDER = ("penalties", "temperature", "min_p", "top_k", "top_p")
"""The samplers that every request has, in the order of this server."""

DEFAULT_BREAKERS = ("\n", ":", '"', "*")
"""llama-server's default of `dry_sequence_breakers`."""

_FURTHER = frozenset({"adaptive_p", "dry", "top_n_sigma", "typ_p", "xtc"})
_KEEPING = frozenset({"min_p", "top_p", "typ_p", "xtc"})  # the samplers with `min_keep`
_BEFORE_MIROSTAT = ("penalties", "dry")
_MOST_BREAKERS, _LONGEST_BREAKER = 32, 40
_MOST_CHARACTERS = 256  # of all breakers: each can be the beginning of a text in the queue of the tokenizer
_LONGEST_WINDOW = 8192  # tokens, which are counted anew for each token
_INT32 = 2**31


def samplers(names: tuple[str, ...]) -> Field:
    """A field for an array of these names of samplers, or of other names for them."""
    others = {other: own for other, own in _OTHER_SAMPLER_NAMES.items() if own in names}

    # Without the other names: generators of clients make the same constant of `typ_p` and `typ-p`.
    @field_parser({"type": "array", "uniqueItems": True, "items": {"enum": [*names]}})
    def parse(name: str, value: Any, limits: RequestLimits) -> tuple[str, ...]:
        texts: tuple[str, ...] = fields.strings(name, value, limits)
        given = tuple(others.get(each, each) for each in texts)
        if not set(given) <= set(names):
            raise RequestError(f"Invalid value in '{name}'. Supported values are {', '.join(names)}.", param=name)
        if len(set(given)) < len(given):
            raise RequestError(f"Invalid '{name}': a sampler is in the list more than once.", param=name)
        return given

    return parse


@field_parser({"type": "array", "maxItems": _MOST_BREAKERS, "items": {"type": "string", "maxLength": _LONGEST_BREAKER}})
def breakers(name: str, value: Any, limits: RequestLimits) -> tuple[str, ...]:
    """An array of short strings. Empty ones have no effect, as in llama-server."""
    texts: tuple[str, ...] = fields.strings(name, value, limits)
    return fields.bounded(name, texts, _MOST_BREAKERS, _LONGEST_BREAKER, _MOST_CHARACTERS)


SAMPLER_FIELDS: dict[str, Field] = {
    "adaptive_decay": fields.decimal(0, 0.99),
    "adaptive_target": fields.decimal(-1, 1),
    "dry_allowed_length": fields.integer(0, _INT32 - 1),
    "dry_base": fields.decimal(0, 100),
    "dry_multiplier": fields.decimal(0, 100),
    "dry_penalty_last_n": fields.integer(-1, _INT32 - 1),
    "dry_sequence_breakers": breakers,
    "dynatemp_exponent": fields.decimal(0, 100),
    "dynatemp_range": fields.decimal(0, 10),
    "min_keep": fields.integer(0, _INT32 - 1),
    "mirostat": fields.integer(0, 2),
    "mirostat_eta": fields.decimal(0, 10),
    "mirostat_tau": fields.decimal(0, 100),
    "repeat_last_n": fields.integer(-1, _LONGEST_WINDOW),
    "top_n_sigma": fields.decimal(-1, 100),
    "typical_p": fields.decimal(0, 1),
    "xtc_probability": fields.decimal(0, 1),
    "xtc_threshold": fields.decimal(0, 1),
}
"""The fields with numbers for samplers, by their names in requests. `samplers` has the order."""


def uses_dry(request: CompletionRequest) -> bool:
    """Whether the sampler DRY has an effect."""
    listed = request.samplers is None or "dry" in request.samplers
    return listed and request.dry_multiplier > 0 and request.dry_base >= 1 and request.dry_penalty_last_n != 0


def has_further_samplers(request: CompletionRequest) -> bool:
    """Whether a sampler or a setting of one has an effect that only `SamplerChain` has."""
    order = _order(request)
    return (
        bool(request.mirostat)
        or _has_further(order, request)
        or _min_keep(request, order) > 0
        or _last_n(request, order) is not None
    )


def sampling_of(
    request: CompletionRequest, vocabulary: int, inside: bytes = b"", sequences: tuple[Any, ...] = ()
) -> Sampling:
    """How the tokens of a request are sampled.

    `vocabulary`: the number of token ids. `inside`, `sequences`: the breakers of `Dry`.
    """
    order = _order(request)
    allowed = b"" if request.allowed_token_ids is None else bit_set(request.allowed_token_ids, vocabulary)
    needs_chain = allowed or has_further_samplers(request) or not _is_own_order(order)
    has_penalties = "penalties" in order
    return Sampling(
        temperature=request.temperature if "temperature" in order else 1.0,
        top_p=request.top_p if "top_p" in order else 1.0,
        top_k=request.top_k if "top_k" in order else 0,
        min_p=request.min_p if "min_p" in order else 0.0,
        presence_penalty=request.presence_penalty if has_penalties else 0.0,
        frequency_penalty=request.frequency_penalty if has_penalties else 0.0,
        repetition_penalty=request.repetition_penalty if has_penalties else 1.0,
        logit_bias=request.logit_bias,
        chain=_chain(request, order, _dry(request, inside, sequences), allowed) if needs_chain else None,
    )


def _dry(request: CompletionRequest, inside: bytes, sequences: tuple[Any, ...]) -> Dry | None:
    if not uses_dry(request):
        return None
    numbers = (request.dry_multiplier, request.dry_base, request.dry_allowed_length, request.dry_penalty_last_n)
    return Dry(*numbers, inside, sequences)


def _chain(request: CompletionRequest, order: tuple[str, ...], dry: Dry | None, allowed: bytes) -> SamplerChain:
    return SamplerChain(
        order=tuple(sampler for sampler in order if sampler != "adaptive_p"),
        typical_p=request.typical_p,
        top_n_sigma=max(0.0, request.top_n_sigma),
        xtc_probability=request.xtc_probability,
        xtc_threshold=request.xtc_threshold,
        dynatemp_range=request.dynatemp_range,
        dynatemp_exponent=request.dynatemp_exponent,
        dry=dry,
        mirostat=request.mirostat,
        mirostat_tau=request.mirostat_tau,
        mirostat_eta=request.mirostat_eta,
        allowed=allowed,
        adaptive_target=request.adaptive_target if "adaptive_p" in order else -1.0,
        adaptive_decay=request.adaptive_decay,
        min_keep=_min_keep(request, order),
        last_n=_last_n(request, order),
    )


def _min_keep(request: CompletionRequest, order: tuple[str, ...]) -> int:
    """`min_keep` if it has an effect, else 0. Every sampler keeps one token anyway."""
    return request.min_keep if request.min_keep > 1 and _KEEPING.intersection(order) else 0


def _last_n(request: CompletionRequest, order: tuple[str, ...]) -> int | None:
    return request.repeat_last_n if "penalties" in order else None


def _order(request: CompletionRequest) -> tuple[str, ...]:
    """The samplers with an effect, in order. With Mirostat only penalties, DRY and temperature have one."""
    has_penalties = bool(request.presence_penalty or request.frequency_penalty) or request.repetition_penalty != 1
    effects = {
        "penalties": request.repeat_last_n != 0 and has_penalties,
        "dry": uses_dry(request),
        "top_n_sigma": request.top_n_sigma > 0,
        "top_k": request.top_k > 0,
        "typ_p": request.typical_p < 1,
        "top_p": request.top_p < 1,
        "min_p": request.min_p > 0,
        "xtc": request.xtc_probability > 0 and request.xtc_threshold <= 0.5,
        "temperature": request.temperature != 1 or request.dynatemp_range > 0,
        "infill": True,
        "adaptive_p": request.adaptive_target >= 0,
    }
    listed = SAMPLER_NAMES if request.samplers is None else request.samplers
    order = tuple(sampler for sampler in listed if effects[sampler])
    if request.mirostat:
        return (*(sampler for sampler in order if sampler in _BEFORE_MIROSTAT), "temperature")
    if request.samplers is None and not _has_further(order, request):
        return tuple(sampler for sampler in OWN_ORDER if sampler in order)
    return order


def _has_further(order: tuple[str, ...], request: CompletionRequest) -> bool:
    return bool(_FURTHER.intersection(order)) or ("temperature" in order and request.dynatemp_range > 0)


def _is_own_order(order: tuple[str, ...]) -> bool:
    """Whether the samplers are some of `OWN_ORDER` in this order, each once."""
    return order == tuple(sampler for sampler in OWN_ORDER if sampler in order)
