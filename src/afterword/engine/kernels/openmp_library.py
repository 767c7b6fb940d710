"""Makes a library that takes the place of libgomp.so.1, GCC's OpenMP library, on Linux systems without it.

The prebuilt llama.cpp calls ten functions of libgomp. Small images lack it, and without a compiler none can be made.
The ten functions are short where every region is executed by the one thread that meets it, so this module has their
machine code for each architecture. `library` puts a shared library (https://refspecs.linuxfoundation.org/elf/) around
it. The tests assemble the instructions that stand beside the machine code, and compare.

OpenMP lets a library give fewer threads than a program asks for, and llama.cpp asks how many it has. Our own kernels
have threads of their own.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

VERSIONS: Mapping[str, str] = MappingProxyType(
    {
        "GOMP_parallel": "GOMP_4.0",
        "GOMP_barrier": "GOMP_1.0",
        "GOMP_single_start": "GOMP_1.0",
        "GOMP_loop_nonmonotonic_dynamic_start": "GOMP_4.5",
        "GOMP_loop_nonmonotonic_dynamic_next": "GOMP_4.5",
        "GOMP_loop_end": "GOMP_1.0",
        "GOMP_atomic_start": "GOMP_1.0",
        "GOMP_atomic_end": "GOMP_1.0",
        "omp_get_thread_num": "OMP_1.0",
        "omp_get_num_threads": "OMP_1.0",
    }
)
"""The functions in the order of their code, with the versions of GCC's, which the dynamic linker compares."""

SLOT = 64  # bytes, from the beginning of one function to that of the next
_PAGE = 1 << 16  # bytes of the largest page of both architectures
LOCK = len(VERSIONS) * SLOT + _PAGE
"""Bytes from the beginning of the first function to the lock, which is behind the functions and in another page."""


@dataclass(frozen=True, slots=True)
class Code:
    """A function for GNU's assembler, to which `lock` is the address of the lock, and as machine code."""

    assembly: str
    machine_code: bytes


@dataclass(frozen=True, slots=True)
class Architecture:
    """`machine`: ELF's number. `functions`: the code of each function of `VERSIONS`."""

    machine: int
    functions: Mapping[str, Code]


def _functions(**codes: tuple[str, str]) -> Mapping[str, Code]:
    code = {name: Code(assembly, bytes.fromhex(digits)) for name, (assembly, digits) in codes.items()}
    return {
        "GOMP_parallel": code["parallel"],  # (body, data, …): calls body(data)
        "GOMP_barrier": code["nothing"],
        "GOMP_single_start": code["one"],  # this thread executes it
        # (start, end, step, chunk, *first, *past): gives all iterations; returns whether there are any
        "GOMP_loop_nonmonotonic_dynamic_start": code["loop_start"],
        "GOMP_loop_nonmonotonic_dynamic_next": code["zero"],  # none are left
        "GOMP_loop_end": code["nothing"],
        "GOMP_atomic_start": code["atomic_start"],  # another thread may be in a region of its own
        "GOMP_atomic_end": code["atomic_end"],
        "omp_get_thread_num": code["zero"],
        "omp_get_num_threads": code["one"],
    }


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "x86_64": Architecture(
            62,
            _functions(
                parallel=("mov %rdi, %rax; mov %rsi, %rdi; jmp *%rax", "4889f8 4889f7 ffe0"),
                nothing=("ret", "c3"),
                zero=("xor %eax, %eax; ret", "31c0 c3"),
                one=("mov $1, %eax; ret", "b801000000 c3"),
                loop_start=(
                    "mov %rdi, (%r8); mov %rsi, (%r9); xor %eax, %eax; xor %ecx, %ecx; cmp %rsi, %rdi; setl %al; "
                    "setg %cl; test %rdx, %rdx; cmovle %ecx, %eax; ret",
                    "498938 498931 31c0 31c9 4839f7 0f9cc0 0f9fc1 4885d2 0f4ec1 c3",
                ),
                atomic_start=(
                    "0: mov $1, %eax; xchg %eax, lock(%rip); test %eax, %eax; je 1f; pause; jmp 0b; 1: ret",
                    "b801000000 8705f5000100 85c0 7404 f390 ebed c3",
                ),
                atomic_end=("movl $0, lock(%rip); ret", "c705b600010000000000 c3"),
            ),
        ),
        "aarch64": Architecture(
            183,
            _functions(
                parallel=("mov x2, x0; mov x0, x1; br x2", "e20300aa e00301aa 40001fd6"),
                nothing=("ret", "c0035fd6"),
                zero=("mov w0, #0; ret", "00008052 c0035fd6"),
                one=("mov w0, #1; ret", "20008052 c0035fd6"),
                loop_start=(
                    "str x0, [x4]; str x1, [x5]; cmp x0, x1; cset w3, lt; cset w6, gt; cmp x2, #0; "
                    "csel w0, w3, w6, gt; ret",
                    "800000f9 a10000f9 1f0001eb e3a79f1a e6d79f1a 5f0000f1 60c0861a c0035fd6",
                ),
                atomic_start=(
                    "adr x1, lock; mov w2, #1; 0: ldaxr w0, [x1]; stxr w3, w2, [x1]; orr w0, w0, w3; cbnz w0, 0b; ret",
                    "01080810 22008052 20fc5f88 227c0388 0000032a a0ffff35 c0035fd6",
                ),
                atomic_end=("adr x1, lock; stlr wzr, [x1]; ret", "01060810 3ffc9f88 c0035fd6"),
            ),
        ),
    }
)
"""By `platform.machine`."""

