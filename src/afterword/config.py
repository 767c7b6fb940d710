"""All settings as frozen values. The command line creates them, and everything else reads them."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from afterword.batch.batch_limits import BatchLimits
from afterword.completion.model_defaults import ModelDefaults
from afterword.completion.request_limits import RequestLimits
from afterword.engine.messages import KvType, Speculation
from afterword.engine.protocol import Promise
from afterword.errors import SettingError
from afterword.keys.key import Key
from afterword.keys.key_limits import KeyLimits
from afterword.system.resources import cores
from afterword.transport.transport_limits import TransportLimits

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[1-9][0-9]{0,4})?")
_DEFAULT_PORT = re.compile(r"http://.*:80|https://.*:443")

SMALL_MODEL = 64 * 2**20
"""A model with fewer bytes of weights is computed by one thread: more threads would wait longer than they compute."""

RECURRENT_ARCHITECTURES = frozenset(
    ("falcon-h1", "granitehybrid", "jamba", "lfm2", "mamba", "mamba2", "nemotron_h", "qwen35", "rwkv7")
)
"""Those of `TESTED_ARCHITECTURES` with recurrent layers."""

RECURRENT_MIXTURES = frozenset(
    ("granitehybrid", "jamba", "kimi-linear", "lfm2moe", "nemotron_h_moe", "qwen35moe", "qwen3next")
)
"""The same for `TESTED_MIXTURES`."""

TESTED_ARCHITECTURES = frozenset(
    (
        *("apertus", "hrm_text", "hunyuan_vl", "nanbeige", "paddleocr", "talkie"),
        *("arcee", "baichuan", "bitnet", "bloom", "chatglm", "codeshell", "cohere2", "command-r", "deci"),
        *("deepseek2", "ernie4_5", "exaone", "exaone4", "falcon", "gemma", "gemma2", "gemma3", "gemma3n", "gemma4"),
        *("glm4", "gpt2", "gptneox", "granite", "granite_swa", "hunyuan-dense", "internlm2", "jais", "jais2", "llama"),
        *("k2-horizon", "maincoder", "minicpm", "minicpm3"),
        *("mistral3", "mpt", "muse-glimmer", "nemotron", "olmo", "olmo2", "openelm", "orion", "pangu-embedded"),
        *("phi2", "phi3", "plamo", "plamo3", "qwen", "qwen2", "qwen2vl", "qwen3", "qwen3vl", "refact", "seed_oss"),
        *("smollm3", "spark2_5", "stablelm", "starcoder", "starcoder2", "xverse"),
        *RECURRENT_ARCHITECTURES,
    )
)
"""Architectures without experts that give a sequence the same bits, with any other sequences in its forward passes.

Measured by tests/architectures, like those below.
"""

TESTED_MIXTURES = frozenset(
    (
        *("afmoe", "arctic", "bailingmoe", "bailingmoe2", "cohere2moe", "dbrx", "deepseek", "deepseek2", "dots1"),
        *("deepseek2-ocr", "ernie4_5-moe", "gemma4", "granite_swa", "hy_v4", "laguna", "maple", "mimo2", "mistral3"),
        *("k2-horizon", "mistral4", "step35"),
        *(
            "exaone-moe",
            "glm4moe",
            "gpt-oss",
            "granite",
            "granitemoe",
            "grovemoe",
            "hunyuan-moe",
            "hy_v3",
            "llama",
            "llama4",
        ),
        *("mellum", "minicpm", "minimax-m2", "olmoe", "phimoe", "qwen2moe", "qwen3moe", "qwen3vlmoe", "smallthinker"),
        *RECURRENT_MIXTURES,
    )
)
"""Architectures of mixtures of experts for which the same holds, if Afterword's kernels compute all products.

Some architectures have dense models too, so a name may be in both sets.
"""

KERNELS_ONLY = (
    RECURRENT_ARCHITECTURES
    | RECURRENT_MIXTURES
    | {
        *("apertus", "deepseek2", "deepseek2-ocr", "gemma3n", "hrm_text", "hunyuan_vl", "hy_v4", "k2-horizon"),
        *("laguna", "maple", "mimo2", "minicpm3", "mistral4", "nanbeige", "paddleocr", "step35", "talkie"),
    }
)
"""Architectures of both sets that were tested only with all products of Afterword's kernels and `--kv-type exact`."""

KERNEL_TYPES = frozenset(
    (
        *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "MXFP4"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    )
)
"""Weight types that Afterword's kernels (engine/kernels/matmul.hpp) multiply if the processor has the instructions."""

LIBRARY_TYPES = frozenset({"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_1", "Q5_0", "Q5_1"})
"""Weight types, as stored in the file, for which llama.cpp's matmuls give the same bits in every forward batch."""

REPACKED_TYPES = frozenset({"Q8_0", "Q4_0", "IQ4_NL", "IQ4_XS"})
"""Weight types for which llama.cpp's matmuls do so after it has repacked the weights."""

REPACKED_WITH = frozenset({"Q6_K"})
"""Weight types that occur in files of the types above and for which the same holds."""

