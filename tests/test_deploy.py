"""deploy/: the files for Prometheus, Grafana and Docker name things that exist, and Prometheus accepts them."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from afterword.cli import main
from afterword.engine.parent.engine_metrics import EngineMetrics
from afterword.engine.protocol import Load, PassStats
from afterword.observability.metrics import EngineSnapshot, Metrics
from afterword.transport.transport_limits import TransportLimits

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
BOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/afterword.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = {f"{panel['title']} {each['refId']}": each["expr"] for panel in PANELS for each in panel["targets"]}
LISTS = [each["definition"] for each in BOARD["templating"]["list"] if each["type"] == "query"]
RULES = [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]
WORDS = {
    # of the query language, and labels in `by (…)`
    *("sum", "rate", "increase", "histogram_quantile", "by", "label_values", "instance", "up"),
    *("le", "handler", "method", "status", "finished_reason", "model_name", "kind", "code"),
}

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool (Debian: prometheus) is not installed"
)


def served(prefix: str) -> set[str]:
    """Every name that a query can ask a server for."""
    figures = EngineSnapshot("m", "ready", Load(), PassStats(), EngineMetrics(), 1, 1)
    kinds = re.findall(
        r"^# TYPE (\S+) (\w+)", Metrics(["m"], f"{prefix}:").text("ready", [figures]).decode(), re.MULTILINE
    )
    parts = {"histogram": ("_bucket", "_sum", "_count")}
    return {name + part for name, kind in kinds for part in parts.get(kind, ("",))}


def asked(query: str, prefix: str) -> set[str]:
    """The metrics that a query names."""
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]', "", query.replace("${prefix}", prefix))
    bare = re.sub(r"\w+\s*=~?", "", bare)
    return set(re.findall(r"[a-zA-Z_][\w:]*", bare)) - WORDS


# ---- the dashboard


@pytest.mark.parametrize("prefix", ["afterword", "vllm"])
def test_every_query_of_the_board_names_what_is_served(prefix):
    for query in (*QUERIES.values(), *LISTS):
        names = asked(query, prefix)
        assert names
        assert names <= served(prefix), query
    for rule in RULES:
        assert asked(rule, "afterword") <= served("afterword"), rule


def test_most_of_what_is_served_is_on_the_board():
    shown = set().union(*(asked(query, "afterword") for query in QUERIES.values()))
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in served("afterword")}
    missing = families - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert missing <= {
        "afterword:request_params_n",
        *("process_virtual_memory_bytes", "process_start_time_seconds"),
    }


def test_panels_have_places_of_their_own():
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = {}
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
        rows = range(place["y"], place["y"] + place["h"])
        cells[panel["title"]] = {(x, y) for y in rows for x in range(place["x"], place["x"] + place["w"])}
    assert len(cells) == len(ids), "titles are unique too"
    for (one, its), (other, others) in combinations(cells.items(), 2):
        assert not its & others, f"{one} and {other} overlap"


def test_panels_say_what_they_show_and_ask_whom_the_board_says():
    variables = {each["name"]: each for each in BOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert (variables["prefix"]["type"], variables["prefix"]["query"]) == ("textbox", "afterword")
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([BOARD["panels"], BOARD["templating"]]))) - {
        "__rate_interval",
        "__range",
    }
    assert used - {"__all"} == variables.keys()
    for panel in PANELS:
        assert len(panel["description"]) > 20
        assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] == "heatmap"
        assert panel["datasource"]["uid"] == "${datasource}"
        references = [each["refId"] for each in panel["targets"]]
        assert len(set(references)) == len(references)
        assert all(each["datasource"]["uid"] == "${datasource}" for each in panel["targets"])


def test_rows_are_in_order_and_none_is_empty():
    rows = [(panel["type"] == "row", panel["title"]) for panel in sorted(BOARD["panels"], key=_order)]
    titles = [title for is_row, title in rows if is_row]
    assert titles == ["Traffic", "Latency", "Throughput", "Cache", "Queue", "Errors and restarts", "Processes"]
    assert rows[0][0]
    assert not any(first[0] and second[0] for first, second in zip(rows, [*rows[1:], (True, "")], strict=True))


def _order(panel: dict[str, Any]) -> tuple[int, int]:
    return panel["gridPos"]["y"], panel["gridPos"]["x"]


# ---- Docker


def test_the_compose_file_mounts_what_exists_and_listens_here_only():
    services = COMPOSE["services"]
    assert services.keys() == {"afterword", "prometheus", "grafana"}
    assert (DEPLOY / services["afterword"]["build"] / "Dockerfile").is_file()
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume
        assert ("build" in service) or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "versions are pinned"


def test_the_containers_find_each_other():
    services = COMPOSE["services"]
    mounts = {
        service: dict(volume.split(":")[1::-1] for volume in services[service]["volumes"])
        for service in ("prometheus", "grafana")
    }
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text(encoding="utf-8"))
    boards = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/afterword.yaml").read_text(encoding="utf-8"))
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert services["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]
    assert f"{boards['providers'][0]['options']['path']}/afterword.json" in mounts["grafana"]
    assert "/etc/grafana/provisioning" in mounts["grafana"]
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    assert config["scrape_configs"][0]["static_configs"] == [{"targets": ["afterword:8000"]}]
    assert {f"/etc/prometheus/{name}" for name in (*config["rule_files"], "prometheus.yml")} <= mounts[
        "prometheus"
    ].keys()
    assert source["datasources"][0]["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_the_compose_file_sets_only_options_that_exist():
    options = {f"AFTERWORD_SERVE_{each.name.upper()}" for each in main.commands["serve"].params if each.name}
    for name in COMPOSE["services"]["afterword"]["environment"]:
        assert name in options | {"AFTERWORD_API_KEY"}
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    volumes = {volume.split(":")[1] for volume in COMPOSE["services"]["afterword"]["volumes"]}
    (declared,) = re.findall(r"^VOLUME (\[.*\])$", image, re.MULTILINE)
    assert volumes == set(json.loads(declared))
    assert re.search(r"^EXPOSE 8000$", image, re.MULTILINE)


def test_compose_itself_accepts_the_file():
    both = (["docker", "compose"], ["docker-compose"])
    found = next((each for each in both if shutil.which(each[0]) and _runs([*each, "version"])), None)
    if found is None:
        pytest.skip("neither docker compose nor docker-compose is installed")
    environment = {"AFTERWORD_API_KEY": "a", "GRAFANA_PASSWORD": "b", "PATH": "/usr/local/bin:/usr/bin:/bin"}
    command = [*found, "-f", str(DEPLOY / "compose.yaml"), "config"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert set(yaml.safe_load(shown.stdout)["services"]) == set(COMPOSE["services"])
    refused = subprocess.run(command, env={"PATH": environment["PATH"]}, capture_output=True, text=True, check=False)
    assert "the key that opens the server" in refused.stderr + refused.stdout


def _runs(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# ---- Prometheus


@needs_promtool
@pytest.mark.parametrize(("what", "file"), [("config", "prometheus.yml"), ("rules", "alerts.yml")])
def test_promtool_accepts(what, file):
    check = subprocess.run(["promtool", "check", what, DEPLOY / file], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[..., httpx.Client]]:
    """Starts Prometheus with our configuration on another target, with its key and without; gives a client of it."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus (Debian: prometheus) is not installed")
    started: list[subprocess.Popen[bytes]] = []
    clients: list[httpx.Client] = []

    def start(url: str, key: str) -> httpx.Client:
        text = (DEPLOY / "prometheus.yml").read_text(encoding="utf-8")
        text = text.replace("afterword:8000", url.removeprefix("http://")).replace("interval: 15s", "interval: 1s")
        (tmp_path / "afterword.key").write_text(key, encoding="utf-8")
        keyed = re.sub(r"^    # (authorization:|  credentials_file)", r"    \1", text, flags=re.MULTILINE)
        keyed = keyed.replace("/etc/prometheus/", f"{tmp_path}/")  # as the comment says
        config = yaml.safe_load(keyed)
        config["scrape_configs"] += [{**yaml.safe_load(text)["scrape_configs"][0], "job_name": "keyless"}]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        shutil.copy(DEPLOY / "alerts.yml", tmp_path)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        storage, listens = f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address={address}"
        with (tmp_path / "log").open("wb") as log:
            command = [program, f"--config.file={tmp_path / 'prometheus.yml'}", storage, listens]
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
        clients.append(httpx.Client(base_url=f"http://{address}", trust_env=False))
        wait_until(lambda: is_ready(clients[-1], started[-1], tmp_path / "log"))
        return clients[-1]

    yield start
    for client in clients:
        client.close()
    for process in started:
        process.terminate()
        process.wait(30)


