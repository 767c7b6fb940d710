"""Starts xllamacpp's server with arguments of llama-server. Its environment contains no other package."""

import argparse
from threading import Event

import xllamacpp  # type: ignore[import-not-found]


def main() -> None:
    """Serve until the process is interrupted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-np", "--parallel", type=int, default=4)
    parser.add_argument("-c", "--ctx-size", type=int, default=0)
    parser.add_argument("-kvu", "--kv-unified", action="store_true")
    parser.add_argument("-no-kvu", dest="kv_unified", action="store_false")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-fa", "--flash-attn", choices=("auto", "off", "on"), default="auto")
    options = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.hostnames, params.port = [options.host], options.port
    params.model.path = options.model
    params.n_parallel, params.n_ctx, params.kv_unified = options.parallel, options.ctx_size, options.kv_unified
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    chosen = {"auto": "AUTO", "off": "DISABLED", "on": "ENABLED"}[options.flash_attn]
    params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{chosen}")
    print("llama.cpp in this wheel:", xllamacpp.get_system_info(), flush=True)
    server = xllamacpp.Server(params)
    print("listening on", server.listening_address, flush=True)
    Event().wait()


if __name__ == "__main__":
    main()
