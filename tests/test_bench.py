"""Tests the arithmetic of the benchmark, and runs all its scenarios with small sizes. No speed is asserted."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from gguf import GGUFReader

from afterword.config import WeightTypes

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from afterword.engine.draft import PredictedText, Prediction, prediction_draft  # noqa: E402
from afterword.engine.llama.runner import LlamaRunner  # noqa: E402
from afterword.models.gguf_facts import read_facts  # noqa: E402
from afterword.models.registry import builtin_path  # noqa: E402
from bench import infill, prediction, report  # noqa: E402
from bench.client import Client, NotPossible  # noqa: E402
from bench.model import FORMS, ArchitectureForm, write_folder, write_gguf  # noqa: E402
from bench.scenarios import SCENARIOS, Measure  # noqa: E402
from bench.target import check_length, find_target  # noqa: E402

WALL, RATE = Measure("wall", "s"), Measure("rate", "1/s", more_is_better=True)


def test_a_ratio_is_above_1_where_a_target_is_better_for_every_unit():
    times = report.Row("x", WALL, {"a": (2.0, 4.0, 6.0), "b": (1.0, 1.0, 6.0)})
    rates = report.Row("x", RATE, {"a": (2.0, 4.0, 6.0), "b": (1.0, 1.0, 6.0)})
    assert times.ratios("b", "a") == (2.0, 4.0, 1.0)
    assert rates.ratios("b", "a") == (0.5, 0.25, 1.0)
    assert times.middle("a") == 4.0


def test_a_scenario_that_fails_once_is_not_compared():
    (row,) = report.rows("x", [WALL], {"a": [{"wall": 1.0}, {"wall": 2.0}], "b": [{"wall": 1.0}, "403: no & never"]})
    assert row.results == {"a": (1.0, 2.0), "b": "403: no & never"}
    assert row.ratios("b", "a") == row.ratios("a", "b") == ()
    table = report.table([row], ["a", "b"], "a")
    assert "| x        | wall, s | 1.500 | not possible | -     |" in table
    assert table.endswith("x, b: not possible: 403: no & never")
    (result,) = report.document([row], "a", {"date": "today"})["results"]
    assert result["times_better"] == {"b": None}
    assert result["not_possible"] == {"b": "403: no & never"}


def test_the_table_has_medians_and_ratios_with_their_range():
    row = report.Row("x", WALL, {"a": (2.0, 4.0, 6.0), "b": (1.0, 1.0, 6.0)})
    last = report.table([row], ["a", "b"], "b").splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")] == [
        "x",
        "wall, s",
        "4.000",
        "1.000",
        "0.50 (0.25 to 1.00)",
    ]


def test_bars_point_right_where_a_target_is_better():
    found = [report.Row("x", WALL, {"a": (1.0,), "b": (0.25,)}), report.Row("y", RATE, {"a": (1.0,), "b": (0.25,)})]
    drawn = ElementTree.fromstring(report.picture(found, ["a", "b"], "a", "<title>"))
    _, better, worse = drawn.iter("{http://www.w3.org/2000/svg}rect")
    assert float(better.attrib["x"]) == float(worse.attrib["x"]) + float(worse.attrib["width"])
    assert better.attrib["width"] == worse.attrib["width"]


@pytest.mark.timeout(60)
def test_every_scenario_runs_on_our_server(serve, tmp_path):
    numbers, picture, model = tmp_path / "numbers.json", tmp_path / "ratios.svg", tmp_path / "model.gguf"
    model.write_bytes(bytes(1000))
    with serve("--parallel", "4", "--context", "1024", key=None) as server:
        every = [word for scenario in SCENARIOS for word in ("--scenario", scenario.name)]
        where = ["--target", f"ours={server.url}", "--target", f"same={server.url}/v1", "--base", "same"]
        how = ["--quick", "--rounds", "1", "--pause", "0", "--json", str(numbers), "--picture", str(picture)]
        how += ["--gguf", str(model)]
        done = subprocess.run(
            [sys.executable, "-m", "bench", *where, *how, *every], cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    results = json.loads(numbers.read_text())
    assert {result["scenario"] for result in results["results"]} == {scenario.name for scenario in SCENARIOS}
    for result in results["results"]:
        assert not result["not_possible"], result
        assert {name: len(values) for name, values in result["rounds"].items()} == {"ours": 1, "same": 1}
        assert all(value >= 0 for values in result["rounds"].values() for value in values)
    assert results["base"] == "same"
    assert results["targets"]["ours"]["version"].startswith("fp_")
    assert results["machine"]["cores"] >= 1
    assert "ours / same" in done.stdout
    assert "read bandwidth" in done.stdout
    measured = {(result["scenario"], result["measure"]) for result in results["results"]}
    assert [scenario for scenario, measure in measured if measure == "of read bandwidth"] == ["one-stream"]
    ElementTree.parse(picture)


def test_a_server_that_does_not_answer_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--target", "gone=http://127.0.0.1:9"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "gone" in done.stderr
    assert "Traceback" not in done.stderr


def canned(*parts: bytes):
    """What our client makes of an answer in these parts, each sent on its own."""

    async def ask():
        over = asyncio.Event()

        async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.01)
            writer.close()
            over.set()

        async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
            client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            try:
                return await client.ask("/v1/completions", {})
            finally:
                await client.close()
                await over.wait()
                await asyncio.sleep(0.01)

    return asyncio.run(ask())


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"


def test_an_event_has_the_time_of_its_last_byte():
    first, second = (
        b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n',
        b'data: {"choices": [], "usage": {"x": 1}}\n\n',
    )
    answer = canned(STREAM + chunk(first[:9])[:5], chunk(first[:9])[5:], chunk(first[9:] + second[:3]),
                    chunk(second[3:] + b"data: [DONE]\n\n") + b"0\r\n\r\n")  # fmt: skip
    (early, one), (late, two) = answer.events
    assert answer.started < early < late
    assert one["choices"][0]["text"] == "a"
    assert answer.times == [early]
    assert answer.usage == two["usage"] == {"x": 1}


def test_an_error_in_a_stream_or_a_status_is_raised():
    refusal = b'{"error": {"message": "No such\\nmodel."}}'
    head = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(refusal)
    with pytest.raises(NotPossible, match=r"^404: No such model\.$"):
        canned(head, refusal)
    with pytest.raises(NotPossible, match=r"^error: it broke$"):
        canned(STREAM + chunk(b'data: {"error": "it broke"}\n\n') + b"0\r\n\r\n")


def test_a_connection_that_breaks_is_an_error():
    with pytest.raises(ConnectionError):
        canned(STREAM + chunk(b"data: {"))


def test_responses_of_other_lengths_are_not_compared():
    body = b'{"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}'
    answer = canned(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    check_length(answer, 3)
    with pytest.raises(NotPossible, match="generated 3 tokens where 4"):
        check_length(answer, 4)
    with pytest.raises(NotPossible, match="gave 1 choices where 2"):
        check_length(answer, 3, choices=2)


def test_requests_use_only_fields_that_the_server_supports(server):
    async def find():
        target = await find_target("ours", server.url, server.key)
        await target.client.close()
        return target

    target = asyncio.run(find())
    assert target.model == server.model
    assert target.dialect.ids == {"return_token_ids": True}


def test_a_mixture_of_experts_is_written(tmp_path):
    path = tmp_path / "mixture.gguf"
    write_gguf(path, FORMS["small-mixture"], "Q8_0")
    facts = read_facts(path)
    assert (facts.architecture, facts.experts, facts.layers) == ("qwen3moe", 8, 2)
    assert facts.matrix_types == {"F32", "Q8_0"}
    weights = WeightTypes(facts.architecture, facts.matrix_types, facts.experts)
    assert weights.promise("exact", with_kernels=True) == "exact"


def test_only_experts_get_the_type_for_experts(tmp_path):
    write_gguf(tmp_path / "mixture.gguf", FORMS["small-mixture"], "MXFP4_MOE")
    for tensor in GGUFReader(tmp_path / "mixture.gguf").tensors:
        if len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name:
            assert tensor.tensor_type.name == ("MXFP4" if "_exps" in tensor.name else "Q8_0"), tensor.name


def test_a_form_of_any_architecture_is_written_in_a_given_type(tmp_path):
    form = FORMS["gemma3-0.5b"]
    assert isinstance(form, ArchitectureForm)
    small = {**form.keys, "block_count": 6, "embedding_length": 64, "feed_forward_length": 64}
    write_gguf(tmp_path / "small.gguf", ArchitectureForm("gemma3", small, 1000), "Q8_0")
    facts = read_facts(tmp_path / "small.gguf")
    assert (facts.architecture, facts.layers, facts.vocabulary, facts.heads_kv) == ("gemma3", 6, 1000, 1)
    assert facts.matrix_types == {"Q8_0"}
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]
    with pytest.raises(SystemExit, match="gemma3"):
        write_folder(tmp_path / "folder", form)


def rows_of(printed: str) -> list[list[str]]:
    """The cells of all rows of Markdown tables, without the rulers."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    return [row for row in rows if set(row[0]) != {"-"}]


