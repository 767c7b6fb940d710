"""Tests of `afterword deploy` without Ray: the file, its errors, and the printed configurations."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import yaml
from click.testing import CliRunner

from afterword.api.middleware.request_ids import HEADER, middlewares
from afterword.api.routes.files import manager_of
from afterword.api.service import Service
from afterword.cli import main
from afterword.cli.ray_serve import app_file
from afterword.cli.ray_serve.app_file import REFUSED, check_serve, read_app, serve_command, serve_options
from afterword.cli.ray_serve.configuration import IMPORT_PATH, cluster_variables, deployment_options
from afterword.config import Config
from afterword.engine.parent.model_manager import ModelManager
from afterword.errors import RequestError, SettingError


@pytest.fixture
def write(tmp_path):
    def write_app(text: str) -> Path:
        file = tmp_path / "app.yaml"
        file.write_text(text)
        file.chmod(0o600)
        return file

    return write_app


def printed(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["deploy", *arguments])
    return result.exit_code, result.output


def test_an_empty_application_has_the_defaults_of_serve(write):
    app = read_app(write("serve: {}"))
    assert (app.min_replicas, app.max_replicas, app.port, app.ingress) == (1, 1, 8000, "haproxy")
    assert app.max_queue == 4096


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("replica: 2", "replica: there is no such setting; did you mean replicas?"),
        ("serve: {paralel: 2}", "serve: paralel: there is no such setting; did you mean parallel?"),
        ("serve: {parallel: two}", "serve: parallel: expected a whole number, not 'two'"),
        ("serve: [a]", "serve: expected the settings of afterword serve"),
        ("replicas: 0", "replicas: 0 is not in the range"),
        ("ingress: nginx", "ingress: 'nginx' is not one of 'haproxy', 'ray'"),
        ("replicas: 2\nmax-replicas: 3", "replicas cannot be used with max-replicas"),
        ("min-replicas: 2", "min-replicas needs max-replicas"),
        ("min-replicas: 3\nmax-replicas: 2", "min-replicas: 3 is more than max-replicas, 2"),
        ("drain: soon", "drain: "),
        ("routing: random", "routing: 'random' is not one of 'connections', 'prefix', 'round-robin'"),
        ("min-replicas: 2\nmax-replicas: 3\nrouting: prefix", "max-replicas cannot be used with routing: prefix"),
        ("routing: prefix\nserve: {keep-alive: 60}", "serve: keep-alive cannot be used with routing: prefix"),
        ("- 1", "expected settings by name"),
        ("a: [1", "is not valid YAML"),
        ("1: 2", "expected settings by name"),
        ("serve: {on: 1}", "serve: true: expected the name of a setting"),
        ("serve: {2: 1}", "serve: 2: expected the name of a setting"),
        ("cpus: .nan", "cpus: expected a finite number, not nan"),
        ("gpus: .inf", "gpus: expected a finite number, not inf"),
        (
            "serve: {limit: [head_seconds=5]}",
            "serve: limit: head_seconds cannot be set for replicas: Serve's HTTP server",
        ),
        (
            "serve: {limit: [max_n=4, max_rows=5]}",
            "serve: limit: max_rows cannot be set for replicas: replicas have no",
        ),
    ],
)
def test_an_error_names_the_file_and_the_setting(write, text, message):
    file = write(text)
    with pytest.raises(SettingError) as refused:
        read_app(file)
    assert str(file) in refused.value.message
    assert message in refused.value.message
    assert printed(str(file))[0] == 2


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_a_replica_cannot_have_are_refused_by_name(write, name):
    with pytest.raises(SettingError, match=f"serve: {name} cannot be set for replicas: "):
        read_app(write(f"serve: {{{name}: 1}}"))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(SettingError, match="cannot be read"):
        read_app(tmp_path / "none.yaml")


@pytest.mark.parametrize("mode", [(), ("--address", "auto"), ("--print", "serve"), ("--print", "kuberay")])
def test_a_file_with_a_key_is_refused_without_showing_it(write, mode):
    """Ray would keep the arguments of a replica in its state, in clear text."""
    status, output = printed(str(write("serve: {api-key: [sk-secret]}")), *mode)
    assert status == 2
    assert "api-key-file" in output
    assert "AFTERWORD_API_KEY" in output
    assert "sk-secret" not in output


def test_keys_can_be_given_in_the_environment_and_in_a_file(write, tmp_path, monkeypatch):
    monkeypatch.setenv("AFTERWORD_API_KEY", "sk-1")
    assert serve_options({}, "0.0.0.0")["api_key"] == ("sk-1",)
    assert read_app(write(f"serve: {{api-key-file: {tmp_path / 'keys'}}}")).serve == {
        "api-key-file": str(tmp_path / "keys")
    }


def test_limits_that_a_replica_applies_can_be_set_and_others_not_even_by_a_variable(monkeypatch):
    assert serve_options({"limit": ["max_body=100", "max_n=4"]}, "127.0.0.1")["limit"] == ("max_body=100", "max_n=4")
    monkeypatch.setenv("AFTERWORD_SERVE_LIMIT", "max_connections=5")
    with pytest.raises(SettingError, match="limit: max_connections cannot be set for replicas"):
        serve_options({}, "127.0.0.1")


def test_every_other_setting_of_serve_can_be_given():
    for parameter in serve_command().params:
        assert isinstance(parameter, click.Parameter)
        name = app_file.settings.name(parameter)
        if name not in REFUSED:
            with pytest.raises(SettingError, match=f"^here: {name}: expected"):
                check_serve("here: ", {name: {}})


def test_the_options_of_a_replica_are_those_of_serve(monkeypatch, tmp_path):
    """Environment variables take precedence, a settings file is not read, and the address is that of the ingress."""
    settings = tmp_path / "config.toml"
    settings.write_text("[serve]\nthreads = 1\n")
    monkeypatch.setenv("AFTERWORD_CONFIG", str(settings))
    monkeypatch.setenv("AFTERWORD_SERVE_CONTEXT", "128")
    monkeypatch.setenv("AFTERWORD_SERVE_PORT", "tcp://10.0.0.1:80")  # as in Kubernetes
    options = serve_options({"parallel": 3, "context": 64, "models": ["a.gguf"], "strict": True}, "0.0.0.0")
    assert (options["parallel"], options["context"], options["threads"]) == (3, 128, None)
    assert (options["models"], options["strict"], options["host"]) == (("a.gguf",), True, "0.0.0.0")
    assert (options["port"], options["grace"], options["proxy"]) == (8000, 30.0, ())


def test_the_serve_configuration_holds_the_replicas_and_the_settings(write):
    file = write("min-replicas: 2\nmax-replicas: 5\ngpus: 1\ndrain: 2m\nserve: {models: [m.gguf], max-queue: 100}")
    status, output = printed(str(file), "--print", "serve")
    assert status == 0
    (application,) = yaml.safe_load(output)["applications"]
    assert (application["import_path"], application["args"]["serve"]["models"]) == (IMPORT_PATH, ["m.gguf"])
    (deployment,) = application["deployments"]
    assert deployment["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 16}
    assert deployment["max_ongoing_requests"] > 100, "requests above the queue's limit get the server's own error"
    assert deployment["graceful_shutdown_timeout_s"] > 120
    assert deployment["ray_actor_options"]["num_gpus"] == 1


def test_with_routing_one_ingress_without_resources_is_in_front_of_the_engine_replicas(write):
    file = write("replicas: 3\nrouting: prefix\ngpus: 1\ndrain: 2m\nserve: {max-queue: 100}")
    (application,) = yaml.safe_load(printed(str(file), "--print", "serve")[1])["applications"]
    assert application["args"] == {"serve": {"max-queue": 100}, "routing": "prefix", "drain": 120.0}
    engine, ingress = application["deployments"]
    assert (engine["name"], engine["num_replicas"], engine["ray_actor_options"]["num_gpus"]) == ("Engine", 3, 1)
    assert (ingress["name"], ingress["num_replicas"]) == ("Afterword", 1)
    assert ingress["max_surge_percent"] == 100, "the next ingress starts before this one stops"
    reserved = ingress["ray_actor_options"]
    assert (reserved["num_cpus"], reserved["num_gpus"]) == (0, 0)
    assert reserved["runtime_env"] == engine["ray_actor_options"]["runtime_env"]
    assert ingress["max_ongoing_requests"] > 100 + 3 * 16
    for deployment in (engine, ingress):
        assert deployment["graceful_shutdown_timeout_s"] > 120


def test_the_kuberay_manifest_sets_the_ingress_on_every_node(write):
    assert "give image" in printed(str(write("replicas: 2")), "--print", "kuberay")[1]
    text = "replicas: 3\nhost: 0.0.0.0\nimage: example/afterword"
    status, output = printed(str(write(text)), "--print", "kuberay")
    assert status == 0
    manifest = yaml.safe_load(output)
    cluster = manifest["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"} in container["env"]
        assert container["image"] == "example/afterword"
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 4)
    assert cluster["enableInTreeAutoscaling"], "without it no pod is added in which an update can start a replica"
    served = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    assert served["applications"]
    assert served["http_options"]["host"] == "0.0.0.0"


def test_without_surge_a_fixed_number_of_pods_needs_no_autoscaler(write):
    text = "replicas: 3\nsurge: 0\nhost: 0.0.0.0\nimage: example/afterword"
    cluster = yaml.safe_load(printed(str(write(text)), "--print", "kuberay")[1])["spec"]["rayClusterConfig"]
    assert not cluster["enableInTreeAutoscaling"]
    assert cluster["workerGroupSpecs"][0]["maxReplicas"] == 3


@pytest.mark.parametrize("host", ["", "host: 127.0.0.1\n", "host: localhost\n", "host: '::1'\n"])
def test_pods_that_listen_on_themselves_only_are_refused(write, host):
    status, output = printed(str(write(f"{host}image: example/afterword")), "--print", "kuberay")
    assert status == 2
    assert "Give host: 0.0.0.0" in output


def test_rays_own_proxy_needs_no_variables(write):
    assert cluster_variables(read_app(write("ingress: ray"))) == {}


def test_a_public_host_without_keys_is_refused_before_ray_starts(write):
    status, output = printed(str(write("host: 0.0.0.0")))
    assert (status, "there are no API keys" in output) == (2, True)


def test_without_ray_the_error_says_what_to_install(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    status, output = printed(str(write("replicas: 2")))
    assert (status, "pip install 'afterword[ray]'" in output) == (2, True)
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "pip install 'afterword[ray]'" in printed(str(write("replicas: 2")))[1]


def test_one_replica_is_replaced_by_another_that_starts_first(write):
    assert deployment_options(read_app(write("replicas: 1")))["max_surge_percent"] > 0


def test_requests_behind_serve_get_ids_of_afterwords_form():
    """Serve puts the header into the response, so a client's own id must not reach it."""
    seen: list[list[tuple[bytes, bytes]]] = []

    async def app(scope, receive, send):
        seen.append(scope["headers"])

    scope = {"type": "http", "headers": [(b"host", b"a"), (HEADER, b"mine")]}
    (middleware,) = middlewares()
    asyncio.run(middleware.cls(app)(scope, None, None))
    (headers,) = seen
    assert headers[0] == (b"host", b"a")
    assert re.fullmatch(rb"req_[0-9a-f]{32}", dict(headers)[HEADER])
    assert len(headers) == 2


def test_a_server_without_a_batch_manager_refuses_files_with_the_reason():
    service = Service(Config(), ModelManager([], keep_alive=None))
    request = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(service=service)))
    with pytest.raises(RequestError, match="one of several replicas") as refused:
        manager_of(request)
    assert (refused.value.status, refused.value.code) == (404, "batches_not_available")
