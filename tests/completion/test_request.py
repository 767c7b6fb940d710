"""`request.parse`: the values that each field accepts, and the errors for all others."""

import json
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterword.completion.length_names import LENGTH_NAMES
from afterword.completion.object_fields import ContextFile, StreamOptions
from afterword.completion.request import EXTENSIONS, FIELDS, CompletionRequest, parse, schema
from afterword.completion.request_limits import STRICT, RequestLimits
from afterword.engine.protocol import RepetitionDetection
from afterword.errors import RequestError

LIMITS = RequestLimits()
INT64 = 2**63


def parsed(**values: Any) -> CompletionRequest:
    return parse(json.dumps(values).encode(), LIMITS)


def refused(body: bytes | dict[str, Any], limits: RequestLimits = LIMITS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode(), limits)
    error = caught.value
    assert (error.status, error.type) == (400, "invalid_request_error")
    return error


def error_fields(error: RequestError) -> tuple[str, str | None, str | None]:
    return error.message, error.param, error.code


# ---- absent fields


def test_an_empty_body_gives_the_defaults_of_the_api() -> None:
    assert asdict(parsed()) == {
        "model": None,
        "prompt": (None,),
        "best_of": None,
        "echo": False,
        "frequency_penalty": 0.0,
        "logit_bias": (),
        "logprobs": None,
        "max_tokens": 16,
        "n": 1,
        "presence_penalty": 0.0,
        "seed": None,
        "stop": (),
        "stream": False,
        "stream_options": None,
        "suffix": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "user": None,
        "add_special_tokens": None,
        "allowed_token_ids": None,
        "bad_words": (),
        "banned_strings": (),
        "banned_tokens": (),
        "cache_salt": None,
        "custom_token_bans": (),
        "grammar": None,
        "ignore_eos": False,
        "include_stop_str_in_output": False,
        "input_extra": (),
        "json_schema": None,
        "logprob_token_ids": (),
        "logprobs_mode": "raw_logprobs",
        "min_p": 0.0,
        "min_tokens": 0,
        "prediction": None,
        "priority": 0,
        "prompt_logprobs": None,
        "repetition_detection": None,
        "repetition_penalty": 1.0,
        "response_format": None,
        "return_token_ids": False,
        "return_tokens_as_token_ids": False,
        "samplers": None,
        "skip_special_tokens": None,
        "spaces_between_special_tokens": True,
        "stop_token_ids": (),
        "structured_outputs": None,
        "token_healing": False,
        "top_k": 0,
        "truncate_prompt_tokens": None,
        "truncation_side": "left",
        "adaptive_decay": 0.9,
        "adaptive_target": -1.0,
        "dry_allowed_length": 2,
        "dry_base": 1.75,
        "dry_multiplier": 0.0,
        "dry_penalty_last_n": 64,
        "dry_sequence_breakers": ("\n", ":", '"', "*"),
        "dynatemp_exponent": 1.0,
        "dynatemp_range": 0.0,
        "min_keep": 0,
        "mirostat": 0,
        "mirostat_eta": 0.1,
        "mirostat_tau": 5.0,
        "repeat_last_n": None,
        "top_n_sigma": -1.0,
        "typical_p": 1.0,
        "xtc_probability": 0.0,
        "xtc_threshold": 0.1,
        "ignored": (),
    }


@pytest.mark.parametrize("name", FIELDS)
def test_null_is_as_if_absent(name: str) -> None:
    assert parsed(**{name: None}) == parsed()


def test_there_is_a_parser_for_every_field_of_a_request() -> None:
    assert [*FIELDS, *EXTENSIONS, "ignored"] == [field.name for field in fields(CompletionRequest)]


# ---- accepted values


