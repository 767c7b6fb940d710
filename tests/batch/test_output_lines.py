"""Output lines depend on the request and its answer, not on the run; replies state whether to retry."""

from __future__ import annotations

import asyncio
import io
import json

import pytest
from batch_rows import CREATED, LONGEST, bare, completion, wrapped
from starlette.types import Receive, Scope, Send

from afterword.api.in_process_client import in_process_client
from afterword.batch.http_client import classify_reply
from afterword.batch.input_lines import BatchRequest, read_lines, read_row
from afterword.batch.output_lines import ServerReply, batch_id, failure_line, success_line
from afterword.errors import BatchStopped


def row(line: bytes = wrapped("a", prompt="b")) -> BatchRequest:
    found = read_row(next(iter(read_lines(io.BytesIO(line), LONGEST))))
    assert isinstance(found, BatchRequest)
    return found


def test_an_output_line_has_openais_form():
    answer = success_line(row(), completion({}, id="x"), CREATED)
    line = json.loads(answer.text)
    assert list(line) == ["id", "custom_id", "response", "error"]
    assert (line["custom_id"], line["error"]) == ("a", None)
    assert list(line["response"]) == ["status_code", "request_id", "body"]
    assert (answer.is_success, answer.prompt, answer.completion) == (True, 3, 2)


def test_two_runs_write_the_same_bytes():
    one = completion({"p": 1}, created=1, id="x")
    other = completion({"p": 1}, created=2, id="y")
    assert success_line(row(), one, CREATED).text == success_line(row(), other, CREATED).text
    body = json.loads(success_line(row(), one, CREATED).text)["response"]["body"]
    assert body["created"] == CREATED
    assert "prompt_tokens_details" not in body["usage"]


def test_numbers_stay_as_the_server_wrote_them():
    reply = ServerReply(200, b'{"id":"","choices":[{"logprobs":[-1.0e-7,-0.30000000000000004,1E2]}]}')
    assert b"[-1.0e-7,-0.30000000000000004,1E2]" in success_line(row(), reply, CREATED).text


def test_an_error_stays_as_the_server_wrote_it():
    answer = success_line(row(), ServerReply(400, b'{"error":{"message":"no","id":"kept"}}'), CREATED)
    assert not answer.is_success
    assert json.loads(answer.text)["response"]["body"] == {"error": {"message": "no", "id": "kept"}}


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b"\xff"])
def test_an_answer_that_is_not_json_becomes_an_error(body):
    line = json.loads(success_line(row(), ServerReply(502, body), CREATED).text)
    assert line["response"]["status_code"] == 502
    assert "not JSON" in line["response"]["body"]["error"]["message"]


def test_a_request_without_answer_has_no_response():
    line = json.loads(failure_line(row(), "batch_expired", "Too late.").text)
    assert (line["response"], line["error"]["code"]) == (None, "batch_expired")


def test_ids_differ_between_lines_and_not_between_runs():
    ids = [json.loads(success_line(row(bare(prompt=prompt)), completion({}), CREATED).text) for prompt in "aba"]
    assert ids[0]["id"] == ids[2]["id"] != ids[1]["id"]
    assert ids[0]["id"] == batch_id(row(bare(prompt="a")).digest)
    assert ids[0]["response"]["request_id"] != ids[1]["response"]["request_id"]


@pytest.mark.parametrize(
    ("status", "headers", "retry", "attempted"),
    [
        (200, {}, False, False),
        (400, {}, False, False),
        (404, {}, False, False),
        (408, {}, True, False),
        (409, {}, True, False),
        (429, {}, True, False),
        (429, {"retry-after": "7"}, 7.0, False),
        (429, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, True, False),
        (429, {"retry-after": "9999"}, 120.0, False),
        (429, {"retry-after": "nan"}, True, False),
        (429, {"retry-after": "inf"}, 120.0, False),
        (429, {"x-should-retry": "false"}, False, False),
        (503, {}, True, False),
        (503, {"retry-after": "2"}, 2.0, False),
        (503, {"x-should-retry": "false"}, False, False),
        (500, {}, False, True),
        (502, {}, False, True),
        (500, {"x-should-retry": "false"}, False, False),
    ],
)
def test_status_and_headers_decide_whether_either_client_sends_a_request_again(status, headers, retry, attempted):
    body = b'{"error": {"message": "m", "code": null}}'

    async def app(_: Scope, __: Receive, send: Send) -> None:
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": encoded})
        await send({"type": "http.response.body", "body": body})

    expected = ServerReply(status, body, retry, attempted)
    assert classify_reply(status, body, headers) == expected
    assert asyncio.run(in_process_client(app)("POST", "/v1/completions", b"{}")) == expected


@pytest.mark.parametrize(
    ("status", "body"), [(401, b""), (403, b"no"), (429, b'{"error":{"code":"insufficient_quota","message":"Gone."}}')]
)
def test_a_refused_key_or_quota_stops_the_batch(status, body):
    with pytest.raises(BatchStopped):
        classify_reply(status, body, {})


@pytest.mark.parametrize("line_end", ["\u2028", "\u2029", "\x85"])
def test_an_output_line_has_no_other_line_ends(line_end):
    reply = ServerReply(200, json.dumps({"choices": [{"text": f"a{line_end}b"}]}, ensure_ascii=False).encode())
    for answer in (success_line(row(), reply, CREATED), failure_line(row(), "stopped", f"a{line_end}b")):
        assert len(answer.text.decode().splitlines()) == 1
        assert f"a\\u{ord(line_end):04x}b".encode() in answer.text