ONE_SEQUENCE = frozenset(("plamo2", "deepseek4"))
"""Architectures for which llama.cpp computes several sequences wrongly: results differ by nats, or the process ends."""

GPU_ARCHITECTURES = frozenset({"llama", "qwen2"})
GPU_TYPES = frozenset({"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"})
"""Measured to give the same bits on a GPU when all decode passes have the same shape."""

LEAST_USEFUL_CONTEXT = 16
"""The least tokens of one sequence that the operator can set."""

CHUNK_GRID = 64
"""Chunk length in tokens of prefill passes where results depend on how tokens are grouped into passes."""


@dataclass(frozen=True, slots=True)
class WeightTypes:
    """The facts about a model that decide how it is computed. `types` are the types that its matrices really have."""

    architecture: str
    types: frozenset[str]
    experts: int = 0

    @property
    def uses_kernels(self) -> bool:
        """Whether Afterword's kernels multiply all of its matrices, where the processor has the instructions."""
        return bool(self.types) and self.types <= KERNEL_TYPES

    @property
    def repacked(self) -> bool:
        """Whether llama.cpp's matmuls of repacked weights give the same bits in every forward batch."""
        return bool(self.types & REPACKED_TYPES) and self.types <= REPACKED_TYPES | REPACKED_WITH

    def promise(self, kv_type: KvType, *, with_kernels: bool) -> Promise:
        """The strongest promise for a CPU. The loaded engine may lower it: it knows which kernels compute what.

        `with_kernels`: whether Afterword's kernels multiply the matrices.
        """
        if self.architecture in KERNELS_ONLY:
            constant = with_kernels and self.types <= KERNEL_TYPES and kv_type == "exact"
        elif with_kernels:
            constant = self.uses_kernels
        else:  # llama.cpp's products of experts were not tested
            constant = not self.experts and (self.repacked or self.types <= LIBRARY_TYPES)
        tested = TESTED_MIXTURES if self.experts else TESTED_ARCHITECTURES
        if self.architecture not in tested or not self.types or not constant:
            return "none"
        return "exact" if kv_type == "exact" else "reproducible"

    def promise_on_gpu(self, kv_type: KvType, layers: int, fixed_shape: bool) -> Promise:
        """The promise for a GPU, as measured. `fixed_shape`: all decode passes have the same shape."""
        tested = self.architecture in GPU_ARCHITECTURES and bool(self.types) and self.types <= GPU_TYPES
        measured = tested and layers == -1 and kv_type == "f16" and not self.experts
        return "reproducible" if fixed_shape and measured else "none"


