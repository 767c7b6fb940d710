"""Every setting, once: one frozen value that the command line fills and the rest reads."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from afterword.batch.batch_limits import BatchLimits
from afterword.completion.request_limits import RequestLimits
from afterword.engine.messages import KvType
from afterword.engine.protocol import Promise
from afterword.errors import SettingError
from afterword.keys.key import Key
from afterword.keys.key_limits import KeyLimits
from afterword.system.resources import cores
from afterword.transport.transport_limits import TransportLimits

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[1-9][0-9]{0,4})?")
_OWN_PORT = re.compile(r"http://.*:80|https://.*:443")

SMALL_MODEL = 64 * 2**20
"""Weights below this many bytes are computed by one thread: with more, waiting costs more than computing."""

TESTED_ARCHITECTURES = frozenset(
    (
        *("arcee", "baichuan", "bitnet", "bloom", "chatglm", "codeshell", "cohere2", "command-r", "deci"),
        *("ernie4_5", "exaone", "exaone4", "falcon", "gemma", "gemma2", "gemma3", "glm4", "gpt2", "gptneox"),
        *("granite", "hunyuan-dense", "internlm2", "jais", "jais2", "llama", "maincoder", "minicpm"),
        *("mistral3", "mpt", "nemotron", "olmo", "olmo2", "openelm", "orion", "pangu-embedded", "phi2", "phi3"),
        *("plamo", "plamo3", "qwen", "qwen2", "qwen2vl", "qwen3", "qwen3vl", "refact", "seed_oss", "smollm3"),
        *("stablelm", "starcoder", "starcoder2", "xverse"),
    )
)
"""Dense architectures whose numbers were shown to be the same in any company (tests/engine/test_architectures.py)."""

KERNEL_TYPES = frozenset({"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K"})
"""Matrices that kernels of our own (engine/llama/products.hpp) multiply, where the processor has the instructions."""

LIBRARY_TYPES = frozenset({"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_1", "Q5_0", "Q5_1"})
"""Matrices, as they lie in the file, whose products by llama.cpp's kernels have the same bits in any company."""

REPACKED_TYPES = frozenset({"Q8_0", "Q4_0", "IQ4_NL", "IQ4_XS"})
"""Matrices of which llama.cpp's kernels do so when they are repacked."""

REPACKED_WITH = frozenset({"Q6_K"})
"""Matrices that are in files of the types above, and of which the same holds."""

ONE_SEQUENCE = frozenset(("plamo2", "deepseek4"))
"""Architectures of which llama.cpp computes several sequences wrongly: numbers differ by nats, or the process ends."""

GPU_ARCHITECTURES = frozenset({"llama", "qwen2"})
GPU_TYPES = frozenset({"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"})
"""What was measured to give the same bits on a GPU when all passes of single tokens have the same shape."""

CHUNK_GRID = 64
"""Where passes over a prompt end, in tokens, when numbers do depend on how tokens are grouped."""


@dataclass(frozen=True, slots=True)
class WeightTypes:
    """What of a model decides how its numbers are computed: the types are those that its matrices really have."""

    architecture: str
    types: frozenset[str]
    experts: int = 0

    @property
    def uses_kernels(self) -> bool:
        """Whether kernels of our own are to multiply some of its matrices, the library's those of `LIBRARY_TYPES`."""
        return not self.experts and bool(self.types & KERNEL_TYPES) and self.types <= KERNEL_TYPES | LIBRARY_TYPES

    @property
    def repacked(self) -> bool:
        """Whether llama.cpp's products of repacked matrices are the same in any company."""
        return bool(self.types & REPACKED_TYPES) and self.types <= REPACKED_TYPES | REPACKED_WITH

    def promise(self, kv_type: KvType, *, own_products: bool) -> Promise:
        """The most that can be promised on a CPU. The loaded engine decides: it knows which kernels compute what."""
        sound = self.uses_kernels if own_products else self.repacked or self.types <= LIBRARY_TYPES
        if self.experts or self.architecture not in TESTED_ARCHITECTURES or not self.types or not sound:
            return "none"
        return "exact" if kv_type == "exact" else "reproducible"

    def promise_on_gpu(self, kv_type: KvType, layers: int, full: bool) -> Promise:
        """What was measured on a GPU. `full`: all passes of single tokens have the same shape."""
        tested = self.architecture in GPU_ARCHITECTURES and bool(self.types) and self.types <= GPU_TYPES
        measured = tested and layers == -1 and kv_type == "f16" and not self.experts
        return "reproducible" if full and measured else "none"


