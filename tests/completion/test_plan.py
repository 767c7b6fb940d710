"""`make_plan`: the jobs of a request, and the errors that depend on the model."""

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from afterword.completion.infill import InfillRules
from afterword.completion.object_fields import ContextFile
from afterword.completion.plan import ClientIdentity, Plan, PromptPlan, check_candidates, check_lengths, make_plan
from afterword.completion.request import CompletionRequest
from afterword.completion.request_limits import RequestLimits
from afterword.completion.run import tokenize
from afterword.engine.protocol import InfillLayout, ModelInfo, Sampling
from afterword.errors import RequestError
from scripted_engine import BOS, EOS, INFILL, MID, MODEL_INFO, PIECES, PRE, SUF, ScriptedEngine, ids, text_script

WITH_BOS = replace(MODEL_INFO, bos=BOS, add_bos=True)
WITH_INFILL = replace(MODEL_INFO, infill=INFILL)
LAST = len(PIECES) - 1


def plan(model_info: ModelInfo = MODEL_INFO, entropy: int = 0, **fields: Any) -> Plan:
    request = CompletionRequest(**fields)
    tokens = asyncio.run(tokenize(request, ScriptedEngine(text_script(), model_info)))
    return make_plan(request, model_info, tokens, entropy)


def plan_one_prompt(model_info: ModelInfo = MODEL_INFO, **fields: Any) -> PromptPlan:
    (prompt,) = plan(model_info, **fields).prompts
    return prompt


def refused(model_info: ModelInfo = MODEL_INFO, **fields: Any) -> tuple[str, str | None, str | None]:
    with pytest.raises(RequestError) as caught:
        plan(model_info, **fields)
    assert caught.value.status == 400
    return caught.value.message, caught.value.param, caught.value.code


# ---- the tokens of the prompt


def test_a_text_is_read_as_its_tokens() -> None:
    prompt = plan_one_prompt(prompt=("Hello world",))
    assert (prompt.job.prompt, prompt.text, prompt.hidden_tokens, prompt.billed_tokens) == (
        ids("Hello world"),
        "Hello world",
        0,
        2,
    )


def test_token_ids_are_unchanged_and_echoed_as_their_text() -> None:
    given = (*ids(" cat"), EOS, 0xE2, 0x41)
    prompt = plan_one_prompt(prompt=(given,))
    assert (prompt.job.prompt, prompt.text, prompt.hidden_tokens, prompt.billed_tokens) == (
        given,
        " cat</s>\ufffdA",
        0,
        4,
    )


def test_text_that_spells_a_special_token_is_that_token() -> None:
    assert plan_one_prompt(prompt=("</s>Hello",)).job.prompt == (EOS, *ids("Hello"))


def test_bos_is_added_to_texts_and_hidden() -> None:
    prompt = plan_one_prompt(WITH_BOS, prompt=("Hello",))
    assert (prompt.job.prompt, prompt.text, prompt.hidden_tokens, prompt.billed_tokens) == (
        (BOS, *ids("Hello")),
        "Hello",
        1,
        1,
    )


@pytest.mark.parametrize("text", ["<s>Hello", "<s>", "<s><s>Hello", "<s> Hello</s>"])
def test_a_text_that_begins_with_the_bos_gets_no_second_one(text: str) -> None:
    """The client sent the BOS, so it is echoed and billed."""
    prompt = plan_one_prompt(WITH_BOS, prompt=(text,))
    assert (prompt.job.prompt, prompt.text, prompt.hidden_tokens, prompt.billed_tokens) == (
        ids(text),
        text,
        0,
        len(ids(text)),
    )


def test_bos_is_added_only_to_prompts_without_it() -> None:
    prompts = plan(WITH_BOS, prompt=("<s>Hello", "Hello", "Hello<s>", "")).prompts
    hello = ids("Hello")
    assert [prompt.job.prompt for prompt in prompts] == [(BOS, *hello), (BOS, *hello), (BOS, *hello, BOS), (BOS,)]
    assert [prompt.billed_tokens for prompt in prompts] == [2, 1, 2, 0]


