"""The declarations of llama.cpp's interface, compared with its headers, and the libraries that are refused.

`declarations.txt` has what a compiler said about the headers of llama.cpp 0.5: sizes, places, kinds and numbers. After
a new declaration, `make native` and `.venv/bin/python tests/engine/llama/test_bindings.py` write it anew.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from afterword.engine.llama import bindings, library
from afterword.errors import SettingError

HEADERS = Path(sysconfig.get_path("platlib"), "include")  # llama-cpp-python installs them there
COMPILER = shutil.which("c++")
FACTS = Path(__file__).with_name("declarations.txt")

PROGRAM = r"""
#include <cstddef>
#include <cstdio>
#include <string>
#include <type_traits>
#include <ggml-backend.h>
#include <ggml.h>
#include <llama.h>

template <class T>
std::string kind() {
    const std::string size = std::to_string(sizeof(T));
    if constexpr (std::is_pointer_v<T>) return "pointer";
    else if constexpr (std::is_class_v<T>) return "struct" + size;
    else if constexpr (std::is_same_v<T, bool>) return "bool";
    else if constexpr (std::is_floating_point_v<T>) return "float" + size;
    else if constexpr (std::is_enum_v<T>) return "int" + size;
    else return (std::is_signed_v<T> ? "int" : "uint") + size;
}
template <>
std::string kind<void>() { return "void"; }