def test_predictions_are_measured_on_a_written_model(tmp_path, capsys):
    write_gguf(tmp_path / "small.gguf", FORMS["small"], "Q8_0")
    prediction.main([str(tmp_path / "small.gguf"), "--rounds", "1", "--lines", "6", "--length", "48"])
    rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows[: len(prediction.SIZES) + 1]] == ["tokens", *map(str, prediction.SIZES)]
    expected = prediction.cases(6, 48)
    assert [row[:2] for row in rows[len(prediction.SIZES) + 2 :]] == [
        [case.name, str(sum(map(len, case.texts)))] for case in expected
    ]


def test_a_long_text_without_drafts_is_generated_in_parts(tmp_path, capsys, monkeypatch):
    write_gguf(tmp_path / "small.gguf", FORMS["small"], "Q8_0")
    passes = []
    run = LlamaRunner.run
    monkeypatch.setattr(LlamaRunner, "run", lambda runner, batch: passes.append(batch) or run(runner, batch))
    found = {}
    for whole in ((), ("--whole",)):
        passes.clear()
        arguments = ["--rounds", "1", "--length", "800", "--case", "other text", *whole]
        prediction.main([str(tmp_path / "small.gguf"), *arguments])
        *_, row = rows_of(capsys.readouterr().out)
        assert row[:2] == ["other text as prediction", "800"]
        assert row[7].startswith("0.97: ")
        found[whole] = len(passes)
    assert found["--whole",] - found[()] > 300, "parts have 384 of the 800 tokens"