def test_without_add_bos_a_text_is_unchanged() -> None:
    model_info = replace(MODEL_INFO, bos=BOS)
    assert plan_one_prompt(model_info, prompt=("<s><s>",)).job.prompt == (BOS, BOS)
    assert plan_one_prompt(model_info, prompt=("a",)).job.prompt == ids("a")


@pytest.mark.parametrize(
    ("add_special_tokens", "text_gets_it", "ids_get_it"),
    [(None, True, False), (True, True, True), (False, False, False)],
)
def test_a_bos_is_added_to_token_ids_only_on_request(
    add_special_tokens: bool | None, text_gets_it: bool, ids_get_it: bool
) -> None:
    hello = ids("Hello")
    prompts = plan(
        WITH_BOS,
        prompt=("Hello", hello, (BOS, *hello), "<s>Hello", (BOS, BOS, *hello)),
        add_special_tokens=add_special_tokens,
    ).prompts
    assert [prompt.job.prompt for prompt in prompts] == [
        (BOS, *hello) if text_gets_it else hello,
        (BOS, *hello) if ids_get_it else hello,
        (BOS, *hello),
        (BOS, *hello),
        (BOS, BOS, *hello),
    ]
    assert [prompt.hidden_tokens for prompt in prompts] == [int(text_gets_it), int(ids_get_it), 0, 0, 0]
    assert [prompt.billed_tokens for prompt in prompts] == [1, 1, 2, 2, 3]
    assert [prompt.text for prompt in prompts] == ["Hello", "Hello", "<s>Hello", "<s>Hello", "<s><s>Hello"]


def test_a_model_that_wants_no_bos_gets_none_before_token_ids() -> None:
    for model_info in (MODEL_INFO, replace(MODEL_INFO, bos=BOS)):
        prompt = plan_one_prompt(model_info, prompt=(ids("Hello"),), add_special_tokens=True)
        assert (prompt.job.prompt, prompt.hidden_tokens) == (ids("Hello"), 0)


def test_a_bos_before_token_ids_counts_towards_the_context() -> None:
    model_info = replace(WITH_BOS, context=4)
    full = (ids("Hello") * 3,)
    assert plan_one_prompt(model_info, prompt=full, max_tokens=1).job.prompt == full[0]
    message, _, _ = refused(model_info, add_special_tokens=True, prompt=full, max_tokens=1)
    assert "you requested 5 tokens (4 in your prompt; 1 for the completion)" in message


def test_a_bos_before_token_ids_precedes_the_layout_of_an_infill_prompt() -> None:
    model_info = replace(WITH_BOS, infill=INFILL)
    prompt = plan_one_prompt(model_info, prompt=(ids("Hello"),), suffix="!", add_special_tokens=True)
    assert prompt.job.prompt == (BOS, PRE, *ids("Hello"), SUF, *ids("!"), MID)
    assert (prompt.hidden_tokens, prompt.billed_tokens) == (2, 2)


@pytest.mark.parametrize("given", [None, ""])
@pytest.mark.parametrize(
    ("model_info", "start"),
    [(MODEL_INFO, EOS), (WITH_BOS, BOS), (replace(MODEL_INFO, bos=BOS), BOS), (replace(WITH_BOS, eos=None), BOS)],
)
def test_an_empty_prompt_starts_a_document_and_bills_no_token(
    given: str | None, model_info: ModelInfo, start: int
) -> None:
    prompt = plan_one_prompt(model_info, prompt=(given,))
    assert (prompt.job.prompt, prompt.text, prompt.hidden_tokens, prompt.billed_tokens) == ((start,), "", 1, 0)


def test_without_bos_and_eos_an_empty_prompt_is_refused() -> None:
    message, param, _ = refused(replace(MODEL_INFO, eos=None), prompt=("",))
    assert (message.startswith("The prompt cannot be empty: "), param) == (True, "prompt")


def test_prompts_of_different_forms_keep_their_order() -> None:
    prompts = plan(prompt=("Hello", ids(" cat sat"), None)).prompts
    assert [prompt.job.prompt for prompt in prompts] == [ids("Hello"), ids(" cat sat"), (EOS,)]


# ---- suffix


