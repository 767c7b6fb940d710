"""Libraries that people put between themselves and the API: what they hand on is what was served."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

if missing := [name for name in ("langchain_openai", "litellm", "llm") if find_spec(name) is None]:
    pytest.skip(f"{', '.join(missing)} not installed: make clients", allow_module_level=True)


# litellm builds a model of an answer that this API does not give.
pytestmark = pytest.mark.filterwarnings("ignore:Item 'summary' on TypedDict:UserWarning")

ASKED = {"max_tokens": 12, "temperature": 0.0, "seed": 7}
PROMPTS = ["Once upon a time", "The little cat", "def add(a, b):"]
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Nothing asks another machine for prices, settings or traces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        patch.setenv("LANGSMITH_TRACING", "false")
        yield


@pytest.fixture(scope="module")
def plain(http: httpx.Client) -> Any:
    """The answer to a request without any library."""

    def ask(prompt: str | list[str], **fields: Any) -> dict[str, Any]:
        answer = http.post("/v1/completions", json=ASKED | {"prompt": prompt} | fields)
        return answer.raise_for_status().json()

    return ask


class TestLiteLLM:
    @pytest.fixture
    def ask(self, server: Any) -> Any:
        litellm = importlib.import_module("litellm")

        def ask(prompt: Any, **fields: Any) -> Any:
            model, base = f"text-completion-openai/{server.model}", f"{server.url}/v1"
            return litellm.text_completion(prompt, model, api_base=base, api_key=server.key, **ASKED, **fields)

        return ask

    def test_text_logprobs_and_usage(self, ask: Any, plain: Any) -> None:
        ours, theirs = plain(PROMPTS[0], logprobs=2), ask(PROMPTS[0], logprobs=2)
        (choice,), (expected,) = theirs.choices, ours["choices"]
        assert (choice.text, choice.finish_reason) == (expected["text"], expected["finish_reason"])
        assert dict(choice.logprobs) == expected["logprobs"]
        assert [theirs.usage[name] for name in COUNTS] == [ours["usage"][name] for name in COUNTS]

    def test_stream(self, ask: Any, plain: Any) -> None:
        chunks = list(ask(PROMPTS[0], stream=True))
        assert "".join(chunk.choices[0].text or "" for chunk in chunks) == plain(PROMPTS[0])["choices"][0]["text"]

    def test_prompts_and_tokens(self, ask: Any, plain: Any) -> None:
        assert [choice.text for choice in ask(PROMPTS).choices] == [c["text"] for c in plain(PROMPTS)["choices"]]
        assert ask([11, 12, 13]).choices[0].text == plain([11, 12, 13])["choices"][0]["text"]


class TestLangChain:
    @pytest.fixture
    def model(self, server: Any) -> Any:
        made = importlib.import_module("langchain_openai").OpenAI
        return made(
            model=server.model, base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, logprobs=1, **ASKED
        )

    def test_invoke_and_batch(self, model: Any, plain: Any) -> None:
        texts = [choice["text"] for choice in plain(PROMPTS)["choices"]]
        assert model.invoke(PROMPTS[0]) == texts[0]
        assert model.batch(PROMPTS) == texts

    def test_stream(self, model: Any, plain: Any) -> None:
        pieces = list(model.stream(PROMPTS[0]))
        assert "".join(pieces) == plain(PROMPTS[0])["choices"][0]["text"]
        assert sum(map(bool, pieces)) > 1

    def test_answers_go_to_their_prompts_with_logprobs_and_usage(self, model: Any, plain: Any) -> None:
        sampled = {"n": 2, "temperature": 0.9}
        made, expected = model.generate(PROMPTS, **sampled), plain(PROMPTS, logprobs=1, **sampled)
        found = [(answer.text, answer.generation_info) for answers in made.generations for answer in answers]
        columns = ("finish_reason", "logprobs")
        assert found == [(c["text"], {name: c[name] for name in columns}) for c in expected["choices"]]
        assert made.llm_output["token_usage"] == {name: expected["usage"][name] for name in COUNTS}


class TestLLM:
    @pytest.fixture
    def model(self, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        about = {"model_id": "served", "model_name": server.model, "completion": True, "api_key_name": "served"}
        (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([about | {"api_base": f"{server.url}/v1"}]))
        (tmp_path / "keys.json").write_text(json.dumps({"served": server.key}))
        monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
        return importlib.import_module("llm").get_model("served")

    @pytest.mark.parametrize("stream", [True, False])
    def test_prompt(self, model: Any, plain: Any, stream: bool) -> None:
        expected = plain(PROMPTS[0])
        answer = model.prompt(PROMPTS[0], stream=stream, **ASKED)
        pieces = list(answer)
        assert "".join(pieces) == expected["choices"][0]["text"]
        assert (len(pieces) > 1) == stream
        assert answer.response_json["usage"] == expected["usage"]
