"""Model files with errors in their headers, and a process that loads them as the worker does."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch
from afterword.engine.messages import LoadModel
from afterword.errors import AfterwordError
from oracle.tiny import write_tiny

TIMEOUT = 20  # seconds within which a file must load
LIVED, REFUSED, DIED, HUNG = "lived", "refused", "died", "hung"
EDGES = (0, 1, 2, 5, 7, 8, 9, 31, 32, 33, 127, 255, 256, 2**16, 2**31 - 1, 2**31, 2**31 + 1, 2**31 + 2, 2**32 - 1)
WIDE = (0, 1, 2**31, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def bases(folder: Path) -> list[bytes]:
    """Valid files with several kinds of vocabulary and architecture."""
    plain = write_tiny(folder / "bytes.gguf")
    pieces = write_tiny(folder / "spm.gguf", vocabulary="spm")
    other = write_tiny(folder / "qwen2.gguf", arch="qwen2", file_type="Q8_0")
    return [path.read_bytes() for path in (plain, pieces, other)]


def mutated(data: bytes, random: Random) -> bytes:
    """The same file with one to three errors, nearly always in its header."""
    end = len(data) if random.random() < 0.05 else max(64, data.find(b"token_embd.weight") + 4096)
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        _change(changed, min(end, len(changed)), random)
    return bytes(changed)


def _change(data: bytearray, end: int, random: Random) -> None:
    position = random.randrange(8, max(9, end - 8))
    match random.randrange(7):
        case 0:
            data[position] ^= 1 << random.randrange(8)
        case 1:
            data[position] = random.randrange(256)
        case 2:
            data[position : position + 4] = struct.pack("<I", random.choice(EDGES))
        case 3:
            data[position : position + 8] = struct.pack("<Q", random.choice(WIDE))
        case 4:
            other = random.randrange(8, max(9, end - 64))
            data[position : position + 16] = data[other : other + 16]
        case 5:
            _change_value(data, end, random)
        case _:
            del data[random.randrange(len(data)) :]


def _change_value(data: bytearray, end: int, random: Random) -> None:
    """Change a number or a flag after one of the metadata keys."""
    names = (b"llama.", b"qwen2.", b"tokenizer.ggml.", b"general.", b"split.")
    keys = [position for name in names for position in _positions(data, name, end)]
    if keys:
        start = random.choice(keys)
        length = struct.unpack_from("<Q", data, start - 8)[0]
        value = start + length + 4
        if length < 100 and value + 8 < len(data):
            data[value : value + 4] = struct.pack("<I", random.choice(EDGES))


def _positions(data: bytearray, name: bytes, end: int) -> Iterator[int]:
    position = data.find(name, 8, end)
    while position >= 0:
        yield position
        position = data.find(name, position + 1, end)


def load_result(path: Path) -> str:
    """The result of loading a file in a child process, with the signal that ended it."""
    child = os.fork()
    if child == 0:
        _load_and_leave(path)
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.002)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return HUNG
    if os.WIFSIGNALED(status):
        return f"{DIED} ({signal.Signals(os.WTERMSIG(status)).name})"
    return {0: LIVED, 3: REFUSED}.get(os.waitstatus_to_exitcode(status), f"{DIED} (exit {status >> 8})")


def _load_and_leave(path: Path) -> None:
    """In the child process: load a file as the worker does, and run one forward pass."""
    code = 1
    try:
        from afterword.engine.llama import library
        from afterword.engine.llama.runner import LlamaRunner
        from afterword.engine.llama.vocabulary import make_model_info

        library.initialize(False)
        frame = LoadModel(
            str(path), context=64, sequences=2, threads=1, chunk=64, kv_type="exact", gpu_layers=0, verbose=False
        )
        runner = LlamaRunner(frame)
        model_info, vocabulary = make_model_info(runner, frame)
        for text in ("é漢😀\x00\x7f <s></s>", " \n\n\t  ", "".join(map(chr, range(256))), "a" * 5000):
            vocabulary.tokenize(text, True)
        tokens = vocabulary.tokenize("Once upon a time, <|endoftext|>", True)[:8] or (0,)
        runner.run(ForwardBatch((), (BatchEntry(0, 0, tokens, 1),)))
        assert model_info.pieces
        code = 0
    except AfterwordError:
        code = 3
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def main() -> None:
    """`python -m tests.chaos.mutations`: reads a path per line and writes a result per line."""
    from afterword.engine.llama import library  # imported once, so that no child has to

    assert library
    for line in sys.stdin:
        print(load_result(Path(line.rstrip("\n"))), flush=True)


if __name__ == "__main__":
    main()