def test_a_suffix_is_laid_out_with_infill_tokens() -> None:
    prompt = plan_one_prompt(WITH_INFILL, prompt=("Hello",), suffix=" sat the")
    assert prompt.job.prompt == (PRE, *ids("Hello"), SUF, *ids(" sat the"), MID)
    assert (prompt.text, prompt.billed_tokens) == ("Hello", 3)


def test_a_suffix_can_come_first_and_without_a_token_for_the_middle() -> None:
    layout = InfillLayout("codestral", (SUF, "suffix", PRE, "prefix"))
    prompt = plan_one_prompt(replace(WITH_BOS, infill=layout), prompt=("Hello",), suffix=" sat the")
    assert prompt.job.prompt == (BOS, SUF, *ids(" sat the"), PRE, *ids("Hello"))
    assert (prompt.text, prompt.hidden_tokens, prompt.billed_tokens) == ("Hello", 5, 3)


def test_a_suffix_works_with_bos_with_token_ids_and_with_several_prompts() -> None:
    prompts = plan(replace(WITH_BOS, infill=INFILL), prompt=("Hello", None), suffix="!").prompts
    assert [prompt.job.prompt for prompt in prompts] == [
        (BOS, PRE, *ids("Hello"), SUF, *ids("!"), MID),
        (BOS, PRE, SUF, *ids("!"), MID),
    ]
    (prompt,) = plan(replace(WITH_BOS, infill=INFILL), prompt=("<s>Hello",), suffix="!").prompts
    assert prompt.job.prompt == (BOS, PRE, *ids("Hello"), SUF, *ids("!"), MID), "the BOS of the client is at the start"
    assert plan_one_prompt(WITH_INFILL, prompt=((5, 6),), suffix="!").job.prompt == (PRE, 5, 6, SUF, *ids("!"), MID)


def test_a_suffix_is_refused_without_infill_tokens() -> None:
    message, param, _ = refused(prompt=("Hello",), suffix="!")
    assert (message.startswith("Unrecognized request argument supplied: suffix"), param) == (True, "suffix")


def test_an_empty_suffix_is_as_if_absent() -> None:
    assert plan_one_prompt(prompt=("Hello",), suffix="") == plan_one_prompt(prompt=("Hello",))


# ---- errors


def too_long(prompt: int, completion: int) -> tuple[str, None, None]:
    return (
        f"This model's maximum context length is 64 tokens, however you requested {prompt + completion} tokens "
        f"({prompt} in your prompt; {completion} for the completion). Please reduce your prompt; or completion length.",
        None,
        None,
    )


def test_prompt_and_completion_together_must_fit_the_context() -> None:
    assert plan_one_prompt(prompt=(" the" * 48,)).job.max_tokens == 16
    assert refused(prompt=(" the" * 49,)) == too_long(49, 16)
    assert refused(prompt=("a",), max_tokens=64) == too_long(1, 64)


def test_tokens_that_the_server_adds_count_against_the_context() -> None:
    assert plan_one_prompt(WITH_BOS, prompt=(" the" * 47,)).hidden_tokens == 1
    assert refused(WITH_BOS, prompt=(" the" * 48,)) == too_long(49, 16)


def test_the_error_reports_the_first_prompt_that_is_too_long() -> None:
    assert refused(prompt=("a", "b" * 50, "c" * 60)) == too_long(50, 16)


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    class NoTokenizer(ScriptedEngine):
        async def tokenize(self, text: str, special: bool, client: str = "") -> tuple[int, ...]:
            raise AssertionError

    for fields in ({"prompt": ("x" * 10_000,)}, {"prompt": ("a",), "suffix": "x" * 10_000}):
        with pytest.raises(RequestError, match="maximum context length is 64 tokens"):
            asyncio.run(tokenize(CompletionRequest(**fields), NoTokenizer(text_script())))


def test_texts_that_all_prompts_share_are_measured_once() -> None:
    class Text(str):
        measured = 0

        def encode(self, *_: str) -> bytes:
            Text.measured += 1
            return b"x"

    request = CompletionRequest(prompt=("a",) * 9, suffix="b", input_extra=(ContextFile(Text("x")),) * 2)
    check_lengths(request, MODEL_INFO)
    assert Text.measured == 2