_SONAME = "libgomp.so.1"
_LOCK_SIZE = 16  # bytes; the dynamic section behind it needs this alignment
_HEADERS = 64 + 4 * 56  # bytes of the ELF header and of four program headers


def load() -> ctypes.CDLL | None:
    """Load the library. Returns None on other architectures, and where the system does not let a process do that.

    The dynamic linker then takes it for the libgomp.so.1 that libraries need which are loaded later.
    """
    architecture = ARCHITECTURES.get(platform.machine())
    if architecture is None:
        return None
    try:
        descriptor = os.memfd_create("openmp_library")
    except OSError:
        return None
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        file.write(library(architecture))
        try:
            return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
        except OSError:
            return None


def library(architecture: Architecture) -> bytes:
    """A shared library with the functions. Its tables, code, lock and dynamic section follow one another."""
    versions = sorted(set(VERSIONS.values()))
    strings, places = _strings([_SONAME, *VERSIONS, *versions])
    tables = {
        "symbols": b"",  # they contain the address of the code, which is known when all sizes are
        "hash": _words("I", 1, len(VERSIONS) + 1, 1, 0, *range(2, len(VERSIONS) + 1), 0),  # one bucket
        "symbol versions": _words("H", 0, *(versions.index(each) + 2 for each in VERSIONS.values())),
        "versions": _version_definitions([_SONAME, *versions], places),
        "strings": strings,
    }
    symbols_size = 24 * (len(VERSIONS) + 1)
    addresses, end = {}, _HEADERS
    for name, table in tables.items():
        addresses[name] = end = _aligned(end, 8)
        end += len(table) or symbols_size
    code = _aligned(end, SLOT)
    tables["symbols"] = bytes(24) + b"".join(
        struct.pack("<IBBHQQ", places[name], 0x12, 0, 1, code + number * SLOT, SLOT)  # a global function
        for number, name in enumerate(VERSIONS)
    )
    dynamic = _dynamic_section(addresses, places[_SONAME], len(strings), len(versions) + 1)
    made = bytearray(_headers(architecture.machine, code + len(VERSIONS) * SLOT, len(dynamic)))
    for name, table in tables.items():
        made += bytes(addresses[name] - len(made)) + table
    made += bytes(code - len(made))
    for name in VERSIONS:
        made += architecture.functions[name].machine_code.ljust(SLOT, b"\0")
    return bytes(made) + bytes(_LOCK_SIZE) + dynamic


def _headers(machine: int, data: int, dynamic_size: int) -> bytes:
    """The ELF header and the program headers. `data`: where the lock and the dynamic section are in the file."""
    identification = b"\x7fELF\x02\x01\x01" + bytes(9)  # 64 bits, little endian
    shared_library = struct.pack("<16sHHIQQQIHHHHHH", identification, 3, machine, 1, 0, 64, 0, 0, 64, 56, 4, 64, 0, 0)
    data_size, dynamic = _LOCK_SIZE + dynamic_size, data + _LOCK_SIZE
    return shared_library + b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, offset, address, address, size, size, alignment)
        for kind, flags, offset, address, size, alignment in (
            (1, 5, 0, 0, data, _PAGE),  # loaded, to be read and executed
            (1, 6, data, data + _PAGE, data_size, _PAGE),  # loaded, to be read and written
            (2, 6, dynamic, dynamic + _PAGE, dynamic_size, 8),
            (0x6474E551, 6, 0, 0, 0, 16),  # the stack need not be executable
        )
    )


def _dynamic_section(addresses: Mapping[str, int], soname: int, strings_size: int, definitions: int) -> bytes:
    entries = (
        (14, soname),
        (4, addresses["hash"]),
        (5, addresses["strings"]),
        (6, addresses["symbols"]),
        (10, strings_size),
        (11, 24),  # bytes of a symbol
        (0x6FFFFFF0, addresses["symbol versions"]),
        (0x6FFFFFFC, addresses["versions"]),
        (0x6FFFFFFD, definitions),
        (0, 0),
    )
    return b"".join(struct.pack("<qQ", *entry) for entry in entries)


def _version_definitions(names: Sequence[str], places: Mapping[str, int]) -> bytes:
    """The library's name and the versions of its functions, numbered from 1."""
    made = b""
    for number, name in enumerate(names, 1):
        is_library, following = int(number == 1), 28 if number < len(names) else 0
        made += struct.pack("<HHHHIII", 1, is_library, number, 1, _elf_hash(name), 20, following)
        made += struct.pack("<II", places[name], 0)
    return made


def _elf_hash(name: str) -> int:
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high
    return value


def _strings(names: Sequence[str]) -> tuple[bytes, dict[str, int]]:
    """The table of strings, and the place of each in it."""
    table, places = b"\0", {}
    for name in names:
        places[name] = len(table)
        table += name.encode() + b"\0"
    return table, places


def _words(kind: str, *values: int) -> bytes:
    return struct.pack(f"<{len(values)}{kind}", *values)


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment
