"""Tests of frames: encoding and decoding are inverse, and other bytes are refused."""

from __future__ import annotations

import contextlib
import io

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterword.engine import messages
from afterword.engine.protocol import BannedText, Grammar, Job, Load, Sampling, Step, Token

JOB = Job((1, 2), 3, 4, Sampling(0.5, 0.9, 40, 0.1, 0.2, -0.2, 1.1, ((7, -100.0),)), (0,), b"k" * 16, 1, 2, 3)
GRAMMAR_JOB = msgspec.structs.replace(JOB, grammar=Grammar("json", "{}", "json_schema"))
TO_WORKER = [
    messages.LoadModel("model.gguf", 512, 4, 1, 64, "f16", 0, False),
    messages.StartJob(1, JOB),
    messages.StartJob(2, GRAMMAR_JOB),
    messages.StartJob(3, msgspec.structs.replace(JOB, banned=(5,), banned_text=BannedText(("a",), ("b", "c"), (0,)))),
    messages.DropSample(1, 2),
    messages.CloseJob(1),
    messages.TokenizeText(5, "héllo", True),
]
STEP = Step((Token(1, -0.5, ((2, -0.25),)),), ((0, Token(3)),), ((0, "stop"),))
TO_SERVER = [
    messages.LoadFailure("no"),
    messages.PassDone({7: STEP}, Load(4, 1, 0)),
    messages.PassDone({7: Step(failed=True, error="no"), 8: Step(compiling=False)}, Load(4, 1, 0)),
    messages.PassDone({7: Step(taken_back=3)}, Load(4, 1, 0)),
    messages.TextTokens.of(5, (1, 2, 3)),
]


@pytest.mark.parametrize("message", TO_WORKER)
def test_messages_to_the_worker_are_decoded_unchanged(message):
    body = messages.read(io.BytesIO(messages.pack(message)))
    assert messages.unpack_for_worker(body) == message


@pytest.mark.parametrize("message", TO_SERVER)
def test_messages_to_the_server_are_decoded_unchanged(message):
    body = messages.read(io.BytesIO(messages.pack(message)))
    assert messages.unpack_for_server(body) == message


def test_an_incomplete_frame_is_the_end_of_the_stream():
    data = messages.pack(TO_WORKER[1])
    for size in range(len(data)):
        assert messages.read(io.BytesIO(data[:size])) is None


def test_a_frame_above_the_limit_is_not_read():
    assert messages.read(io.BytesIO(messages.HEADER.pack(messages.MAX_FRAME_BYTES + 1) + b"x" * 100)) is None


@given(st.binary(max_size=200))
def test_other_bytes_raise_a_decoding_error(body):
    for unpack in (messages.unpack_for_worker, messages.unpack_for_server):
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            unpack(body)