@pytest.mark.parametrize(
    ("name", "given_value", "value"),
    [
        ("model", "a/b:c", "a/b:c"),
        ("prompt", "", ("",)),
        ("prompt", "abc", ("abc",)),
        ("prompt", ["a", ""], ("a", "")),
        ("prompt", [1212, 318], ((1212, 318),)),
        ("prompt", [1.0], ((1,),)),
        ("prompt", [[1212], [318, 2]], ((1212,), (318, 2))),
        ("prompt", [-1], ((-1,),)),  # the plan checks ids, because they depend on the model
        ("echo", True, True),
        ("frequency_penalty", -2, -2.0),
        ("frequency_penalty", 2, 2.0),
        ("presence_penalty", -2.0, -2.0),
        ("presence_penalty", 2.0, 2.0),
        ("logit_bias", {}, ()),
        ("logit_bias", {"50256": -100, "0": 100, "7": 0.5}, ((50256, -100.0), (0, 100.0), (7, 0.5))),
        ("logprobs", 0, 0),
        ("logprobs", 5, 5),
        ("logprobs", LIMITS.max_logprobs, LIMITS.max_logprobs),
        ("max_tokens", 1, 1),
        ("max_tokens", 16.0, 16),
        ("max_tokens", 2**31 - 1, 2**31 - 1),
        ("n", 128, 128),
        ("best_of", 1, 1),
        ("best_of", 20, 20),
        ("seed", -INT64, -INT64),
        ("seed", INT64 - 1, INT64 - 1),
        ("stop", "\n", ("\n",)),
        ("stop", ["a", "b", "c", "d"], ("a", "b", "c", "d")),
        ("stop", ["x", "x"], ("x", "x")),
        ("stop", "😀" * 1024, ("😀" * 1024,)),
        ("stream", True, True),
        ("suffix", "", ""),
        ("suffix", "test.", "test."),
        ("temperature", 0, 0.0),
        ("temperature", 2, 2.0),
        ("top_p", 0, 0.0),
        ("top_p", 1, 1.0),
        ("user", "", ""),
    ],
)
def test_accepted(name: str, given_value: Any, value: Any) -> None:
    assert parsed(**{name: given_value}) == replace(CompletionRequest(), **{name: value})


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, StreamOptions()),
        ({"include_usage": True}, StreamOptions(include_usage=True)),
        ({"include_usage": None, "include_obfuscation": False}, StreamOptions()),
    ],
)
def test_stream_options(options: dict[str, Any], value: StreamOptions) -> None:
    assert parsed(stream=True, stream_options=options).stream_options == value


def test_numbers_are_converted_to_the_declared_types() -> None:
    request = parsed(temperature=1, top_p=1, max_tokens=3.0, logit_bias={"1": 1})
    assert [type(value) for value in (request.temperature, request.top_p, request.max_tokens)] == [float, float, int]
    assert type(request.logit_bias[0][1]) is float


# ---- refused values: wrong types

KINDS = {
    "a boolean": True,
    "an integer": 5,
    "a decimal number": 1.5,
    "a string": "hot",
    "an array": [{}],
    "an object": {"a": 1},
}
TYPES = {
    "a string": ("model", "suffix", "user"),
    "an integer": ("best_of", "logprobs", "max_tokens", "n", "seed"),
    "a decimal": ("frequency_penalty", "presence_penalty", "temperature", "top_p"),
    "a boolean": ("echo", "stream"),
    "an object": ("logit_bias", "stream_options"),
    "one of a string or an array of strings": ("stop",),
    "one of a string, an array of strings, an array of integers, or an array of arrays of integers": ("prompt",),
}
FITTING = {"a decimal": {"an integer", "a decimal number"}}
WRONG = [
    (name, expected, kind)
    for expected, names in TYPES.items()
    for name in names
    for kind in KINDS
    if kind not in FITTING.get(expected, {expected.removeprefix("one of ").split(" or ")[0].split(",")[0]})
]


def test_the_table_of_types_has_every_field() -> None:
    assert sorted(name for names in TYPES.values() for name in names) == sorted(FIELDS)


@pytest.mark.parametrize(("name", "expected", "kind"), WRONG)
def test_a_wrong_type_is_named(name: str, expected: str, kind: str) -> None:
    message = f"Invalid type for '{name}': expected {expected}, but got {kind} instead."
    assert error_fields(refused({name: KINDS[kind]})) == (message, name, "invalid_type")


@pytest.mark.parametrize("prompt", [[[]], [1, "a"], ["a", 1], [[1], "a"], [[1], []], [[1], 2], [1.5], [True], [[True]]])
def test_a_prompt_is_one_of_its_four_forms(prompt: Any) -> None:
    error = refused({"prompt": prompt})
    assert (error.param, error.code) == ("prompt", "invalid_type")