def test_without_longest_token_a_long_text_is_tokenized() -> None:
    request = CompletionRequest(prompt=("x" * 10_000,))
    tokens = asyncio.run(
        tokenize(request, ScriptedEngine(text_script(), replace(MODEL_INFO, longest_token=0, context=10_000)))
    )
    assert len(tokens.prompts[0]) == 10_000


@pytest.mark.parametrize("token", [-1, LAST + 1, 10**18])
def test_ids_of_a_prompt_must_be_in_the_vocabulary(token: int) -> None:
    message = f"Invalid token in prompt: {token}. Minimum value is 0, maximum value is {LAST} (inclusive)."
    assert refused(prompt=((1,), (0, token))) == (message, None, None)
    assert plan_one_prompt(prompt=((0, LAST),)).job.prompt == (0, LAST)


def test_ids_of_a_bias_must_be_in_the_vocabulary() -> None:
    message = f"Invalid key in 'logit_bias': {LAST + 1}. Maximum value is {LAST}."
    assert refused(prompt=("a",), logit_bias=((LAST + 1, 1.0),)) == (message, "logit_bias", None)
    assert plan_one_prompt(prompt=("a",), logit_bias=((LAST, 1.0),)).job.sampling.logit_bias == ((LAST, 1.0),)


# ---- the fields of a job


def test_a_job_has_the_sampling_parameters_and_end_tokens() -> None:
    job = plan_one_prompt(
        prompt=("a",),
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        logit_bias=((7, -100.0),),
    ).job
    assert job.sampling == Sampling(
        temperature=0.5, top_p=0.9, presence_penalty=1.0, frequency_penalty=-1.0, logit_bias=((7, -100.0),)
    )
    assert (job.max_tokens, job.end_tokens) == (5, (EOS,))


def test_extensions_change_the_job() -> None:
    job = plan_one_prompt(
        prompt=("a",), top_k=5, min_p=0.1, repetition_penalty=1.2, min_tokens=3, stop_token_ids=(7,)
    ).job
    assert job.sampling == Sampling(top_k=5, min_p=0.1, repetition_penalty=1.2)
    assert (job.min_tokens, job.end_tokens) == (3, (EOS, 7))
    assert plan_one_prompt(prompt=("a",), ignore_eos=True, stop_token_ids=(7,)).job.end_tokens == (7,)


def test_stop_token_ids_must_be_in_the_vocabulary() -> None:
    with pytest.raises(RequestError, match="stop_token_ids") as refusal:
        plan_one_prompt(prompt=("a",), stop_token_ids=(len(MODEL_INFO.pieces),))
    assert refusal.value.param == "stop_token_ids"


def test_add_special_tokens_false_adds_no_bos() -> None:
    with_bos = replace(MODEL_INFO, bos=BOS, add_bos=True)
    assert plan_one_prompt(with_bos, prompt=("a",)).job.prompt == (BOS, *ids("a"))
    assert plan_one_prompt(with_bos, prompt=("a",), add_special_tokens=False).job.prompt == ids("a")


@pytest.mark.parametrize(
    ("fields", "samples"), [({}, 1), ({"n": 3}, 3), ({"best_of": 4}, 4), ({"n": 2, "best_of": 2}, 2)]
)
def test_a_job_has_as_many_samples_as_there_are_candidates(fields: dict[str, Any], samples: int) -> None:
    assert plan_one_prompt(prompt=("a",), **fields).job.samples == samples


@pytest.mark.parametrize(
    ("fields", "alternatives", "of_the_prompt"),
    [
        ({}, None, None),
        ({"echo": True}, None, None),
        ({"logprobs": 0}, 0, None),
        ({"logprobs": 3}, 3, None),
        ({"logprobs": 0, "echo": True}, 0, 0),
        ({"prompt_logprobs": 2}, None, 2),
        ({"prompt_logprobs": 2, "logprobs": 4, "echo": True}, 4, 4),
        ({"n": 2}, None, None),
        ({"best_of": 2}, 0, None),  # candidates are ranked by log probability
        ({"best_of": 2, "logprobs": 2}, 2, None),
    ],
)
def test_jobs_request_log_probabilities_only_where_needed(
    fields: dict[str, Any], alternatives: int | None, of_the_prompt: int | None
) -> None:
    job = plan_one_prompt(prompt=("a",), **fields).job
    assert (job.alternatives, job.prompt_alternatives) == (alternatives, of_the_prompt)