def is_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text(encoding="utf-8")
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def query(client: httpx.Client, text: str) -> list[Any]:
    answer = client.get("/api/v1/query", params={"query": text})
    assert answer.status_code == 200, f"{text}\n{answer.text}"
    found: list[Any] = answer.json()["data"]["result"]
    return found


def value(client: httpx.Client, text: str) -> float | None:
    """The only value of a query; None where there is none (yet)."""
    found = query(client, text)
    return float(found[0]["value"][1]) if found else None


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.05)


def test_prometheus_scrapes_a_server_and_answers_every_query_of_the_board(server, prometheus):
    with server.http() as http:
        wait_until(lambda: http.get("/ready").json()["running"] == 0)
        before = counted(http)
        watcher = prometheus(server.url, server.key)
        wait_until(lambda: value(watcher, 'up{job="afterword"}') == 1.0)
        name = f'afterword:generation_tokens_total{{model_name="{server.model}"}}'
        wait_until(lambda: value(watcher, name) is not None)
        usage = [
            http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 11, "ignore_eos": True, "n": 2}).json()[
                "usage"
            ]
            for _ in range(3)
        ]
        assert sum(each["completion_tokens"] for each in usage) == 66
        assert http.post("/v1/completions", json={"temperature": 9}).status_code == 400
        knock(server.url)
        wait_until(lambda: value(watcher, name) == before + 66)
        wait_until(lambda: not unanswered(watcher), 90)
        wait_until(lambda: bool(watcher.get("/api/v1/rules").json()["data"]["groups"]))
        (group,) = watcher.get("/api/v1/rules").json()["data"]["groups"]
        assert {rule["name"] for rule in group["rules"]} == {rule["alert"] for rule in ALERTS["groups"][0]["rules"]}
        assert not [rule for rule in group["rules"] if rule["health"] == "err"]
        wait_until(lambda: value(watcher, 'up{job="keyless"}') == 0.0)
        targets = watcher.get("/api/v1/targets").json()["data"]["activeTargets"]
        assert {each["scrapePool"]: "401" in each["lastError"] for each in targets} == {
            "afterword": False,
            "keyless": True,
        }