def test_an_empty_array_of_prompts_is_refused() -> None:
    message = "empty array. Expected an array with minimum length 1, but got an empty array instead."
    assert error_fields(refused({"prompt": []})) == (f"Invalid 'prompt': {message}", "prompt", "empty_array")


def test_an_empty_array_is_no_stop_string_and_strictly_refused() -> None:
    assert parsed(stop=[]) == parsed()
    assert not schema(LIMITS)["properties"]["stop"]["anyOf"][0]["anyOf"][1]["minItems"]
    with pytest.raises(RequestError, match="Invalid 'stop': empty array"):
        parse(b'{"model":"a","stop":[]}', STRICT)


# ---- refused values: out of range


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("best_of", 0, LIMITS.max_best_of),
        ("logprobs", -1, LIMITS.max_logprobs),
        ("max_tokens", 0, 2**31 - 1),
        ("n", 1, LIMITS.max_n),
        ("seed", -INT64, INT64 - 1),
    ],
)
def test_bounds_of_integers(name: str, low: int, high: int) -> None:
    assert error_fields(refused({name: low - 1})) == (
        f"Invalid '{name}': integer below minimum value. Expected a value >= {low}, but got {low - 1} instead.",
        name,
        "integer_below_min_value",
    )
    assert error_fields(refused({name: high + 1})) == (
        f"Invalid '{name}': integer above maximum value. Expected a value <= {high}, but got {high + 1} instead.",
        name,
        "integer_above_max_value",
    )


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("frequency_penalty", -2, 2), ("presence_penalty", -2, 2), ("temperature", 0, 2), ("top_p", 0, 1)],
)
def test_bounds_of_decimals(name: str, low: int, high: int) -> None:
    assert error_fields(refused({name: low - 0.5})) == (
        f"Invalid '{name}': decimal below minimum value. Expected a value >= {low}, but got {low - 0.5} instead.",
        name,
        "decimal_below_min_value",
    )
    assert error_fields(refused({name: high + 0.5})) == (
        f"Invalid '{name}': decimal above maximum value. Expected a value <= {high}, but got {high + 0.5} instead.",
        name,
        "decimal_above_max_value",
    )


TOO_LONG = "Expected an array with maximum length 4, but got an array with length 9 instead."


def test_the_number_of_stop_strings_is_limited() -> None:
    error = refused({"stop": ["x"] * 9}, RequestLimits(max_stop=4))
    assert error_fields(error) == (f"Invalid 'stop': array too long. {TOO_LONG}", "stop", "array_above_max_length")
    assert len(parsed(stop=["x"] * LIMITS.max_stop).stop) == LIMITS.max_stop
    assert refused({"stop": ["x"] * (LIMITS.max_stop + 1)}).code == "array_above_max_length"


@pytest.mark.parametrize("stop", ["", ["a", ""]])
def test_an_empty_stop_string_is_refused(stop: Any) -> None:
    message = "empty string. Expected a string with minimum length 1, but got an empty string instead."
    assert error_fields(refused({"stop": stop})) == (f"Invalid 'stop': {message}", "stop", "empty_string")


def test_a_stop_string_that_is_too_long_is_refused() -> None:
    message = "string too long. Expected a string with maximum length 1024, but got a string with length 1025 instead."
    assert error_fields(refused({"stop": "x" * 1025})) == (
        f"Invalid 'stop': {message}",
        "stop",
        "string_above_max_length",
    )


@pytest.mark.parametrize("stop", [[1], [None], [["a"]], ["a", 1]])
def test_a_stop_that_is_not_a_string_is_refused(stop: Any) -> None:
    assert error_fields(refused({"stop": stop}))[1:] == ("stop", "invalid_type")