# ---- randomness


def keys(**fields: Any) -> list[bytes]:
    return [prompt.job.key for prompt in plan(**fields).prompts]


def test_equal_seeds_give_equal_keys_with_any_entropy() -> None:
    assert keys(prompt=("a", "b"), seed=7, entropy=1) == keys(prompt=("c", "d"), seed=7, entropy=2)


def test_every_prompt_and_every_seed_has_a_different_key() -> None:
    seeds = (0, 1, 11, -1, 2**63 - 1, -(2**63))
    found = [key for seed in seeds for key in keys(prompt=("a",) * 12, seed=seed)]
    assert len(set(found)) == len(found) == 72
    assert {len(key) for key in found} == {16}


def test_without_a_seed_the_key_depends_on_entropy() -> None:
    assert keys(prompt=("a",), entropy=1) != keys(prompt=("a",), entropy=2)
    assert keys(prompt=("a",), entropy=1) == keys(prompt=("a",), entropy=1)


# ---- charges and clients


def test_most_tokens_counts_every_sample_of_every_prompt() -> None:
    assert (
        plan(prompt=("a", "the cat"), n=2, best_of=3, max_tokens=5).max_total_tokens
        == 1 + len(ids("the cat")) + 2 * 3 * 5
    )
    assert plan(prompt=("a",), max_tokens=0, echo=True, logprobs=0).max_total_tokens == 1


@pytest.mark.parametrize("name", ["banned_strings", "bad_words"])
def test_tokens_that_may_be_taken_back_are_reserved(name: str) -> None:
    most = plan(prompt=("a", "b"), n=3, max_tokens=5, **{name: ("x",)})
    assert most.max_total_tokens == 2 + 2 * 3 * (5 + 4 * 5 + 8)
    check_candidates(most, RequestLimits(max_request_tokens=198))
    with pytest.raises(RequestError):
        check_candidates(most, RequestLimits(max_request_tokens=197))
    assert plan(prompt=("a",), max_tokens=0, echo=True, logprobs=0, **{name: ("x",)}).max_total_tokens == 1


def test_the_bytes_of_the_prompt_that_a_banned_text_can_begin_with_are_those_of_the_echo() -> None:
    def begun(*prompt: int, echo: bool = True) -> bytes:
        found = plan_one_prompt(prompt=(prompt,), echo=echo, max_tokens=1, banned_strings=("x",)).job.banned_text
        assert found is not None
        return found.begun

    assert begun(*b"a\xf0\x9f") == b"\xf0\x9f"
    assert begun(*b"a\xf0\x9f", echo=False) == b""
    assert begun(*b"a\xa9") == begun(*"aé\ufffd".encode()) == begun(97) == b""


def test_clients_share_a_namespace_only_with_shares_cache_and_equal_salt() -> None:
    def namespace(name: str, shares: bool, salt: str | None = None) -> str:
        request = CompletionRequest(prompt=("a",), cache_salt=salt)
        tokens = asyncio.run(tokenize(request, ScriptedEngine(text_script())))
        (prompt,) = make_plan(request, MODEL_INFO, tokens, 0, ClientIdentity(name, shares)).prompts
        assert prompt.job.client == name, "shares are per client in any case"
        return prompt.job.namespace

    assert namespace("alice", False) == namespace("alice", False) != namespace("bob", False)
    assert namespace("alice", True) == namespace("bob", True) == namespace("", False)
    assert namespace("alice", True, "salt") != namespace("alice", True)
    assert namespace("alice", False, "salt") != namespace("bob", False, "salt")


def test_two_keys_with_one_name_have_different_namespaces() -> None:
    """Prefixes can survive a restart, and after it another key can have the same number."""

    def namespace(cache_name: str, shares: bool = False) -> str:
        tokens = asyncio.run(tokenize(CompletionRequest(prompt=("a",)), ScriptedEngine(text_script())))
        identity = ClientIdentity("given-1", shares, cache_name=cache_name)
        return make_plan(CompletionRequest(prompt=("a",)), MODEL_INFO, tokens, 0, identity).prompts[0].job.namespace

    assert namespace("one") == namespace("one") != namespace("two")
    assert namespace("one", shares=True) == namespace("two", shares=True)


