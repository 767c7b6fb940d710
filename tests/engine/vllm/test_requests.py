"""Tests of what is sent to vLLM for a job, and of what its outputs become."""

from __future__ import annotations

import msgspec
import pytest

from afterword.completion.engine_limits import check_job
from afterword.engine.protocol import (
    BannedText,
    Grammar,
    Job,
    ModelInfo,
    RepetitionDetection,
    SamplerChain,
    Sampling,
    Token,
)
from afterword.engine.token_row import ReportedAt
from afterword.engine.vllm.requests import (
    LIMITS,
    MERGED_TOKENS,
    PromptScore,
    SampleOutput,
    generated_tokens,
    sample_request,
    scored_tokens,
    seed_of,
)
from afterword.errors import RequestError

KEY = bytes(16)
JOB = Job(prompt=(3, 4), samples=2, max_tokens=5, sampling=Sampling(), end_tokens=(7,), key=KEY)
INFO = ModelInfo(0, 64, 2, (b"a",) * 10, (), None, None, False, False, 1, None, "fp", job_limits=LIMITS)


def fields(sample: int = 0, sampling: Sampling = JOB.sampling, **job: object) -> dict[str, object]:
    changed = msgspec.structs.replace(JOB, sampling=sampling, **job)
    return dict(sample_request(1, changed, sample, 10).fields)


@pytest.mark.parametrize(
    ("job", "only_ids"), [({}, True), ({"whole": True}, False), ({"alternatives": 0}, False)], ids=str
)
def test_only_ids_are_read_where_each_token_is_reported_without_log_probabilities(job, only_ids):
    assert sample_request(1, msgspec.structs.replace(JOB, **job), 1, 10).reads_only_ids == only_ids


def test_scores_of_the_prompt_are_read():
    job = msgspec.structs.replace(JOB, prompt_alternatives=0)
    assert [sample_request(1, job, sample, 10).reads_only_ids for sample in (0, 1)] == [False, True]


def test_every_field_of_sampling_is_sent():
    sampling = Sampling(0.5, 0.9, 40, 0.1, 1.5, -1.0, 1.2, ((3, 2.0), (4, -100.0)))
    sent = fields(sampling=sampling)
    for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"):
        assert sent[name] == getattr(sampling, name)
    assert sent["repetition_penalty"] == 1.2
    assert sent["logit_bias"] == {3: 2.0, 4: -100.0}


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0, top_k=5), Sampling(top_p=0.0, min_p=0.5)])
def test_a_greedy_sample_is_sent_as_temperature_0_without_filters(sampling):
    """vLLM refuses `top_p` 0. Bias and penalties still change which token is the most likely one."""
    sent = fields(sampling=msgspec.structs.replace(sampling, presence_penalty=1.0))
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["min_p"], sent["seed"]) == (0.0, 1.0, 0, 0.0, None)
    assert sent["presence_penalty"] == 1.0


def test_tokens_of_a_whole_response_are_reported_together():
    assert fields(whole=True)["stream_interval"] == MERGED_TOKENS > 1
    assert "stream_interval" not in fields(), "a stream needs each token at once"


def test_a_job_without_tokens_is_sent_with_one():
    sent = fields(max_tokens=0, prompt_alternatives=2)
    assert (sent["max_tokens"], sent["prompt_logprobs"]) == (1, 2)


def test_the_end_tokens_are_those_of_the_job_only():
    assert fields()["stop_token_ids"] == [7]
    assert fields(end_tokens=())["stop_token_ids"] == []
    assert fields()["ignore_eos"] is True


def test_only_the_first_sample_brings_the_scores_of_the_prompt():
    assert fields(0, prompt_alternatives=3)["prompt_logprobs"] == 3
    assert fields(1, prompt_alternatives=3)["prompt_logprobs"] is None


def test_alternatives_are_limited_to_the_vocabulary():
    sent = fields(alternatives=50, prompt_alternatives=50)
    assert (sent["logprobs"], sent["prompt_logprobs"]) == (10, 10)
    assert fields()["logprobs"] is None


