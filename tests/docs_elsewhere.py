"""The blocks of the documents that the default tests do not always run, and why; by page and first line.

What needs a program that may not be here is run where it is. What needs Python packages that `make clients` installs is
run by it (`tests/clients/test_guides.py`). Of the rest only the spelling is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from shutil import which


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Why a block is not run. `program`: where it is installed, it is. `modules`: what `make clients` needs for it."""

    reason: str
    program: str = ""
    modules: tuple[str, ...] = ()

    @property
    def possible(self) -> bool:
        """Whether the default tests can run it here all the same."""
        return bool(self.program) and which(self.program) is not None


REGISTRY = Elsewhere("installs from a package registry")
DOCKER = Elsewhere("needs a Docker engine; tests/test_image.py checks the Dockerfile")
SYSTEM = Elsewhere("changes the machine: users and services")
PROGRAM = Elsewhere("needs a load generator that the tests do not install")

ELSEWHERE = {
    ("bench/README.md", ".venv/bin/afterword serve model.gguf --port 8000 --context 2048 --parallel 16"): Elsewhere(
        "compiles llama-server and measures for a quarter of an hour; tests/test_bench.py runs the bench"
    ),
    ("docs/api.md", "pip install openapi-python-client"): REGISTRY,
    ("docs/api.md", "import json"): Elsewhere("needs a generated client; tests/clients runs it"),
    ("docs/architectures.md", "python -m tests.architectures --markdown"): Elsewhere(
        "judges all architectures for half an hour; tests/architectures/test_architectures.py runs a part of it"
    ),
    (
        "docs/models.md",
        "afterword serve hf:owner/repo:Q8_0 --alias base --lora poems=poems.gguf --lora half=poems.gguf@0.5",
    ): Elsewhere("needs a LoRA adapter; tests/api/test_several_adapters.py serves such models"),
    (
        "docs/models.md",
        "afterword serve hf:owner/repo:Q8_0 --alias base --keys --lora-dir adapters --lora-key 1f0a9c3e",
    ): Elsewhere("needs a LoRA adapter; tests/api/test_loaded_adapters.py runs such a server"),
    (
        "docs/models.md",
        "curl http://127.0.0.1:8000/v1/load_lora_adapter "
        '-H "Authorization: Bearer $KEY" -H "Content-Type: application/json" \\',
    ): Elsewhere("needs a LoRA adapter; tests/api/test_loaded_adapters.py sends such requests"),
    ("docs/vllm.md", "python3 -m venv vllm-env"): Elsewhere("installs vLLM from a package registry"),
    (
        "docs/vllm.md",
        "afterword serve models/Llama-3.2-1B --engine vllm --vllm-python vllm-env/bin/python -- --dtype bfloat16 "
        "--gpu-memory-utilization 0.8",
    ): Elsewhere("needs vLLM and a model; tests/with_vllm starts such servers"),
    (
        "docs/vllm.md",
        "afterword serve models/Llama-3.2-1B --engine http --upstream http://127.0.0.1:8000 --host 0.0.0.0 --port 9000 "
        "--keys",
    ): Elsewhere("needs a vLLM server and a model; tests/engine/http starts such servers with a scripted upstream"),
    ("docs/scale.md", "pip install 'afterword[ray]'"): REGISTRY,
    ("docs/scale.md", "afterword deploy app.yaml"): Elsewhere("needs Ray; tests/with_ray runs such an application"),
    (
        "docs/scale.md",
        "export RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=5",
    ): Elsewhere("needs Ray; tests/with_ray updates such an application"),
    ("docs/scale.md", "python -m bench.cluster --picture routing.svg"): Elsewhere(
        "simulates for a minute; tests/test_bench_cluster.py runs a small case"
    ),
    ("training/README.md", "python3 -m venv training-venv"): Elsewhere("trains for hours, with PyTorch"),
    ("docs/comparison.md", "python tests/conformance --url http://127.0.0.1:8000/v1 || test $? = 1"): Elsewhere(
        "takes seconds, and tests/conformance/test_conformance.py runs the same cases"
    ),
    ("docs/guides/deploy.md", "python3 -m venv venv && venv/bin/pip install afterword-0.1.0-*.whl"): REGISTRY,
    ("docs/guides/deploy.md", "sudo useradd --system --create-home --home-dir /var/lib/afterword afterword"): SYSTEM,
    ("docs/guides/deploy.md", "sudo systemctl enable --now afterword"): SYSTEM,
    ("docs/guides/deploy.md", "make wheel"): DOCKER,
    (
        "docs/guides/deploy.md",
        "docker run -p 8000:8000 -e AFTERWORD_API_KEY=choose-a-long-one -v /path/to/models:/models:ro afterword "
        "/models/model.gguf --context 8192",
    ): DOCKER,
    ("docs/guides/deploy.md", "docker build -t afterword:cuda -f Dockerfile.cuda ."): DOCKER,
    ("docs/guides/evaluate.md", 'pip install "lm-eval[api]"'): REGISTRY,
    ("docs/guides/evaluate.md", "lm_eval run --model local-completions --tasks hellaswag \\"): Elsewhere(
        "needs lm-eval; run on a task that needs no network", modules=("lm_eval",)
    ),
    (
        "docs/guides/load.md",
        "hey -n 40 -c 8 -m POST -T application/json "
        """-d '{"prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": true}' \\""",
    ): Elsewhere("needs hey", program="hey"),
    (
        "docs/guides/load.md",
        "ab -l -n 40 -c 8 -p body.json -T application/json http://127.0.0.1:8000/v1/completions",
    ): Elsewhere("needs ApacheBench", program="ab"),
    ("docs/guides/load.md", "wrk -t 2 -c 8 -d 1s -s post.lua http://127.0.0.1:8000/v1/completions"): Elsewhere(
        "needs wrk", program="wrk"
    ),
    ("docs/guides/load.md", "vllm bench serve --backend openai --base-url http://127.0.0.1:8000 \\"): PROGRAM,
    (
        "docs/guides/load.md",
        "guidellm run --backend "
        "kind=openai_http,target=http://127.0.0.1:8000,request_format=/v1/completions,model=afterword-tiny \\",
    ): PROGRAM,
}