@pytest.mark.parametrize("key", ["AI", "", "-1", "1.0", "+1", " 1", "²", "٣", "1e3", "99999999999"])
def test_a_key_of_logit_bias_that_is_not_a_token_id_is_refused(key: str) -> None:
    message = f"Invalid key in 'logit_bias': {key}. You should only be submitting non-negative integers."
    assert error_fields(refused({"logit_bias": {key: 1}})) == (message, "logit_bias", None)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(101, "101"), (-100.5, "-100.5"), (True, "a boolean"), ("5", "a string"), (None, "null"), ([1], "an array")],
)
def test_a_value_of_logit_bias_out_of_range_is_refused(value: Any, shown: str) -> None:
    message = f"Invalid value in 'logit_bias': {shown}. Values must be between -100 and 100."
    assert error_fields(refused({"logit_bias": {"5": value}})) == (message, "logit_bias", None)


def test_the_number_of_biases_is_limited() -> None:
    many = {str(token): 1 for token in range(LIMITS.max_bias + 1)}
    message = f"Invalid 'logit_bias': at most {LIMITS.max_bias} tokens can have a bias."
    assert error_fields(refused({"logit_bias": many})) == (message, "logit_bias", None)
    del many["0"]
    assert len(parsed(logit_bias=many).logit_bias) == LIMITS.max_bias


def test_unknown_or_mistyped_stream_options_are_refused() -> None:
    assert error_fields(refused({"stream": True, "stream_options": {"foo": True}})) == (
        "Unknown parameter: 'stream_options.foo'.",
        "stream_options.foo",
        "unknown_parameter",
    )
    assert error_fields(refused({"stream": True, "stream_options": {"include_usage": 1}})) == (
        "Invalid type for 'stream_options.include_usage': expected a boolean, but got an integer instead.",
        "stream_options.include_usage",
        "invalid_type",
    )


def test_a_prediction_is_a_text_or_text_parts() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert parsed(prediction={"type": "content", "content": "one two"}).prediction == "one two"
    assert parsed(prediction={"type": "content", "content": parts}).prediction == "one two"
    assert parsed(prediction=None).prediction is None


@pytest.mark.parametrize(
    ("value", "param", "code"),
    [
        ("text", "prediction", "invalid_type"),
        ({}, "prediction.type", "missing_required_parameter"),
        ({"type": "content"}, "prediction.content", "missing_required_parameter"),
        ({"type": "text", "content": ""}, "prediction.type", "invalid_value"),
        ({"type": "content", "content": 1}, "prediction.content", "invalid_type"),
        ({"type": "content", "content": []}, "prediction.content", "empty_array"),
        ({"type": "content", "content": ["a"]}, "prediction.content[0]", "invalid_type"),
        ({"type": "content", "content": [{"type": "text", "text": 1}]}, "prediction.content[0].text", "invalid_type"),
        (
            {"type": "content", "content": [{"type": "image", "text": "a"}]},
            "prediction.content[0].type",
            "invalid_value",
        ),
        ({"type": "content", "content": "", "more": 1}, "prediction.more", "unknown_parameter"),
    ],
)
def test_other_predictions_are_refused(value: object, param: str, code: str) -> None:
    error = refused({"prediction": value})
    assert (error.param, error.code) == (param, code)


@pytest.mark.parametrize("name", ["foo", "predictions", "messages", "max_completion_tokens", "Prompt", ""])
def test_an_unknown_field_is_refused_by_name_before_anything_else(name: str) -> None:
    error = refused({"n": "many", name: None})
    assert (error.message, error.param) == (f"Unrecognized request argument supplied: {name}", name)


@pytest.mark.parametrize("name", [name for name in LENGTH_NAMES if name != "max_tokens"])
@pytest.mark.parametrize("ignore", [False, True])
def test_a_length_by_another_name_is_refused_and_never_ignored(name: str, ignore: bool) -> None:
    first, dot, last = name.partition(".")
    body = {"prompt": "a", first: {last: 8, "seed": 1} if dot else 8}
    with pytest.raises(RequestError, match="'max_tokens'" if ignore or not dot else first) as caught:
        parse(json.dumps(body).encode(), replace(LIMITS, ignore_unknown=ignore))
    assert caught.value.param == (name if ignore else first)
    assert caught.value.code == "unknown_parameter"