def advice(file_type: str, architecture: str = "") -> str | None:
    """A note for the user: what the architecture costs, or what another weight type would gain on a CPU.

    None if there is little to gain. The figures are those of docs/performance.md.
    """
    if architecture in ONE_SEQUENCE:
        return f"One sequence runs at a time: the installed llama.cpp computes several of {architecture} wrongly."
    if file_type in ("F16", "BF16"):
        return (
            f"A Q8_0 file of this model would need half the memory of {file_type} and generate 1.4 to 1.7 times as "
            "fast (docs/performance.md)."
        )
    if file_type.endswith(("_K", "_K_S", "_K_M", "_K_L")):
        return "A Q4_0 file of this model would generate 1.2 to 1.4 times as fast as Q4_K_M (docs/performance.md)."
    return None


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How a model is run. None means that the value is chosen from the model and the machine.

    `context`: tokens of one sequence. `parallel`: sequences. `batch`: prompt tokens in one forward pass. `gpu_layers`:
    -1 for all. `reproducible`: make results reproducible on a GPU too, at a cost in speed. `cache_dir`: the folder in
    which prefixes are kept, at most `cache_bytes` bytes; None: they are kept in memory only.
    `share_weights`: several models use the weights of one file, so no process packs copies of them.
    `infill_template`: the layout of infill prompts, empty for the model's own. `speculate`: see `LoadModel`;
    None: "ngram" where the engine can verify drafts.
    `draft_model`: the model spec of the draft model, empty for none.
    """

    context: int | None = None
    parallel: int | None = None
    threads: int | None = None
    batch: int = 256
    kv_type: KvType | None = None
    gpu_layers: int = 0
    reproducible: bool = False
    verbose: bool = False
    infill_template: str = ""
    cache_dir: Path | None = None
    cache_bytes: int = 10 * 10**9
    speculate: Speculation | None = None
    draft_model: str = ""
    share_weights: bool = False

    def __post_init__(self) -> None:
        if self.context is not None and self.context < LEAST_USEFUL_CONTEXT:
            raise SettingError(f"--context {self.context} is too short. Give {LEAST_USEFUL_CONTEXT} tokens or more.")
        if self.parallel is not None and self.parallel < 1:
            raise SettingError(f"--parallel {self.parallel}: give a number of sequences, 1 or more.")
        if self.batch < CHUNK_GRID or self.batch > 4096:
            raise SettingError(
                f"--batch {self.batch}: give a number from {CHUNK_GRID} to 4096, the prompt tokens in one forward pass."
            )
        maximum = 4 * cores()
        if self.threads is not None and not 1 <= self.threads <= maximum:
            raise SettingError(f"--threads {self.threads}: give a number from 1 to {maximum}, four times the cores.")
        if self.gpu_layers < -1:
            raise SettingError(f"--gpu-layers {self.gpu_layers}: give a number of layers, or -1 for all layers.")
        if self.reproducible and self.gpu_layers != -1:
            raise SettingError(
                "--reproducible requires --gpu-layers -1. On a CPU results are as reproducible as possible without it."
            )
        if self.reproducible and self.kv_type not in (None, "f16"):
            raise SettingError(f"--reproducible requires --kv-type f16, not {self.kv_type}.")


@dataclass(frozen=True, slots=True)
class Config:
    """How the server is run. Times are in seconds.

    - `keys`: API keys given on the command line; `keys_file`: the key store with further keys.
    - `shared_cache`: use the prefix cache of one key's requests for other keys too.
    - `log`: the file to which the server appends one line per request.
    - `metrics_prefix`: the beginning of the names in /metrics; `metrics_underscores`: `_` follows it, not `:`;
      `metrics_keys`: how many API keys are counted apart, 0 for none; `metrics_open`: /metrics needs no key.
    - `traces`: send one OpenTelemetry span per request.
    - `allow_open`: start without keys on an address that other machines can reach.
    - `cors_origins`: web origins that may use the server beside those of this machine; with keys every origin may.
    - `special_text`: text that spells a special token becomes that token.
    - `defaults`: further names of models, and default values of request fields for names.
    - `infill_rerank`: fill gaps with models without infill tokens too.
    - `infill_trim`: leave out parts of infill prompts that are too long for the context.
    - `bos_before_ids`: prompts of token ids get a BOS as texts do, unless the request says otherwise.
    - `allowed_hosts`: `Host` names that the server accepts beside addresses and its own name. `*` accepts every name,
      as does an empty tuple where keys are required.
    - `proxies`: addresses with a trusted `X-Forwarded-For` header.
    - `drain_delay`, `grace`: at shutdown the server keeps serving for `drain_delay`, then lets responses finish for
      `grace`.
    - `batch_dir`: the folder of uploaded files and batches.
    - `lora_dir`: the folder whose adapters requests may load, None for none; `lora_keys`: the ids of the API keys with
      which they may.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[Key, ...] = ()
    keys_file: Path | None = None
    shared_cache: bool = False
    log: Path | None = None
    metrics_prefix: str = "afterword"
    metrics_underscores: bool = False
    metrics_keys: int = 0
    metrics_open: bool = False
    traces: bool = False
    allow_open: bool = False
    cors_origins: tuple[str, ...] = ()
    special_text: bool = True
    infill_trim: bool = False
    infill_rerank: bool = False
    defaults: tuple[ModelDefaults, ...] = ()
    bos_before_ids: bool = False
    allowed_hosts: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    drain_delay: float = 0.0
    grace: float = 30.0
    batch_dir: Path | None = None
    lora_dir: Path | None = None
    lora_keys: tuple[str, ...] = ()
    limits: RequestLimits = field(default_factory=RequestLimits)
    batch: BatchLimits = field(default_factory=BatchLimits)
    transport: TransportLimits = field(default_factory=TransportLimits)
    key_limits: KeyLimits = field(default_factory=KeyLimits)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.metrics_prefix):
            raise SettingError(
                f"--metrics-prefix {self.metrics_prefix}: use letters, digits and _, and do not begin with a digit."
            )
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin) or _DEFAULT_PORT.fullmatch(origin):
                raise SettingError(
                    f"--cors-origin {origin}: write SCHEME://HOST or SCHEME://HOST:PORT in lower case as browsers do, "
                    "without a path and without the scheme's default port, such as https://pages.example.org; or *."
                )
        self._check_lora()
        if not self.requires_key and not self.allow_open and not is_loopback(self.host):
            raise SettingError(
                f"--host {self.host} can be reached from other machines and there are no API keys. Give --keys or "
                "--api-key; or --allow-open if everyone who can reach the server may use it."
            )

    def _check_lora(self) -> None:
        if (self.lora_dir is None) != (not self.lora_keys):
            raise SettingError(
                "--lora-dir and --lora-key belong together: the folder whose adapters requests may load, and the IDs "
                "of the API keys with which they may."
            )
        if self.lora_dir is not None and not self.requires_key:
            raise SettingError("--lora-key names API keys, but the server has none. Give --keys or --api-key.")
        if self.lora_dir is not None and not self.lora_dir.is_dir():
            raise SettingError(f"--lora-dir {self.lora_dir}: there is no such folder.")

    @property
    def metrics_names_begin(self) -> str:
        """The prefix of the names in /metrics with the character that follows it."""
        return self.metrics_prefix + ("_" if self.metrics_underscores else ":")

    @property
    def requires_key(self) -> bool:
        """Whether requests need a key, even if none has been created yet."""
        return bool(self.keys) or self.keys_file is not None


def is_loopback(host: str) -> bool:
    """Whether an address can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
