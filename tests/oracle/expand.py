"""The same model with F32 weights, so that nothing is rounded and differences are mistakes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.quants import dequantize


def expand(source: Path, target: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write the model in `source` with F32 weights to `target`, and return `target`.

    `changes`: new values of keys that the file has.
    """
    changes = changes or {}
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            kind, *inner = field.types
            value = changes.get(key, field.contents())
            writer.add_key_value(key, value, kind, inner[-1] if inner else None)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
