"""Fields that SillyTavern and other clients of writers send under other servers' names.

`with_own_names` replaces them by this server's fields before a body is parsed, so each has the effect of that field. A
field of which this server has no equivalent is accepted with the value that switches it off, and refused by its name
with any other. They are not in `/openapi.json`, which describes the fields that they stand for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from afterword.completion.fields import Field, as_integer
from afterword.completion.request_limits import RequestLimits
from afterword.completion.sampler_fields import SAMPLER_NAMES
from afterword.errors import RequestError

Json = dict[str, Any]

SAME: Mapping[str, str] = {
    "add_bos_token": "add_special_tokens",
    "grammar_string": "grammar",
    "guided_grammar": "grammar",
    "guided_json": "json_schema",
    "mirostat_mode": "mirostat",
    "n_probs": "logprobs",
    "nsigma": "top_n_sigma",
    "rep_pen": "repetition_penalty",
    "repeat_penalty": "repetition_penalty",
    "sampler_seed": "seed",
    "stopping_strings": "stop",
    "typical": "typical_p",
}
"""Names of other servers, and the fields that they are. With both, the values must be equal."""

LENGTHS = ("max_new_tokens", "n_predict", "num_predict")
"""Other names of `max_tokens`. With another value than that, they are left to `length_names`, an error."""

KOBOLD_ORDER = (6, 0, 1, 3, 4, 2, 5)
"""KoboldCpp's samplers in its default order, which is that of llama-server."""


def _is(*values: Any) -> Callable[[Any], bool]:
    """Whether a value is one of these. Other than in Python, true is no 1."""
    return lambda value: any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)


OFF: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "early_stopping": ("false", _is(False)),
    "epsilon_cutoff": ("0", _is(0)),
    "eta_cutoff": ("0", _is(0)),
    "guidance_scale": ("1", _is(1)),
    "length_penalty": ("1", _is(1)),
    "max_tokens_second": ("0", _is(0)),
    "no_repeat_ngram_size": ("0", _is(0)),
    "num_beams": ("1", _is(1)),
    "penalty_alpha": ("0", _is(0)),
    "rep_pen_slope": ("0 or 1", _is(0, 1)),
    "repetition_decay": ("0", _is(0)),
    "skew": ("0", _is(0)),
    "smoothing_factor": ("0", _is(0)),
    "tfs": ("1", _is(1)),
    "tfs_z": ("1", _is(1)),
    "top_a": ("0", _is(0)),
    "trim_stop": ("true", _is(True)),
    "use_beam_search": ("false", _is(False)),
}
"""What this server does not have: the value that switches it off, and a test of it."""

WITHOUT_EFFECT = frozenset(
    {
        "api_server",  # SillyTavern's own settings
        "api_type",
        "cache_prompt",  # prefixes are always cached, which changes no text
        "include_reasoning",  # a completion has no part for it
        "legacy_api",
        "negative_prompt",  # counts only with a `guidance_scale`
        "num_ctx",  # the length to which the client has cut the prompt
        "smoothing_curve",  # counts only with a `smoothing_factor`
        "speculative_ngram",  # changes the speed alone
        "truncation_length",
    }
)
"""What changes no text, whatever its value."""

FLAGS = ("ban_eos_token", "dynamic_temperature", "temperature_last")
RANGES = ("rep_pen_range", "repetition_penalty_range")
"""How many last tokens the penalties count, as `repeat_last_n`. 0 and -1 are no field: the penalties of this API."""
_WHOLE_TEXT = (0, -1)
_LONGEST_LIST = 2**14  # characters of `dry_sequence_breakers` as JSON, all of them escaped
_BOUNDS = (("dynatemp_low", "dynatemp_high"), ("dynatemp_min", "dynatemp_max"))

OTHER_NAMES = frozenset(
    {*SAME, *LENGTHS, *OFF, *WITHOUT_EFFECT, *FLAGS, *RANGES, *(name for pair in _BOUNDS for name in pair)}
    | {"sampler_order"}
)
"""All names that `with_own_names` replaces."""


def has_other_names(values: Json) -> bool:
    """Whether `with_own_names` has anything to do."""
    forms = ((values.get("dry_sequence_breakers"), str), (values.get("logit_bias"), list))
    return not OTHER_NAMES.isdisjoint(values) or any(isinstance(value, form) for value, form in forms)


