"""What clients see when a worker, a replica or an application is replaced, and that no process is left."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import pytest
from ray_cluster import (
    PYTHON,
    SECONDS,
    Cluster,
    environment,
    living,
    stream,
    streamed,
    wait_until,
    workers,
)

CLIENTS, REQUESTS = 8, 500


@dataclass(slots=True)
class Load:
    """Short requests of several clients, each with its own seed: what was answered."""

    cluster: Cluster
    lines_before: int
    answers: dict[int, tuple[int, str]] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    answered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def body(self, seed: int) -> dict[str, object]:
        prompt = f"Once there were {seed % 40}"
        return {"model": "afterword-tiny", "prompt": prompt, "max_tokens": 8, "seed": seed}

    def send(self, seed: int) -> None:
        with self.cluster.http() as http:
            try:
                response = http.post("/v1/completions", json=self.body(seed))
                text = response.json()["choices"][0]["text"] if response.status_code == 200 else response.text
                self.answers[seed] = (response.status_code, text)
                self.ids.append(response.headers.get("x-request-id", ""))
            except httpx.TransportError as problem:
                self.broken[seed] = repr(problem)
        self.answered.release()

    def run(self, during: Callable[[], None]) -> None:
        """Send all requests; call `during` when a tenth of them is answered, and not before the others can go on."""
        with ThreadPoolExecutor(CLIENTS) as clients:
            sent = [clients.submit(self.send, seed) for seed in range(REQUESTS)]
            for _ in range(REQUESTS // 10):
                self.answered.acquire(timeout=SECONDS)
            during()
            for each in sent:
                each.result()

    @property
    def lost(self) -> dict[int, object]:
        wrong = {seed: answer for seed, answer in self.answers.items() if answer[0] != 200}
        return {**wrong, **self.broken}

    def check(self) -> None:
        """Every answered request has the text of its seed, and no replica has computed a request for nobody."""
        assert len(self.answers) + len(self.broken) == REQUESTS
        lines = self.cluster.log_lines()[self.lines_before :]
        computed = [each["id"] for each in lines if each["route"] == "/v1/completions" and each["finish"]]
        assert len(computed) == len(set(computed))
        assert set(computed) <= set(self.ids), "a request was computed whose answer no client has seen"
        with self.cluster.http() as http:
            for seed in list(self.answers)[:: REQUESTS // 25]:
                status, text = self.answers[seed]
                again = http.post("/v1/completions", json=self.body(seed)).json()
                assert status != 200 or text == again["choices"][0]["text"]


def test_a_client_that_leaves_frees_its_sequence(cluster: Cluster) -> None:
    def logged() -> list[dict[str, object]]:
        return [each for each in cluster.log_lines() if each["id"] == response.headers["x-request-id"]]

    with streamed(cluster, n=32, max_tokens=240) as response:
        lines = response.iter_lines()  # without a reference to it httpx would close the response
        next(lines)
        cluster.serving()
    wait_until(lambda: cluster.running() == 0)
    wait_until(logged)
    (line,) = logged()
    assert line["generated_tokens"] < 32 * 240


def test_prompts_with_one_beginning_go_to_the_replica_that_has_it(cluster: Cluster) -> None:
    """The second request for each of eight texts finds it in a cache, whichever replica has it."""
    if cluster.routing == "connections":
        pytest.skip("HAProxy knows nothing of prompts")
    texts = [f"{number} {'times ' * 60}" for number in range(8)]
    cached = []
    with cluster.http() as http:
        for text in (*texts, *texts):
            body = {"model": "afterword-tiny", "prompt": text, "max_tokens": 1}
            cached.append(http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"])
    assert all(each["cached_tokens"] >= 60 for each in cached[8:])


def test_a_stream_goes_on_when_the_worker_of_its_replica_is_killed(cluster: Cluster) -> None:
    """The built-in model's promise is exact, so the next worker computes the rest of the same text."""
    with stream(cluster) as lines:
        whole = [text_of(line) for line in lines]
    with stream(cluster) as lines:
        found = [text_of(next(lines))]
        for replica in cluster.replicas():
            for worker in workers(replica):
                worker.kill()
        found += [text_of(line) for line in lines]
    assert "".join(found) == "".join(whole)
    assert found[-2:] == ["[DONE]", ""]