def counted(http: httpx.Client) -> float:
    (found,) = re.findall(r"^afterword:generation_tokens_total\S+ (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return float(found)


def knock(url: str) -> None:
    """A client connects and does not speak HTTP."""
    with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port or 80)) as link:
        link.sendall(b"hello\r\n\r\n")
        while link.recv(4096):
            pass


def unanswered(watcher: httpx.Client) -> list[str]:
    """Queries of the board, as Grafana sends them, that bring nothing."""
    words = {
        "${prefix}": "afterword",
        "$__rate_interval": "20s",
        "$__range": "1m",
        "$model_name": ".*",
        "$instance": ".*",
    }
    empty = []
    for name, text in QUERIES.items():
        sent = text
        for word, meaning in words.items():
            sent = sent.replace(word, meaning)
        if not query(watcher, sent):
            empty.append(name)
    return empty


def test_proxies_of_the_guide_close_idle_connections_before_the_server() -> None:
    """Otherwise a proxy sends a request into a connection that the server is closing, and returns 502."""
    guide = (ROOT / "docs" / "guides" / "deploy.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"server closes idle connections after (\d+) s", guide)
    assert float(stated) == TransportLimits().idle_seconds
    (nginx,) = re.findall(r"keepalive_timeout (\d+)s;", guide)
    (caddy,) = re.findall(r"Caddy for (\d+) minutes", guide)
    assert max(float(nginx), 60 * float(caddy)) < TransportLimits().idle_seconds
    google, longer = re.findall(r"for (\d+) s: behind it, start the server with `--limit idle_seconds=(\d+)`", guide)[0]
    assert float(google) < float(longer)
