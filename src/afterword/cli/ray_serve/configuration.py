"""The configuration of Ray Serve for an application, and a KubeRay manifest around it. Does not import Ray."""

from __future__ import annotations

from typing import Any

from afterword.cli.ray_serve.app_file import WHOLE_SERVERS, ServeApp
from afterword.config import is_loopback
from afterword.errors import SettingError

DEPLOYMENT = "Afterword"
ENGINE = "Engine"
"""With `routing`, the deployment of the replicas that have the models, behind one ingress."""
IMPORT_PATH = "afterword.cli.ray_serve.application:build"
_CHECK_SECONDS = 5  # between two health checks of a replica
DRAIN_SECONDS = 5  # seconds that a draining replica stays reachable, so that every ingress stops choosing it


def cluster_variables(app: ServeApp) -> dict[str, str]:
    """Environment variables that all processes of Ray Serve need, so those of the Ray nodes.

    HAProxy by default repeats a request only if it cannot connect to a replica. A completion changes nothing, so a
    request to which a killed replica has sent no byte of an answer is repeated too.
    """
    if app.ingress == "ray":
        return {}
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_SECONDS),
    }


def replica_variables() -> dict[str, str]:
    """Environment variables of a replica's process.

    Serve's server and the application share one event loop. Otherwise Serve puts parts of responses into a queue with
    no limit between two threads, and a client that reads slowly would not slow the application down.
    The middleware gives requests ids of Afterword's form.
    """
    return {
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "afterword.api.middleware.request_ids:middlewares",
    }


def application_arguments(app: ServeApp) -> dict[str, Any]:
    """The arguments from which Serve builds the application."""
    routed = {} if app.routing == WHOLE_SERVERS else {"routing": app.routing, "drain": app.drain}
    return {"serve": dict(app.serve), **routed}


def shutdown_seconds(app: ServeApp) -> float:
    """How long Serve waits for the requests of a replica that it stops."""
    return app.drain + DRAIN_SECONDS


def deployments(app: ServeApp) -> dict[str, dict[str, Any]]:
    """The options of each deployment by its name.

    An ingress in front of engine replicas is one process without models. It reserves no resources, so that it needs no
    place of its own in the cluster.
    """
    options = deployment_options(app)
    if app.routing == WHOLE_SERVERS:
        return {DEPLOYMENT: options}
    actor = options["ray_actor_options"] | {"num_cpus": 0, "num_gpus": 0}
    most = app.max_queue + 1024 * app.max_replicas
    ingress = options | {"num_replicas": 1, "max_ongoing_requests": most, "ray_actor_options": actor}
    return {ENGINE: options, DEPLOYMENT: ingress | {"max_surge_percent": 100}}


def deployment_options(app: ServeApp) -> dict[str, Any]:
    """The options of the deployment with the replicas: their number, resources, rolling update.

    The queue is the server's own, so Serve hands a replica as many requests as that takes.
    """
    replicas: dict[str, Any] = {"num_replicas": app.min_replicas}
    if app.max_replicas > app.min_replicas:
        replicas = {
            "autoscaling_config": {
                "min_replicas": app.min_replicas,
                "max_replicas": app.max_replicas,
                "target_ongoing_requests": app.requests_per_replica,
            }
        }
    return replicas | {
        "max_ongoing_requests": app.max_queue + 1024,
        "max_surge_percent": app.surge,
        "graceful_shutdown_timeout_s": shutdown_seconds(app),
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": _CHECK_SECONDS,
        "ray_actor_options": {
            "num_cpus": app.cpus,
            "num_gpus": app.gpus,
            "runtime_env": {"env_vars": replica_variables()},
        },
    }


def serve_configuration(app: ServeApp) -> dict[str, Any]:
    """The configuration that `serve deploy` reads."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": app.host, "port": app.port},
        "applications": [
            {
                "name": app.name,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": application_arguments(app),
                "deployments": [{"name": name, **options} for name, options in deployments(app).items()],
            }
        ],
    }


def kuberay_manifest(app: ServeApp) -> dict[str, Any]:
    """A RayService with one group of workers, one replica for each. Raises `SettingError`."""
    import yaml

    if app.image is None:
        raise SettingError("--print kuberay: give image, the container image with afterword[ray], in the file.")
    if is_loopback(app.host):
        raise SettingError(
            f"--print kuberay: host: {app.host} can be reached only from its pod. Give host: 0.0.0.0, and API keys by "
            "keys or api-key-file; or allow-open if everyone who can reach the pods may use the server."
        )
    variables = [{"name": name, "value": value} for name, value in cluster_variables(app).items()]

    def pod(name: str, resources: dict[str, Any]) -> dict[str, Any]:
        container = {"name": name, "image": app.image, "env": variables, "resources": {"limits": resources}}
        return {"spec": {"containers": [container]}}

    most = app.max_replicas + -(-app.max_replicas * app.surge // 100)
    gpus = {"nvidia.com/gpu": app.gpus} if app.gpus else {}
    worker = {
        "groupName": "replicas",
        "replicas": app.min_replicas,
        "minReplicas": app.min_replicas,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": pod("ray-worker", {"cpu": app.cpus, **gpus}),
    }
    head = {"rayStartParams": {"num-cpus": "0"}, "template": pod("ray-head", {"cpu": 1})}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": app.name},
        "spec": {
            "serveConfigV2": yaml.safe_dump(serve_configuration(app), sort_keys=False),
            "rayClusterConfig": {
                # A fixed number of replicas needs it too: it adds the pods in which an update starts new replicas.
                "enableInTreeAutoscaling": most > app.min_replicas,
                "headGroupSpec": head,
                "workerGroupSpecs": [worker],
            },
        },
    }