def test_each_sample_has_its_own_seed_that_can_be_sent():
    seeds = {seed_of(key, sample) for key in (KEY, b"x" * 16) for sample in range(50)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert fields(1)["seed"] == seed_of(KEY, 1)


def test_a_namespace_is_the_cache_salt():
    assert sample_request(1, msgspec.structs.replace(JOB, namespace="key"), 0, 10).cache_salt == "key"


def test_equal_alternatives_are_in_order_of_their_ids():
    job = msgspec.structs.replace(JOB, alternatives=2)
    output = SampleOutput((8,), (((8, -3.0), (5, -1.0), (2, -1.0)),))
    assert generated_tokens(job, output) == [Token(8, -3.0, ((2, -1.0), (5, -1.0)))]


def test_tokens_without_log_probabilities():
    assert generated_tokens(JOB, SampleOutput((8, 9))) == [Token(8), Token(9)]


def test_the_rank_of_a_prompt_token_does_not_count_equal_ones():
    """vLLM's rank counts the tokens that are at least as likely."""
    job = msgspec.structs.replace(JOB, prompt_alternatives=3)
    equal = PromptScore(5, 3, ((5, -1.0), (2, -1.0), (9, -0.5), (4, -8.0)))
    rare = PromptScore(4, 70, ((4, -8.0), (9, -0.5), (2, -1.0), (5, -1.0)))
    assert [token.rank for token in scored_tokens(job, [equal, rare])] == [2, 70]
    assert scored_tokens(job, [rare])[0].top == ((9, -0.5), (2, -1.0), (5, -1.0))


# ---- what the engine does not compute


def test_jobs_that_vllm_computes_are_accepted():
    sampling = Sampling(0.5, 0.9, 40, 0.1, 1.5, -1.0, 1.2, ((3, 2.0),))
    job = msgspec.structs.replace(JOB, sampling=sampling, min_tokens=2, alternatives=5, prediction=(1,), client="a")
    check_job(job, INFO)


@pytest.mark.parametrize("temperature", [0.001, 0.0099, 2.5])
def test_temperatures_that_vllm_would_change_are_refused(temperature):
    job = msgspec.structs.replace(JOB, sampling=Sampling(temperature=temperature))
    with pytest.raises(RequestError, match=r"0 or from 0\.01 to 2") as caught:
        check_job(job, INFO)
    assert caught.value.param == "temperature"


@pytest.mark.parametrize("temperature", [0.0, 0.01, 2.0])
def test_temperatures_that_vllm_samples_with_are_accepted(temperature):
    check_job(msgspec.structs.replace(JOB, sampling=Sampling(temperature=temperature)), INFO)


def test_a_field_that_the_engine_does_not_know_is_refused_by_name():
    limits = msgspec.structs.replace(LIMITS, fields=tuple(name for name in LIMITS.fields if name != "min_p"))
    info = msgspec.structs.replace(INFO, job_limits=limits)
    check_job(JOB, info)
    with pytest.raises(RequestError, match="'min_p' is not supported") as caught:
        check_job(msgspec.structs.replace(JOB, sampling=Sampling(min_p=0.5)), info)
    assert caught.value.param == "min_p"


ORDER = ("temperature", "top_k")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"grammar": Grammar("json", "{}", "response_format.json_schema.schema")}, "response_format"),
        ({"reported": (1, 2)}, "logprob_token_ids"),
        ({"reported_at": ReportedAt((), ((1,),))}, "logprob_token_ids"),
        ({"processed": True}, "logprobs_mode"),
        ({"banned": (1, 2)}, "banned_tokens"),
        ({"repetition_detection": RepetitionDetection(4, 1, 2)}, "repetition_detection"),
        ({"priority": 1}, "priority"),
        ({"healed": b"a", "first": b"1234"}, "token_healing"),
        ({"banned_text": BannedText(folded=("a",))}, "banned_strings"),
        ({"banned_text": BannedText(exact=("a",))}, "bad_words"),
        ({"sampling": Sampling(chain=SamplerChain(ORDER))}, "samplers"),
        ({"sampling": Sampling(chain=SamplerChain(ORDER, allowed=b"1"))}, "allowed_token_ids"),
        ({"sampling": Sampling(chain=SamplerChain(ORDER, mirostat=2))}, "mirostat"),
        ({"sampling": Sampling(chain=SamplerChain(ORDER, xtc_probability=0.5))}, "xtc_probability"),
    ],
)
def test_a_refusal_names_the_field_of_the_request(fields, expected):
    with pytest.raises(RequestError, match=f"'{expected}' is not supported") as caught:
        check_job(msgspec.structs.replace(JOB, **fields), INFO)
    assert caught.value.param == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"alternatives": 1001}, "logprobs"), ({"prompt_alternatives": 1001}, "prompt_logprobs")],
)
def test_whole_vocabularies_are_refused_by_name(fields, expected):
    check_job(msgspec.structs.replace(JOB, **dict.fromkeys(fields, 1000)), INFO)
    with pytest.raises(RequestError, match=f"'{expected}' must be at most 1000") as caught:
        check_job(msgspec.structs.replace(JOB, **fields), INFO)
    assert caught.value.param == expected


def test_banned_texts_are_refused_where_tokens_cannot_be_taken_back():
    job = msgspec.structs.replace(JOB, banned_text=BannedText(exact=("a",)))
    info = msgspec.structs.replace(INFO, job_limits=None)
    check_job(job, info)
    with pytest.raises(RequestError, match="recurrent") as caught:
        check_job(job, msgspec.structs.replace(info, takes_back=False))
    assert caught.value.param == "bad_words"


def test_an_engine_without_limits_computes_everything():
    job = msgspec.structs.replace(JOB, sampling=Sampling(temperature=0.001))
    check_job(job, msgspec.structs.replace(INFO, job_limits=None))