def test_a_length_alias_equal_to_max_tokens_can_be_ignored() -> None:
    ignoring = replace(LIMITS, ignore_unknown=True)
    nested = ({"options": {"num_predict": 8}}, {"parameters": {"max_new_tokens": 8, "top_k": 1}}, {"options": {}})
    for more in ({"max_length": 8}, *nested, {"parameters": "max_new_tokens"}, {"max_length": None}):
        request = parse(json.dumps({"prompt": "a", "max_tokens": 8, **more}).encode(), ignoring)
        assert (request.max_tokens, request.ignored) == (8, (*more,))
    for name in ("n_predict", "num_predict", "max_new_tokens"):  # which SillyTavern sends beside `max_tokens`
        assert parsed(max_tokens=8, **{name: 8}) == parsed(max_tokens=8, **{name: None}) == parsed(max_tokens=8)
    for other in (9, "8", [8]):
        with pytest.raises(RequestError):
            parse(json.dumps({"prompt": "a", "max_tokens": 8, "n_predict": other}).encode(), ignoring)


# ---- rules that concern several fields

ZERO = "You requested a length 0 completion, but "
CHOICES = "You requested that the server return more choices than it will generate (HINT: you must set 'n' "
MANY = "Too many parallel completions requested. You submitted 65 prompts with 2 completions each, but you can "


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (
            {"n": 2, "best_of": 1},
            f"{CHOICES}(currently 2) to be at most 'best_of' (currently 1), or omit either parameter if you don't "
            "specifically want to use them.)",
            None,
        ),
        (
            {"best_of": 0},
            f"{CHOICES}(currently 1) to be at most 'best_of' (currently 0), or omit either parameter if you don't "
            "specifically want to use them.)",
            None,
        ),
        (
            {"best_of": 2, "stream": True},
            "Results cannot be streamed when 'best_of' is greater than 'n'. (HINT: set 'best_of' to at most 'n', or "
            "set 'stream' to false.)",
            "best_of",
        ),
        (
            {"stream_options": {"include_usage": True}},
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            "stream_options",
        ),
        (
            {"max_tokens": 0},
            f"{ZERO}you did not set the 'echo' parameter. That means that we will return no data to you. (HINT: set "
            "'echo' to true in order for the API to echo back the prompt to you.)",
            None,
        ),
        (
            {"max_tokens": 0, "echo": True},
            f"{ZERO}did not specify a 'logprobs' parameter to see the probability of each token. Either request a "
            "completion with length greater than 1, or set 'logprobs' to 0 (to see the probabilities of each token "
            "you submitted) or more (to also see the probabilities over alternative tokens).",
            None,
        ),
        (
            {"suffix": "x", "echo": True, "logprobs": 0},
            "'suffix' cannot be combined with both 'echo' and 'logprobs': the model reads the suffix too, so the "
            "prompt's log probabilities would not be those of the prompt alone. Leave out one of the three.",
            "suffix",
        ),
        ({"prompt": ["a"] * 65, "n": 2}, f"{MANY}request at most 128 in total.", "prompt"),
    ],
)
def test_contradicting_fields_are_refused(body: dict[str, Any], message: str, param: str | None) -> None:
    assert error_fields(refused(body, RequestLimits(max_completions=128))) == (message, param, None)


@pytest.mark.parametrize(
    "body",
    [
        {"n": 2, "best_of": 2, "stream": True},
        {"best_of": 1, "stream": True},
        {"n": 128},  # best_of is absent, so it equals n
        {"n": 3, "temperature": 0},
        {"max_tokens": 0, "echo": True, "logprobs": 0},
        {"max_tokens": 0, "echo": True, "logprobs": 0, "stream": True},
        {"suffix": "x", "echo": True},
        {"suffix": "x", "logprobs": 1},
        {"suffix": "", "echo": True, "logprobs": 1},
        {"prompt": ["a"] * 64, "n": 2},
    ],
)
def test_agreeing_fields_are_accepted(body: dict[str, Any]) -> None:
    parse(json.dumps(body).encode(), RequestLimits(max_completions=128))


