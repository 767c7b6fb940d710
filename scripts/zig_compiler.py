"""A C++ compiler for hatch_build.py and tests/kernels that is Zig's: python scripts/zig_compiler.py TARGET OPTION…

Zig compiles for any version of glibc (`x86_64-linux-gnu.2.28`), and links its own C++ library statically. It has other
names of processors than GCC and Clang, so the options for levels of instructions are translated. Sources are compiled
and linked in two steps, because Zig compiles its C++ library for each processor for which it links: one for all levels
is enough.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PROCESSORS = {  # values of -march, and Zig's names
    "x86-64-v3": "x86_64_v3",
    "x86-64-v4": "x86_64_v4",
    "armv8.2-a+dotprod": "generic+v8_2a+dotprod",
}
OF_THE_LINKER = ("-shared", "-static-", "-Wl,")


def main(arguments: Sequence[str]) -> int:
    """Compile and link. Returns the exit status of the step that failed, or 0."""
    target, *options = arguments
    # Zig adds checks of undefined behaviour unless they are switched off.
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-fno-sanitize=undefined"]
    place = options.index("-o")
    output, options = options[place + 1], options[:place] + options[place + 2 :]
    sources = [each for each in options if each.endswith(".cpp")]
    kept = translated([each for each in options if each not in sources and not each.startswith(OF_THE_LINKER)])
    link = ["-pthread", "-Wl,-s", *(each for each in options if each == "-shared")]
    with tempfile.TemporaryDirectory() as folder:
        compiled = [str(Path(folder, f"{number}.o")) for number in range(len(sources))]
        for source, made in zip(sources, compiled, strict=True):
            done = subprocess.run([*zig, *kept, source, "-c", "-o", made], check=False)
            if done.returncode:
                return done.returncode
        return subprocess.run([*zig, *link, "-o", output, *compiled], check=False).returncode


def translated(options: Sequence[str]) -> list[str]:
    """The options with one for Zig's processor in place of `-march=` and of the instructions that `-m` adds."""
    named = [each.removeprefix("-march=") for each in options if each.startswith("-march=")]
    added = [each.removeprefix("-m") for each in options if each.startswith("-m") and "=" not in each]
    others = [each for each in options if not each.startswith("-m")]
    return [*others, *(f"-mcpu={'+'.join([PROCESSORS[each], *added])}" for each in named)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
