"""`PYTHON tests/with_vllm/random_model.py FOLDER [--sentencepiece]`: write a random model for the tests of vLLM.

Run it with the interpreter of vLLM's environment: it needs `tokenizers`, `safetensors` and numpy. The model is a Llama
with two layers and a tokenizer that is trained on the texts of `training`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENTRIES, VOCABULARY = 990, 1000  # the model has more tokens than the tokenizer, as most models do
HIDDEN, HEADS, KV_HEADS, INNER, LAYERS, CONTEXT = 128, 4, 2, 256, 2, 2048
SPECIAL = ("<|endoftext|>", "<|begin|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>")
END, BEGIN = 0, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sentencepiece", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(options.folder, options.sentencepiece)
    write_config(options.folder)
    write_weights(options.folder)


def write_tokenizer(folder: Path, sentencepiece: bool) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    texts = sorted(str(path) for path in (ROOT / "training").glob("*.txt") if path.name != "requirements.txt")
    special = [AddedToken(name, special=True) for name in SPECIAL]
    if sentencepiece:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        first = [*special, *(AddedToken(f"<0x{byte:02X}>") for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=ENTRIES, special_tokens=first, show_progress=False, limit_alphabet=200)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=ENTRIES, special_tokens=special, show_progress=False, initial_alphabet=sorted(alphabet)
        )
    tokenizer.train(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BEGIN]} $A", special_tokens=[(SPECIAL[BEGIN], BEGIN)]
    )
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    if sentencepiece:  # in real models the entries for bytes are entries of the vocabulary only
        content = json.loads(path.read_text())
        content["added_tokens"] = [added for added in content["added_tokens"] if added["content"] in SPECIAL]
        path.write_text(json.dumps(content, ensure_ascii=False))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[BEGIN], "eos_token": SPECIAL[END]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_config(folder: Path) -> None:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_weights(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(7)

    def matrix(*shape: int, scale: float = 1.0) -> Any:
        return (random.standard_normal(shape) * scale / np.sqrt(shape[-1])).astype(np.float32)

    kv = KV_HEADS * HIDDEN // HEADS
    tensors = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN, scale=HIDDEN**0.5),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN, scale=2.5),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        tensors |= {
            f"{name}input_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{name}post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{name}self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{name}self_attn.k_proj.weight": matrix(kv, HIDDEN),
            f"{name}self_attn.v_proj.weight": matrix(kv, HIDDEN),
            f"{name}self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{name}mlp.gate_proj.weight": matrix(INNER, HIDDEN),
            f"{name}mlp.up_proj.weight": matrix(INNER, HIDDEN),
            f"{name}mlp.down_proj.weight": matrix(HIDDEN, INNER),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