# ---- JSON


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"model":',
        b"{} {}",
        b'{"n":1,}',
        b"{'n':1}",
        b"null",
        b"[]",
        b'"prompt"',
        b"5",
        b'{"temperature":NaN}',
        b'{"temperature":Infinity}',
        b'{"temperature":1e999}',
        b'{"n":01}',
        b'{"prompt":"a\nb"}',
        b'{"prompt":"\xff"}',
        '{"prompt":"a"}'.encode("utf-16"),
        b"[" * 50_000,
        b'{"prompt":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b'{"logit_bias":' * 50_000 + b"1" + b"}" * 50_000,
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_not_a_json_object_is_refused(body: bytes) -> None:
    message, param, code = error_fields(refused(body))
    assert message.startswith("We could not parse the JSON body of your request. (HINT: ")
    assert (param, code) == (None, None)


def test_escapes_are_decoded() -> None:
    assert parse(rb'{"prompt": "\ud83d\ude00\u0000\n"}', LIMITS).prompt == ("😀\0\n",)


def test_equal_keys_are_refused() -> None:
    assert "twice" in refused(b'{"n": 1, "n": "x", "n": 2}').message


@pytest.mark.parametrize("digits", [20, 40, 400, 5000])
@pytest.mark.parametrize("name", ["max_tokens", "seed", "temperature", "logprobs"])
def test_the_error_for_a_huge_integer_is_short(name: str, digits: int) -> None:
    assert len(refused(b'{"%s": %s}' % (name.encode(), b"9" * digits)).message) < 256


def test_tiny_numbers_are_accepted() -> None:
    assert parse(b'{"temperature": 1e-999, "top_p": 0.' + b"0" * 400 + b"1}", LIMITS).temperature == 0.0


# ---- generated bodies

SECRET = "sesame-opens"
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-1, 21)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([16.0, 2**64, 10**400, 1e300])
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
BODIES = st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=3), JSON, max_size=4)


def request_or_error(body: bytes) -> CompletionRequest | RequestError:
    try:
        return parse(body, LIMITS)
    except RequestError as error:
        size = len(error.message.encode()) + len((error.param or "").encode())
        assert size < 2048
        return error


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_give_a_request_or_an_error(body: bytes) -> None:
    request_or_error(body)


@settings(deadline=None, max_examples=100)
@given(BODIES)
def test_any_object_gives_a_request_within_limits_or_an_error(body: dict[str, Any]) -> None:
    request = request_or_error(json.dumps(body).encode())
    if isinstance(request, RequestError):
        return
    assert 1 <= request.n <= (request.best_of or request.n) <= LIMITS.max_n
    assert request.prompt
    assert () not in request.prompt
    assert 0 <= request.temperature <= 2
    assert 0 <= request.top_p <= 1
    assert all(request.stop)
    hash(request)  # every value is immutable


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [SECRET, [SECRET], [SECRET, 1], {"0": SECRET}, [[SECRET]]])
def test_an_error_quotes_no_text_of_the_client(name: str, value: Any) -> None:
    result = request_or_error(json.dumps({"best_of": 0} | {name: value}).encode())
    assert isinstance(result, RequestError)
    assert SECRET not in result.message


@pytest.mark.parametrize(
    "body", [{"é" * 10**5: 1}, {"stream_options": {"é" * 10**5: 1}}, {"logit_bias": {"é" * 10**5: 1}}]
)
def test_a_long_name_is_cut_short(body: dict[str, Any]) -> None:
    assert isinstance(request_or_error(json.dumps({"stream": True} | body).encode()), RequestError)


# ---- extensions, and strict limits