def test_a_model_repeats_a_real_text(tmp_path, capsys):
    write_gguf(tmp_path / "small.gguf", FORMS["small"], "Q8_0")
    prediction.main([str(tmp_path / "small.gguf"), "--rounds", "1", "--real"])
    *_, row = rows_of(capsys.readouterr().out)
    assert row[0] == "real text"
    assert int(row[1]) > 500, "a byte is a token"


def test_a_draft_model_is_measured(tmp_path, capsys):
    write_gguf(tmp_path / "small.gguf", FORMS["small"], "Q8_0")
    files = [str(tmp_path / "small.gguf"), "--draft-model", str(tmp_path / "small.gguf")]
    prediction.main([*files, "--rounds", "1", "--length", "48", "--case", "draft model"])
    rows = rows_of(capsys.readouterr().out)[len(prediction.SIZES) + 2 :]
    assert [row[0] for row in rows] == [case.name for case in prediction.draft_cases(48)]


def test_a_prediction_has_five_changed_lines():
    changed, other, *rest = prediction.cases(200, 100)
    draft = prediction_draft(Prediction(PredictedText(changed.prediction)), len(changed.texts[0]))
    for token in changed.texts[0]:
        draft.append(token)
    assert changed.texts[0] != changed.prediction
    assert draft.acceptance > 0.5
    assert not set(zip(other.texts[0], other.texts[0][1:], other.texts[0][2:], strict=False)) & set(
        zip(other.prediction, other.prediction[1:], other.prediction[2:], strict=False)
    )
    assert all(case.ngrams and not case.prediction for case in rest)


def test_typing_is_measured_on_our_server(capsys):
    sizes = ["--tokens", "200", "--keys", "3", "--rounds", "2", "--wait", "0", "--length", "4"]
    infill.main([str(builtin_path()), "--alone", *sizes])
    printed = capsys.readouterr()
    (head, *rows) = rows_of(printed.out)
    assert head == ["scenario", "measure", "afterword"]
    assert {row[0] for row in rows} == {"typing, 6 times"}
    assert printed.err.count("key 3 of 3, afterword: first token ") == 2
    assert [row[1] for row in rows] == ["first token, s", "whole middle, s", "computed prompt tokens, tokens"]
    figures = [float(row[2]) for row in rows]
    assert 0 < figures[0] <= figures[1]
    assert 0 < figures[2] < 200, "the text before the cursor comes from the cache"


def test_typing_ends_when_the_time_is_over_and_without_a_server_that_fails(serve):
    typing = infill.Typing(lines=4, keys=3, files=1, wait=0, length=2, seconds=60)
    with serve("--parallel", "2", key=None) as server:
        urls = {"good": server.url, "bad": f"{server.url}/no-such-path"}
        found = asyncio.run(infill.measure(urls, typing, 1))
        short = asyncio.run(infill.measure({"good": server.url}, replace(typing, seconds=0), 1))
    assert [type(outcome) for outcome in found["good"]] == [dict] * 3
    (reason,) = found["bad"]
    assert "404" in reason
    assert len(short["good"]) == 1


def test_the_line_before_the_cursor_is_sent_apart():
    body = infill.body_of("a = 1\nb =", "\nc\n", 4)
    assert (body["input_prefix"], body["prompt"], body["input_suffix"]) == ("a = 1\n", "b =", "\nc\n")
    assert infill.body_of("a", "", 4)["input_prefix"] == ""


def test_a_template_says_whether_the_suffix_is_first(server):
    def found(template):
        return asyncio.run(infill.is_suffix_first(server.url, template))

    assert found("<s>{suffix}<p>{prefix}")
    assert not found("<p>{prefix}<s>{suffix}")