def with_own_names(values: Json, fields: Mapping[str, Field], limits: RequestLimits) -> Json:
    """The body with this server's names. Raises `RequestError`, which names the field as the client has sent it.

    With `limits.ignore_unknown` a field that is not supported stays, and so is ignored as an unknown one.
    """
    given = {name: value for name, value in values.items() if name in OTHER_NAMES and value is not None}
    own = {name: value for name, value in values.items() if name not in OTHER_NAMES or _is_wrong_length(name, values)}
    own["dry_sequence_breakers"] = _listed(own.get("dry_sequence_breakers"))
    pairs = own.get("logit_bias")
    if isinstance(pairs, list) and all(isinstance(pair, list) for pair in pairs):
        _set_bias(own, pairs, fields, limits)
    for name, value in given.items():
        if name in SAME or (name in RANGES and not _is_whole_text(value)):
            _set_same(own, name, value, fields, limits)
        elif allowed := _unsupported(name, value):
            if not limits.ignore_unknown:
                raise RequestError(f"'{name}' is not supported, except with the value {allowed}.", param=name)
            own[name] = value
    if given.get("ban_eos_token"):
        own["ignore_eos"] = True
    if (given.get("temperature_last") or given.get("sampler_order") == [*KOBOLD_ORDER]) and not own.get("samplers"):
        own["samplers"] = [*SAMPLER_NAMES]
    if given.get("dynamic_temperature", True):
        _set_temperature(own, given)
    return own


def _unsupported(name: str, value: Any) -> str:
    """Which values of a field are supported, if this one is not. Else empty."""
    if name in OFF:
        return "" if OFF[name][1](value) else OFF[name][0]
    if name in FLAGS:
        return "" if isinstance(value, bool) else "true or false"
    if name == "sampler_order":
        return "" if value == [*KOBOLD_ORDER] else str([*KOBOLD_ORDER])
    return ""


def _is_whole_text(window: Any) -> bool:
    return _is_number(window) and window in _WHOLE_TEXT


def _is_wrong_length(name: str, values: Json) -> bool:
    return name in LENGTHS and values[name] not in (None, values.get("max_tokens"))


def _set_same(own: Json, name: str, value: Any, fields: Mapping[str, Field], limits: RequestLimits) -> None:
    field = SAME.get(name, "repeat_last_n")
    read = fields[field](name, value, limits)
    if own.get(field) is None:
        own[field] = value
    elif value != own[field] and read != fields[field](field, own[field], limits):
        raise RequestError(f"'{name}' and '{field}' are the same field, but their values differ.", param=name)


def _set_temperature(own: Json, given: Json) -> None:
    """The dynamic temperature from its lowest and highest value."""
    for pair in _BOUNDS:
        low, high = (given.get(name) for name in pair)
        if low is None and high is None:
            continue
        if low is None or high is None or not (_is_number(low) and _is_number(high) and low <= high):
            raise RequestError(f"'{pair[0]}' and '{pair[1]}' must be two numbers in ascending order.", param=pair[0])
        for name, value in (("temperature", (low + high) / 2), ("dynatemp_range", (high - low) / 2)):
            own[name] = value if own.get(name) is None else own[name]
            if not _is_number(own[name]) or not math.isclose(own[name], value, abs_tol=1e-6):
                raise RequestError(f"'{name}' is not that of '{pair[0]}' and '{pair[1]}'.", param=pair[0])


def _listed(value: Any) -> Any:
    """SillyTavern sends the list of breakers as JSON in a text."""
    if not isinstance(value, str) or not value.startswith("[") or len(value) > _LONGEST_LIST:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _set_bias(own: Json, pairs: list[Any], fields: Mapping[str, Field], limits: RequestLimits) -> None:
    """llama-server's `logit_bias`: pairs of a token id and its bias, or false for a token that is banned."""
    bias: Json = {}
    banned: list[int] = []
    for pair in pairs:
        token = as_integer(pair[0]) if len(pair) == 2 else None
        if token is None:
            expected = "an object, or pairs of a token id and a number or false"
            raise RequestError(f"Invalid 'logit_bias': expected {expected}.", param="logit_bias")
        if pair[1] is False:
            banned.append(token)
        elif str(token) in bias:
            raise RequestError(f"Invalid 'logit_bias': the token {token} has several values.", param="logit_bias")
        else:
            bias[str(token)] = pair[1]
    fields["logit_bias"]("logit_bias", bias, limits)
    fields["banned_tokens"]("logit_bias", banned, limits)
    own["logit_bias"] = bias
    if banned:
        given = own.get("banned_tokens")
        others = () if given is None else fields["banned_tokens"]("banned_tokens", given, limits)
        own["banned_tokens"] = [*dict.fromkeys((*others, *banned))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