def advice(file_type: str, architecture: str = "") -> str | None:
    """What is lost with an architecture, or what another type of the same model would bring on a CPU; None if little.

    As measured (docs/performance.md).
    """
    if architecture in ONE_SEQUENCE:
        return (
            f"One sequence is computed at a time: the installed llama.cpp computes several of {architecture} wrongly."
        )
    if file_type in ("F16", "BF16"):
        return (
            f"A Q8_0 file of this model would take half the memory of {file_type}, generate 1.4 to 1.7 times "
            "as fast (as measured)."
        )
    if file_type.endswith(("_K", "_K_S", "_K_M", "_K_L")):
        return "A Q4_0 file of this model would generate faster (1.2 to 1.4 times, as measured against Q4_K_M)."
    return None


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How a model is run. None: chosen from the model and the machine.

    `reproducible`: on a GPU, where that costs something.
    """

    context: int | None = None
    parallel: int | None = None
    threads: int | None = None
    batch: int = 256
    kv_type: KvType | None = None
    gpu_layers: int = 0
    reproducible: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.batch < CHUNK_GRID or self.batch > 4096:
            raise SettingError(f"--batch {self.batch}: a pass has from {CHUNK_GRID} to 4096 tokens of a prompt.")
        most = 4 * cores()
        if self.threads is not None and not 1 <= self.threads <= most:
            raise SettingError(f"--threads {self.threads}: set from 1 to {most}, four for each of the cores.")
        if self.gpu_layers < -1:
            raise SettingError(f"--gpu-layers {self.gpu_layers}: give a number of layers, or -1 for all of them.")
        if self.reproducible and self.gpu_layers != -1:
            raise SettingError(
                "--reproducible goes with --gpu-layers -1; on a CPU numbers are reproducible as far as they can be."
            )
        if self.reproducible and self.kv_type not in (None, "f16"):
            raise SettingError(f"--reproducible goes with --kv-type f16, not {self.kv_type}.")


@dataclass(frozen=True, slots=True)
class Config:
    """How the server is run.

    `keys` were given at the start; more are in the store `keys_file`. With `shared_cache` what was computed for one key
    is used for others too. `log`: the file that a line a request is added to. `metrics_prefix`: what names in /metrics
    begin with; with `metrics_open` it needs no key. `traces`: a span a request is told to a collector.
    `cors_origins`: web pages that may use it, beside those of this machine; with keys, all may try. `special_text`:
    text that spells a special token becomes that token. `allowed_hosts`: names that the server answers to, beside
    addresses and its own; `*` for any, as where keys are asked for and none are given. `proxies` are believed when they
    say for whom they ask. When it is told to end, it goes on for `drain_delay` seconds and then lets answers finish
    for `grace` seconds. Uploaded files and batches are kept in `batch_dir`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[Key, ...] = ()
    keys_file: Path | None = None
    shared_cache: bool = False
    log: Path | None = None
    metrics_prefix: str = "afterword"
    metrics_open: bool = False
    traces: bool = False
    allow_open: bool = False
    cors_origins: tuple[str, ...] = ()
    special_text: bool = True
    allowed_hosts: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    drain_delay: float = 0.0
    grace: float = 30.0
    batch_dir: Path | None = None
    limits: RequestLimits = field(default_factory=RequestLimits)
    batch: BatchLimits = field(default_factory=BatchLimits)
    transport: TransportLimits = field(default_factory=TransportLimits)
    key_limits: KeyLimits = field(default_factory=KeyLimits)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.metrics_prefix):
            raise SettingError(f"--metrics-prefix {self.metrics_prefix}: letters, digits and _, no digit first.")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin) or _OWN_PORT.fullmatch(origin):
                raise SettingError(
                    f"--cors-origin {origin}: write SCHEME://HOST or SCHEME://HOST:PORT as browsers do, in lower case, "
                    "without a path and without the scheme's own port, such as https://pages.example.org; or *."
                )
        if not self.requires_key and not self.allow_open and not is_loopback(self.host):
            raise SettingError(
                f"--host {self.host} can be reached from other machines and there are no API keys. Give --keys or "
                "--api-key, "
                "or --allow-open if anyone who can reach it may use it."
            )

    @property
    def requires_key(self) -> bool:
        """Whether a key is needed, even if there is none yet."""
        return bool(self.keys) or self.keys_file is not None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