def test_what_a_stream_sees_when_its_replica_is_killed(cluster: Cluster) -> None:
    """The worker ends with the replica.

    HAProxy cuts the connection without an event, and never says that the text is complete. An ingress of Afterword lets
    the other replica compute the rest of the same text, since the built-in model's promise is exact.
    """
    body = {"n": 32, "max_tokens": 240, "prompt": "Replicas"}
    whole = None
    if cluster.routing != "connections":
        with stream(cluster, **body) as lines:
            whole = texts_of(lines)
    with stream(cluster, **body) as lines:
        first = next(lines)
        replica = cluster.serving()
        found = workers(replica)
        replica.kill()
        if whole is None:
            with pytest.raises(httpx.TransportError):
                assert "[DONE]" not in "".join(lines)
        else:
            assert texts_of([first, *lines]) == whole
    wait_until(lambda: not living([replica, *found]), 30)
    wait_until(lambda: len(cluster.replicas()) == 2)


def test_requests_that_had_no_answer_yet_are_answered_by_another_replica(cluster: Cluster) -> None:
    load = Load(cluster, len(cluster.log_lines()))

    def kill() -> None:
        replica = cluster.replicas()[0]
        found = workers(replica)
        replica.kill()
        wait_until(lambda: not living([replica, *found]), 30)

    load.run(kill)
    print(f"lost of {REQUESTS} while a replica was killed: {load.lost}")
    assert load.lost == load.broken, "every answer is right"
    assert cluster.routing == "connections" or not load.broken, "the ingress has them, and not the replica"
    # Of an answer that the replica was sending, HAProxy may have sent the head, which is written before the body.
    unbegun = ("without sending a response", "received 0 bytes")
    assert all(any(text in each for text in unbegun) for each in load.broken.values()), "no body is cut"
    assert len(load.broken) <= CLIENTS, "those that HAProxy had when the replica died: docs/scale.md"
    load.check()
    wait_until(lambda: len(cluster.replicas()) == 2)


def test_a_rolling_update_loses_no_request(cluster: Cluster) -> None:
    load = Load(cluster, len(cluster.log_lines()))
    before = cluster.replicas()

    def update() -> None:
        words = [PYTHON, "-m", "afterword", "deploy", str(cluster.file), "--address", cluster.address()]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    load.run(update)
    print(f"lost of {REQUESTS} while an update ran: {load.lost}")
    assert not load.lost
    load.check()
    wait_until(lambda: not living(before))
    assert len(cluster.replicas()) == 2


def test_a_response_has_one_request_id_and_the_log_has_it_too(cluster: Cluster) -> None:
    body = {"model": "afterword-tiny", "prompt": "One", "max_tokens": 1}
    with cluster.http() as http:
        responses = [http.post("/v1/completions", json=body, headers=each) for each in ({}, {"x-request-id": "mine-1"})]
    ids = [response.headers["x-request-id"] for response in responses]
    assert all(re.fullmatch("req_[0-9a-f]{32}", each) for each in ids), "one id, and not that of the client"
    wait_until(lambda: set(ids) <= {line["id"] for line in cluster.log_lines()})


def test_files_and_batches_are_refused_with_the_reason(cluster: Cluster) -> None:
    with cluster.http() as http:
        response = http.get("/v1/batches")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "batches_not_available")


def texts_of(lines: Iterable[str]) -> dict[int, str]:
    """The whole texts of a stream by choice. The stream must be complete."""
    found: dict[int, str] = defaultdict(str)
    ends = [line for line in lines if line]
    assert ends.pop() == "data: [DONE]"
    for line in ends:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            found[choice["index"]] += choice["text"]
    return found


def text_of(line: str) -> str:
    """The text of an event, `[DONE]`, or nothing."""
    data = line.removeprefix("data: ")
    if not data or data == "[DONE]":
        return data
    return "".join(choice["text"] for choice in json.loads(data)["choices"])