template <class Result, class... Arguments>
void describe(const char *name, Result (*)(Arguments...)) {
    const std::string kinds = (std::string() + ... + (" " + kind<Arguments>()));
    std::printf("%s: %s(%s)\n", name, kind<Result>().c_str(), kinds.c_str());
}
#define FUNCTION(name) describe(#name, (decltype(&name)) nullptr);
#define STRUCTURE(name) std::printf("%s: %zu\n", #name, sizeof(name));
#define FIELD(type, name) \
    std::printf("%s.%s: %s at %zu\n", #type, #name, kind<decltype(type::name)>().c_str(), offsetof(type, name));
#define CONSTANT(name) std::printf("%s: %lld\n", #name, (long long)(name));

int main() {
@
}
"""


def kind(declared: Any) -> str:
    """The kind of a ctypes type, in the words of `PROGRAM`."""
    if declared is None:
        return "void"
    size = ctypes.sizeof(declared)
    if issubclass(declared, ctypes.Structure):
        return f"struct{size}"
    if issubclass(declared, ctypes.c_bool):
        return "bool"
    code = getattr(declared, "_type_", "P")
    if not isinstance(code, str) or code in "Pz":
        return "pointer"
    return f"{'float' if code in 'fd' else 'uint' if code.isupper() else 'int'}{size}"


def declarations() -> Iterator[tuple[str, str]]:
    """Lines of `PROGRAM` for each declaration, and the line that it must print."""
    for name, structure in bindings.STRUCTURES.items():
        yield f"STRUCTURE({name})", f"{name}: {ctypes.sizeof(structure)}"
        for field, declared in structure._fields_:
            offset = getattr(structure, field).offset
            yield f"FIELD({name}, {field})", f"{name}.{field}: {kind(declared)} at {offset}"
    for name, value in bindings.CONSTANTS.items():
        yield f"CONSTANT({name})", f"{name}: {value}"
    for name, (result, arguments) in bindings.FUNCTIONS.items():
        listed = "".join(f" {kind(each)}" for each in arguments)
        yield f"FUNCTION({name})", f"{name}: {kind(result)}({listed})"


def compiled_facts(folder: Path) -> str:
    """What the compiler says about the headers."""
    source, program = folder / "describe.cpp", folder / "describe"
    source.write_text(PROGRAM.replace("@", "\n".join(line for line, _ in declarations())), encoding="utf-8")
    subprocess.run([str(COMPILER), "-std=c++17", "-I", str(HEADERS), "-o", program, source], check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout


def test_the_declarations_are_those_of_the_headers() -> None:
    facts = FACTS.read_text(encoding="utf-8").splitlines()
    assert len(facts) > 100
    assert [expected for _, expected in declarations()] == facts


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif(not (HEADERS / "llama.h").exists(), reason="the headers of llama.cpp are not installed")
def test_the_installed_headers_say_what_is_recorded(tmp_path: Path) -> None:
    assert compiled_facts(tmp_path) == FACTS.read_text(encoding="utf-8")


# ---- what is refused


@pytest.fixture
def installed() -> Path:
    return library.path()


def changed(structure: type[ctypes.Structure], before: str) -> type[ctypes.Structure]:
    """The structure with one more field."""
    fields: list[Any] = list(structure._fields_)
    place = next(i for i, (name, _) in enumerate(fields) if name == before)
    return type(
        "Changed", (ctypes.Structure,), {"_fields_": [*fields[:place], ("more", ctypes.c_int32), *fields[place:]]}
    )


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("llama_model_default_params", "n_gpu_layers"),
        ("llama_model_default_params", "vocab_only"),
        ("llama_context_default_params", "n_ctx"),
        ("llama_context_default_params", "rope_freq_base"),
        ("llama_context_default_params", "no_perf"),
    ],
)
def test_a_library_whose_structures_have_another_layout_is_refused(
    installed: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: str
) -> None:
    structure, arguments = bindings.FUNCTIONS[name]
    other = {**bindings.FUNCTIONS, name: (changed(structure, before), arguments)}
    monkeypatch.setattr(bindings, "FUNCTIONS", other)
    with pytest.raises(SettingError, match="with another interface than Afterword knows"):
        bindings.open_library(installed)


def test_a_library_with_another_version_is_refused(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "LLAMA_VERSIONS", dict.fromkeys(("0.4.", "9."), bindings.ContextParameters))
    with pytest.raises(SettingError, match=r"is llama.cpp \S+ Afterword knows 0\.4\.x, 9\.x"):
        bindings.open_library(installed)


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "libllama.so"
    path.write_text("no library")
    with pytest.raises(SettingError, match=r"libllama\.so cannot be loaded as a library"):
        bindings.open_library(path)


@pytest.mark.parametrize(("lacked", "package"), [("libgomp.so.1", "libgomp1"), ("libstdc++.so.6", "libstdc++6")])
def test_a_library_that_the_system_lacks_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, lacked: str, package: str
) -> None:
    def load(_: str) -> None:
        raise OSError(f"{lacked}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(bindings.ctypes, "CDLL", load)
    with pytest.raises(SettingError, match=re.escape(f"lacks {lacked}. On Debian: apt-get install {package}")):
        bindings.open_library(Path("xllamacpp.abi3.so"))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_library_without_a_function_is_refused(tmp_path: Path) -> None:
    source, path = tmp_path / "other.cpp", tmp_path / "libllama.so"
    defined = [name for name in bindings.FUNCTIONS if name != "llama_memory_seq_rm"]
    source.write_text("\n".join(f'extern "C" void {name}() {{}}' for name in defined), encoding="utf-8")
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", path, source], check=True)
    with pytest.raises(SettingError, match=r"it lacks llama_memory_seq_rm\."):
        bindings.open_library(path)


# ---- where the library comes from


def test_the_installed_library_is_used_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.VARIABLE, raising=False)
    assert library.path().is_file()


@pytest.mark.parametrize("named", ["file", "folder"])
def test_the_variable_names_a_library_or_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    path = tmp_path / "libllama.so"
    path.write_bytes(b"")
    monkeypatch.setenv(library.VARIABLE, str(path if named == "file" else tmp_path))
    assert library.path() == path


@pytest.mark.parametrize("name", ["", "absent"])
def test_a_folder_without_a_library_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(library.VARIABLE, str(tmp_path / name))
    with pytest.raises(SettingError, match="neither a library nor a folder with libllama"):
        library.path()


def test_without_any_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setattr(library, "find_spec", lambda _: None)
    with pytest.raises(SettingError, match=r"llama\.cpp is not installed"):
        library.path()


@pytest.mark.parametrize(
    ("packages", "expected"),
    [
        (("xllamacpp",), "xllamacpp/xllamacpp.abi3.so"),
        (("llama_cpp", "xllamacpp"), "llama_cpp/lib/libllama.so"),
    ],
)
def test_a_compiled_library_is_preferred_to_a_prebuilt_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: tuple[str, ...], expected: str
) -> None:
    monkeypatch.delenv(library.VARIABLE, raising=False)
    for name in ("llama_cpp/lib/libllama.so", "xllamacpp/xllamacpp.abi3.so"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    places = {name: SimpleNamespace(submodule_search_locations=[str(tmp_path / name)]) for name in packages}
    monkeypatch.setattr(library, "find_spec", places.get)
    assert library.path() == tmp_path / expected


def test_the_prebuilt_library_is_refused_on_a_processor_below_all_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "xllamacpp" / "xllamacpp.abi3.so"
    place.parent.mkdir()
    place.write_bytes(b"")
    monkeypatch.setenv(library.VARIABLE, str(place))
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(library.compiled, "below_all_levels", lambda: True)
    with pytest.raises(SettingError, match=r"needs a processor with AVX2"):
        library._load.__wrapped__()  # the result of another test may be kept


def test_the_files_of_a_library_are_its_own_and_those_of_ggml_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("libllama.so", "libggml.so", "libggml-cpu.so", "libother.so"):
        (tmp_path / name).touch()
    (tmp_path / "ggml").mkdir()  # back ends that are loaded when they are needed
    (tmp_path / "libggml.so.0").symlink_to("libggml.so")
    monkeypatch.setenv(library.VARIABLE, str(tmp_path))
    assert [path.name for path in library.files()] == ["libllama.so", "libggml-cpu.so", "libggml.so"]


def test_other_names_are_no_functions() -> None:
    with pytest.raises(AttributeError):
        _ = library.native.printf


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        FACTS.write_text(compiled_facts(Path(name)), encoding="utf-8")