@pytest.mark.parametrize(
    ("name", "value", "result"),
    [
        ("top_k", -1, 0),
        ("top_k", 40, 40),
        ("min_p", 0.05, 0.05),
        ("min_tokens", 3, 3),
        ("repetition_penalty", 1.1, 1.1),
        ("ignore_eos", True, True),
        ("add_special_tokens", False, False),
        ("add_special_tokens", True, True),
        ("add_special_tokens", None, None),
        ("repetition_detection", {"max_pattern_size": 4, "min_count": 2}, RepetitionDetection(4, 1, 2)),
        (
            "repetition_detection",
            {"max_pattern_size": 4, "min_pattern_size": 3, "min_count": 5},
            RepetitionDetection(4, 3, 5),
        ),
        ("repetition_detection", {}, None),
        ("return_token_ids", True, True),
        ("priority", -3, -3),
        ("prompt_logprobs", 0, 0),
        ("stop_token_ids", [1, 2.0], (1, 2)),
        ("stop_token_ids", [], ()),
        ("cache_salt", "mine", "mine"),
        ("allowed_token_ids", [3, 1.0], (3, 1)),
        ("bad_words", [" very", "a b "], ("very", "a b ")),
        ("banned_strings", "x", ("x",)),
        ("banned_strings", ["x ", "", "Y"], ("x ", "Y")),
        ("banned_tokens", [3, 1.0], (3, 1)),
        ("banned_tokens", "3, 1", (3, 1)),
        ("banned_tokens", "", ()),
        ("custom_token_bans", "7", (7,)),
        ("include_stop_str_in_output", True, True),
        ("return_tokens_as_token_ids", True, True),
        ("samplers", ["top_k", "xtc"], ("top_k", "xtc")),
        ("samplers", [], ()),
        ("skip_special_tokens", False, False),
        ("spaces_between_special_tokens", False, False),
        ("token_healing", True, True),
        ("truncate_prompt_tokens", -1, -1),
        ("truncate_prompt_tokens", 7, 7),
        ("truncation_side", "right", "right"),
        ("dry_sequence_breakers", ["\n", ""], ("\n", "")),
        ("dry_penalty_last_n", -1, -1),
        ("mirostat", 2, 2),
        ("top_n_sigma", -1, -1.0),
        ("typical_p", 1, 1.0),
        ("xtc_threshold", 0.5, 0.5),
    ],
)
def test_extensions_have_their_values(name: str, value: Any, result: Any) -> None:
    assert getattr(parsed(**{name: value}), name) == result


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.1),
        ("ignore_eos", 1),
        ("priority", 1.5),
        ("priority", 2**31),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", -2),
        ("stop_token_ids", 5),
        ("cache_salt", ""),
        ("cache_salt", 1),
        ("stop_token_ids", [True]),
        ("stop_token_ids", list(range(2000))),
        ("allowed_token_ids", []),
        ("allowed_token_ids", ["1"]),
        ("bad_words", "x"),
        ("bad_words", [" "]),
        ("bad_words", ["x" * 257]),
        ("banned_strings", 1),
        ("banned_strings", ["x", 1]),
        ("banned_strings", ["x"] * 1025),
        ("banned_strings", "x\ufffd"),
        ("bad_words", ["x", "\ufffd"]),
        ("banned_strings", ["x" * 256] * 65),
        ("banned_tokens", ["x"]),
        ("banned_tokens", "1;2"),
        ("banned_tokens", "-1"),
        ("banned_tokens", ",".join(["1"] * 1025)),
        ("custom_token_bans", [1.5]),
        ("logprob_token_ids", []),
        ("logprob_token_ids", [1]),  # without logprobs
        ("logprob_token_ids", list(range(2000))),
        ("samplers", ["top_k", "infill"]),
        ("samplers", "kp"),
        ("samplers", ["top_k"] * 33),
        ("repetition_detection", 4),
        ("repetition_detection", {"max_pattern_size": 4}),
        ("repetition_detection", {"max_pattern_size": 4, "min_count": 1}),
        ("repetition_detection", {"max_pattern_size": 4, "min_pattern_size": 5, "min_count": 2}),
        ("token_healing", 1),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("truncation_side", "middle"),
        ("dry_sequence_breakers", "\n"),
        ("dry_sequence_breakers", ["a" * 41]),
        ("dry_sequence_breakers", ["a"] * 33),
        ("dry_sequence_breakers", ["a" * 40] * 7),
        ("dry_penalty_last_n", -2),
        ("mirostat", 3),
        ("typical_p", 1.5),
    ],
)
def test_extensions_are_refused_by_name(name: str, value: Any) -> None:
    assert refused({name: value}).param == name


def test_each_reported_id_is_kept_once() -> None:
    assert parsed(logprobs=0, logprob_token_ids=[5, 1, 5]).logprob_token_ids == (5, 1)
    assert parsed(prompt_logprobs=1, logprob_token_ids=[5]).logprob_token_ids == (5,)


def test_a_prompt_with_a_suffix_is_not_truncated() -> None:
    assert refused({"truncate_prompt_tokens": 5, "suffix": "a"}).param == "truncate_prompt_tokens"


def parse_strictly(body: dict[str, Any]) -> CompletionRequest:
    return parse(json.dumps({"model": "m", "prompt": "a"} | body).encode(), STRICT)


@pytest.mark.parametrize("name", EXTENSIONS)
def test_strict_limits_refuse_extensions(name: str) -> None:
    with pytest.raises(RequestError, match=f"Unrecognized request argument supplied: {name}"):
        parse_strictly({name: None})


def test_strict_limits_are_those_of_openai() -> None:
    assert parse_strictly({"logprobs": 100}).logprobs == 5
    assert parse_strictly({"stop": ["a"] * 4}).stop == ("a",) * 4
    with pytest.raises(RequestError, match="maximum length 4, but got an array with length 5"):
        parse_strictly({"stop": ["a"] * 5})
    with pytest.raises(RequestError, match="you must provide a model parameter"):
        parse_strictly({"model": None, "foo": 1})
    with pytest.raises(RequestError, match=r"stream_options\.continuous_usage_stats"):
        parse_strictly({"stream": True, "stream_options": {"continuous_usage_stats": True}})


def test_ignored_unknown_fields_are_listed() -> None:
    lenient = RequestLimits(ignore_unknown=True)
    request = parse(b'{"prompt": "a", "foo": {"n": 5}, "top_k": 3, "bar": null}', lenient)
    assert (request.ignored, request.top_k) == (("foo", "bar"), 3)
    assert parse(b'{"model": "m", "top_k": 3}', replace(STRICT, ignore_unknown=True)).ignored == ("top_k",)


def test_files_are_objects_with_text_and_name() -> None:
    time = {"text": "a", "filename": None, "time": [1, 2]}  # llama.vim adds the time of its clock
    given = parsed(input_extra=[{"text": "a", "filename": "b.py"}, time])
    assert given.input_extra == (ContextFile("a", "b.py"), ContextFile("a", "tmp"))
    assert given.is_infill
    assert not parsed(input_extra=[]).is_infill


@pytest.mark.parametrize(
    ("value", "message", "param"),
    [
        ("a", "Invalid type for 'input_extra': expected an array of objects, but got a string instead.", "input_extra"),
        (
            ["a"],
            "Invalid type for 'input_extra[0]': expected an object, but got a string instead.",
            "input_extra[0]",
        ),
        (
            [{"text": "a"}, {}],
            "Invalid type for 'input_extra[1].text': expected a string, but got null instead.",
            "input_extra[1].text",
        ),
        ([{"text": "a", "name": "b"}], "Unknown parameter: 'input_extra[0].name'.", "input_extra[0].name"),
    ],
)
def test_malformed_files_are_refused_by_name(value: Any, message: str, param: str) -> None:
    assert error_fields(refused({"input_extra": value}))[:2] == (message, param)


def test_files_with_the_scores_of_an_echo_are_refused() -> None:
    error = refused({"input_extra": [{"text": "a"}], "echo": True, "logprobs": 1})
    assert (error.param, "these files" in error.message) == ("input_extra", True)


def test_tokens_that_may_be_taken_back_count_as_requested() -> None:
    body = {"prompt": [1, 2], "n": 3, "max_tokens": 5, "banned_strings": ["x"]}
    most = 2 + 3 * (5 + 4 * 5 + 8)
    parse(json.dumps(body).encode(), RequestLimits(max_request_tokens=most))
    assert refused(body, RequestLimits(max_request_tokens=most - 1)).param == "max_tokens"
    assert parse(json.dumps(body | {"banned_strings": []}).encode(), RequestLimits(max_request_tokens=17))


def test_ids_reported_by_position_count_once_for_each_prompt() -> None:
    lists = {"logprob_token_ids": [[5, 6], [], [7, 8, 9]]}
    body = {"prompt": ["a", "b", "c"], "max_tokens": 3, "logprobs": 0} | lists
    assert parse(json.dumps(body).encode(), RequestLimits(max_request_tokens=15))
    error = refused(body, RequestLimits(max_request_tokens=14))
    assert error.param == "logprob_token_ids"
    assert "15 ids" in error.message
