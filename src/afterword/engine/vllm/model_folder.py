"""Reads the files of a model's folder in Hugging Face's format: settings, tokenizer and the sizes of the weights."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afterword.errors import SettingError

TOKENIZER = "tokenizer.json"
_CONFIG = "config.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
_SETTINGS = (_CONFIG, TOKENIZER, "generation_config.json", "tokenizer_config.json")
_LENGTH = struct.Struct("<Q")  # the first bytes of a safetensors file: the length of its header


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The files of a model. `config`, `generation`, `tokenizer_config`: their contents, empty without the file."""

    path: Path
    config: dict[str, Any]
    generation: dict[str, Any]
    tokenizer_config: dict[str, Any]

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The token ids that end a generation: those of the generation settings, or else of the model's."""
        for source in (self.generation, self.config):
            if (found := source.get("eos_token_id")) is not None:
                return tuple(found) if isinstance(found, list) else (found,)
        return ()

    @property
    def trained_context(self) -> int:
        """How many tokens the model was trained on; 0 if unknown."""
        text: dict[str, Any] = self.config.get("text_config") or self.config
        return int(text.get("max_position_embeddings") or text.get("n_positions") or 0)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files of the weights, in order."""
        return next((files for each in _WEIGHTS if (files := tuple(sorted(self.path.glob(each))))), ())

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has; 0 if unknown."""
        text: dict[str, Any] = self.config.get("text_config") or self.config
        return int(text.get("vocab_size") or 0)

    @property
    def setting_files(self) -> tuple[str, ...]:
        """The files beside the weights that can change a number or a token."""
        return tuple(str(path) for name in _SETTINGS if (path := self.path / name).is_file())

    @property
    def files(self) -> tuple[str, ...]:
        """All files that can change a number or a token."""
        return (*self.setting_files, *map(str, self.weight_files))

    def count_parameters(self) -> int:
        """The number of weights, from the headers of the safetensors files; 0 for other files."""
        headers = [_header(path) for path in self.weight_files if path.suffix == ".safetensors"]
        tensors = [tensor for header in headers for name, tensor in header.items() if name != "__metadata__"]
        return sum(math.prod(tensor["shape"]) for tensor in tensors)


def read_folder(path: Path) -> ModelFolder:
    """Read the settings of a model. Raises `SettingError` if the folder has no model that can be served."""
    if not (path / _CONFIG).is_file():
        raise SettingError(
            f"{path} is no folder with a model in Hugging Face's format: it has no {_CONFIG}. With --engine vllm and "
            "--engine http give the folder of a model."
        )
    if not (path / TOKENIZER).is_file():
        raise SettingError(
            f"{path} has no {TOKENIZER}. Other forms of tokenizers (tekken.json, tokenizer.model) are not supported "
            "with --engine vllm and --engine http, because the bytes of their tokens are read from this file."
        )
    config, generation, tokenizer = (
        read_json(path / name) for name in (_CONFIG, "generation_config.json", "tokenizer_config.json")
    )
    return ModelFolder(path, config, generation, tokenizer)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty without the file. Raises `SettingError`."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError) as problem:
        raise SettingError(f"{path} cannot be read: {problem}.") from None
    if not isinstance(content, dict):
        raise SettingError(f"{path} has no JSON object.")
    return content


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            header: dict[str, Any] = json.loads(file.read(length))
    except (OSError, ValueError, struct.error) as problem:
        raise SettingError(f"{path} is no valid safetensors file: {problem}.") from None
    return header
