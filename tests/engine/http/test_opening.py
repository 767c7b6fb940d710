"""Tests of what is checked before the first request: the upstream's route, model, vocabulary, tokenizer and numbers."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
from scripted_upstream import (
    END,
    VOCABULARY,
    Behaviour,
    Exchange,
    ScriptedUpstream,
    answer,
    clamps,
    logprobs,
    sends,
    status,
    upstream_here,
    write_folder,
)

from afterword.completion.engine_limits import check_job
from afterword.engine.http.identity import find_identity
from afterword.engine.http.opening import open_model
from afterword.engine.http.upstream import Upstream
from afterword.engine.messages import LoadUpstream
from afterword.engine.protocol import Job, ModelInfo, Sampling
from afterword.errors import RequestError, SettingError

JOB = Job(prompt=(3, 4), samples=1, max_tokens=5, sampling=Sampling(), end_tokens=(END,), key=bytes(16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "toy")


def opened(folder: Path, upstream: dict[str, Any] | None = None, **settings: Any) -> ModelInfo:
    """The model info of a model on an upstream with these attributes."""

    async def main() -> ModelInfo:
        async with upstream_here() as script:
            for name, value in (upstream or {}).items():
                setattr(script, name, value)
            values = {"url": script.url, "sequences": 4, "alternatives": 20, "silence": 5.0, "patience": 5.0} | settings
            model = await open_model(LoadUpstream(str(folder), **values))
            await model.close()
            return model.model_info

    return asyncio.run(main())


def test_a_model_is_described_by_its_folder_and_the_upstream(folder):
    info = opened(folder)
    assert (info.context, info.sequences, len(info.pieces)) == (511, 4, VOCABULARY)
    assert (info.end_tokens, info.promise) == ((END,), "none")
    assert info.pieces[ord("a")] == b"a"
    assert opened(folder, context=100).context == 100


def test_the_fingerprint_is_that_of_the_upstreams_model(folder, tmp_path):
    fingerprint = opened(folder).fingerprint
    assert fingerprint.startswith("fp_")
    assert opened(folder, sequences=9).fingerprint == fingerprint
    assert opened(folder, {"max_logprobs": 5}).fingerprint == fingerprint
    others = [{"version": "0.33.0"}, {"models": ["other"]}, {"length": 256}]
    assert len({fingerprint, *(opened(folder, other).fingerprint for other in others)}) == 4
    changed = write_folder(tmp_path / "toy")
    (changed / "generation_config.json").write_text("{}")
    assert opened(changed).fingerprint != fingerprint


# ---- upstreams that cannot be used


async def echoes_processed(exchange: Exchange) -> None:
    """Report log probabilities after bias, as with vLLM's `--logprobs-mode processed_logprobs`."""
    choice = exchange.next_choice()
    (position,) = choice["logprobs"]["content"]
    if exchange.fields.get("logit_bias"):
        position |= {"logprob": 0.0, "top_logprobs": []}
    exchange.begin()
    await exchange.event({"choices": [choice]})
    await exchange.end()


async def reports_logits(exchange: Exchange) -> None:
    if not exchange.body["stream"]:
        await answer(exchange)
        return
    choice = exchange.next_choice()
    (position,) = choice["logprobs"]["content"]
    position["logprob"] -= 4.0
    exchange.begin()
    await exchange.event({"choices": [choice]})
    await exchange.end()


async def reports_positive_logits(exchange: Exchange) -> None:
    choice = exchange.next_choice()
    choice["logprobs"]["content"][0]["logprob"] = 3.0
    exchange.begin()
    await exchange.event({"choices": [choice]})
    await exchange.end()


async def ignores_bias(exchange: Exchange) -> None:
    exchange.fields.pop("logit_bias", None)
    await answer(exchange)


async def has_no_scores(exchange: Exchange) -> None:
    exchange.fields.pop("prompt_logprobs", None)
    await answer(exchange)


def body(data: bytes) -> Behaviour:
    """Answer with these bytes as a whole response."""

    async def behave(exchange: Exchange) -> None:
        exchange.send_whole(200, data)

    return behave


async def clamps_scores(exchange: Exchange) -> None:
    await (answer if exchange.body["stream"] else clamps(3))(exchange)


UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "no route": ({"has_route": False}, r"no route POST /inference/v1/generate .*--enable-scale-out"),
    "an old version": ({"version": "0.31.2"}, r"vLLM 0\.31\.2, but 0\.32 or later"),
    "several models": ({"models": ["a", "b"]}, r"serves 2 models \(a, b\).*not exactly one has the name toy"),
    "no model": ({"models": []}, "serves 0 models"),
    "a smaller vocabulary": ({"vocabulary": VOCABULARY - 1}, f"less than the {VOCABULARY} tokens"),
    "a larger vocabulary": ({"vocabulary": VOCABULARY + 1}, f"more than the {VOCABULARY} tokens"),
    "processed log probabilities": ({"answer": echoes_processed}, "not those of the unmodified model.*--logprobs-mode"),
    "logits": ({"answer": reports_logits}, "not log probabilities.*--logprobs-mode"),
    "positive logits": ({"answer": reports_positive_logits}, "no log probability.*--logprobs-mode"),
    "no bias": ({"answer": ignores_bias}, "ignores logit_bias"),
    "fewer alternatives for a prompt": ({"answer": clamps_scores}, "fewer alternatives for the tokens of a prompt"),
    "no scores": ({"answer": has_no_scores}, "prompt tokens have 0 scores"),
    "garbage": ({"answer": sends(b"<html>\n")}, "cannot be used: a line of the stream is no event.*<html>"),
    "errors": ({"answer": status(500)}, "cannot be used: status 500"),
    "models that are no JSON": ({"lists": body(b"[" * 100_000)}, "cannot be used: a response is no JSON"),
    "no length": ({"length": None}, "no max_model_len"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_upstream_that_cannot_be_used_is_refused_by_name(folder, case):
    upstream, message = UNUSABLE[case]
    with pytest.raises(SettingError, match=message):
        opened(folder, upstream)


def test_another_tokenizer_is_refused(folder, monkeypatch):
    original = ScriptedUpstream._exchange

    async def exchange(self: ScriptedUpstream, reader: Any, writer: Any) -> bool:
        class Writer:
            transport = writer.transport
            drain, is_closing = writer.drain, writer.is_closing

            def write(self, data: bytes) -> None:
                writer.write(data.replace(b'{"tokens": [84,', b'{"tokens": [85,'))

        return await original(self, reader, Writer())  # type: ignore[arg-type]

    monkeypatch.setattr(ScriptedUpstream, "_exchange", exchange)
    with pytest.raises(SettingError, match="other token ids for a text"):
        opened(folder)


def test_an_upstream_without_a_tokenizer_is_accepted(folder):
    assert opened(folder, {"tokenizes": False}).context == 511


def test_an_upstream_without_a_version_is_sent_no_wrong_token(folder):
    """Only vLLM is known to check ids; elsewhere a wrong one could end the server."""
    assert opened(folder, {"version": None, "vocabulary": VOCABULARY + 1}).context == 511


def test_an_upstream_that_is_not_there_is_refused(folder):
    with pytest.raises(SettingError, match=r"http://127\.0\.0\.1:1 cannot be used: Connect"):
        opened(folder, url="http://127.0.0.1:1")


def test_a_context_that_the_upstream_does_not_have_is_refused(folder):
    with pytest.raises(SettingError, match="--context 512: the upstream has at most 511"):
        opened(folder, context=512)


def test_one_of_several_models_is_found_by_the_name_of_the_folder(folder):
    assert opened(folder, {"models": ["other", "toy"]}).fingerprint

    async def main() -> str:
        async with upstream_here() as script:
            script.models = ["other", "big/toy"]
            client = Upstream(script.url, "", 1, 5.0)
            identity = await find_identity(client, "toy")
            await client.close()
            return identity.model

    assert asyncio.run(main()) == "big/toy"


def test_the_model_with_exactly_the_name_is_that_one():
    async def main() -> str:
        async with upstream_here() as script:
            script.models = ["big/toy", "toy"]
            client = Upstream(script.url, "", 1, 5.0)
            identity = await find_identity(client, "toy")
            await client.close()
            return identity.model

    assert asyncio.run(main()) == "toy"


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5://127.0.0.1:1"])
def test_proxies_of_the_environment_are_not_used(folder, monkeypatch, proxy):
    """The key and the prompts would go to the proxy."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    assert opened(folder).context == 511


def test_a_folder_without_a_size_of_the_vocabulary_is_refused(tmp_path):
    folder = write_folder(tmp_path / "toy")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": END}))
    with pytest.raises(SettingError, match="no vocab_size"):
        opened(folder)


# ---- what is refused at the request


@pytest.mark.parametrize(("most", "served"), [(21, 20), (40, 20), (20, 19), (5, 4), (2, 1), (1, 0), (0, 0)])
def test_the_number_of_alternatives_is_what_the_upstream_reports(folder, most, served, caplog):
    with caplog.at_level(logging.WARNING, logger="afterword"):
        info = opened(folder, {"max_logprobs": most})
    check_job(job(alternatives=served), info)
    if served == 20:
        assert not caplog.text
        return
    assert f"'logprobs' above {served} is refused. Start vLLM with --max-logprobs 21" in caplog.text
    with pytest.raises(RequestError, match=f"at most {served} with the engine") as caught:
        check_job(job(alternatives=served + 1), info)
    assert caught.value.param == "logprobs"
    check_job(job(prompt_alternatives=most), info)
    with pytest.raises(RequestError) as caught:
        check_job(job(prompt_alternatives=most + 2), info)
    assert caught.value.param == "prompt_logprobs"


def test_a_gateway_that_lists_fewer_alternatives_than_were_requested_is_noticed(folder, caplog):
    info = opened(folder, {"answer": clamps(5)})
    check_job(job(alternatives=4), info)
    with pytest.raises(RequestError, match="at most 4 with the engine"):
        check_job(job(alternatives=5), info)
    assert "'logprobs' above 4 is refused" in caplog.text


def test_min_tokens_is_refused_where_vllm_would_ban_eos_too(folder):
    info = opened(folder)
    check_job(job(min_tokens=2), info)
    check_job(job(min_tokens=2, end_tokens=(END, 5)), info)
    check_job(job(end_tokens=()), info)
    with pytest.raises(RequestError, match="'min_tokens' together with 'ignore_eos'") as caught:
        check_job(job(min_tokens=2, end_tokens=()), info)
    assert caught.value.param == "min_tokens"


def job(**changes: Any) -> Job:
    return msgspec.structs.replace(JOB, **changes)


def test_the_toy_model_has_log_probabilities():
    assert max(logprobs([1, 2])) < 0