# ---- other files


FILES = InfillLayout(
    "qwen", INFILL.parts, with_files=(1, "files", 2, 3, *INFILL.parts), file=(2, "file"), ends=(PRE, SUF, MID, 2)
)
WITH_FILES = replace(MODEL_INFO, infill=FILES)
CAT, MAT = ContextFile(" cat sat", "a.py"), ContextFile(" world")


def test_files_come_before_the_prompt_with_their_names() -> None:
    prompt = plan_one_prompt(WITH_FILES, prompt=("Hello",), suffix="!", input_extra=(CAT, MAT))
    files = (2, *ids("a.py\n cat sat"), 2, *ids("tmp\n world"))
    assert prompt.job.prompt == (1, *files, 2, 3, PRE, *ids("Hello"), SUF, *ids("!"), MID)
    sent = [token for start, stop in prompt.given for token in prompt.job.prompt[start:stop]]
    assert sent == [*ids("a.py\n cat sat"), *ids("tmp\n world"), *ids("Hello"), *ids("!")]
    assert prompt.billed_tokens == len(sent)
    assert prompt.billed_within(3) == 1
    assert (prompt.text, prompt.job.prompt[prompt.hidden_tokens]) == ("Hello", ids("Hello")[0])


def test_files_without_a_suffix_are_laid_out_with_an_empty_one() -> None:
    prompt = plan_one_prompt(WITH_FILES, prompt=("Hello",), input_extra=(MAT,))
    assert prompt.job.prompt[-4:] == (PRE, *ids("Hello"), SUF, MID)


def test_a_special_token_in_a_file_is_plain_text() -> None:
    prompt = plan_one_prompt(WITH_FILES, prompt=("",), suffix="!", input_extra=(ContextFile("<mid>"),))
    assert prompt.job.prompt.count(MID) == 1


def test_a_middle_ends_before_the_tokens_of_the_layout() -> None:
    assert plan_one_prompt(WITH_FILES, prompt=("a",), suffix="!").job.end_tokens == (EOS, PRE, SUF, MID, 2)
    assert plan_one_prompt(WITH_FILES, prompt=("a",), suffix="!", ignore_eos=True).job.end_tokens == ()
    assert plan_one_prompt(WITH_FILES, prompt=("a",)).job.end_tokens == (EOS,)


def test_files_are_refused_by_name_for_models_without_separators() -> None:
    for model_info in (WITH_INFILL, MODEL_INFO):
        message, param, _ = refused(model_info, prompt=("Hello",), input_extra=(CAT,))
        assert (message.startswith("Unrecognized request argument supplied: input_extra"), param) == (
            True,
            "input_extra",
        )


def test_files_that_do_not_fit_into_the_context_are_refused() -> None:
    many = tuple(ContextFile("") for _ in range(100))
    for files in ((ContextFile("x" * 70),), many, (ContextFile("x" * 10_000),)):
        message, _, _ = refused(WITH_FILES, prompt=("a",), suffix="!", input_extra=files)
        assert "maximum context length is 64 tokens" in message


# ---- when tokens are needed


@pytest.mark.parametrize("ends_texts", [False, True])
def test_an_infill_that_ends_by_its_own_rules_needs_each_token_at_once(ends_texts: bool) -> None:
    rules = InfillRules(always=True, ends_texts=ends_texts)
    request = CompletionRequest(prompt=("Hello",))
    tokens = asyncio.run(tokenize(request, ScriptedEngine(text_script(), WITH_INFILL), False, rules=rules))
    assert make_plan(request, WITH_INFILL, tokens, 0).prompts[0].job.whole is not ends_texts


@pytest.mark.parametrize(
    ("fields", "whole"),
    [({}, True), ({"stream": True}, False), ({"stop": ("x",)}, False), ({"n": 2, "best_of": 3}, True)],
)
def test_an_engine_may_report_tokens_together_if_nothing_reads_them_before_the_end(
    fields: dict[str, Any], whole: bool
) -> None:
    assert plan_one_prompt(prompt=("Hello",), **fields).job.whole is whole
