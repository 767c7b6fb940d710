"""The forms of decoder models that llama.cpp knows: architectures, each with the metadata keys of a tiny model.

A form is named after its architecture; further forms of an architecture are named `architecture/form`. Each has few
layers, but every kind of layer that the architecture has. The keys are those that the loader of the architecture in
llama.cpp's `src/models` reads.
"""

from __future__ import annotations

from collections.abc import Mapping

Value = bool | int | float | str | tuple[int, ...] | tuple[float, ...]
Keys = Mapping[str, Value]
Shape = tuple[int, ...]

WIDTH, WINDOW = 64, 32
COMMON: Keys = {
    "context_length": 512,
    "embedding_length": WIDTH,
    "block_count": 2,
    "feed_forward_length": 2 * WIDTH,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "rope.dimension_count": WIDTH // 2,
    "rope.freq_base": 50000.0,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.max_alibi_bias": 8.0,
    "attention.clamp_kqv": 0.0,
    "use_parallel_residual": True,
    "logit_scale": 1.0,
}
"""Keys of every form."""

EXPERTS: Keys = {
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": WIDTH,
    "expert_shared_count": 1,
    "expert_shared_feed_forward_length": WIDTH // 2,
    "expert_gating_func": 2,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.5,
    "leading_dense_block_count": 1,
    "interleave_moe_layer_step": 1,
}
"""Keys that make a mixture of experts of an architecture: 3 of 8 experts in the last layer, or in both."""

_PAIR = {"attention.head_count_kv": 2}  # for architectures without groups of heads
_SECTIONS = {"rope.dimension_sections": (4, 4, 8, 0)}
_WINDOW = {"attention.sliding_window": WINDOW, "rope.freq_base_swa": 10000.0}
_TWO_OF_THREE = {**_WINDOW, "block_count": 3, "attention.sliding_window_pattern": (True, True, False)}
_THREE_OF_FOUR = {**_WINDOW, "block_count": 5}  # every fourth layer has no window
_WINDOWED_EXPERTS = {**EXPERTS, **_THREE_OF_FOUR}
_CLAMP = {"swiglu_clamp_exp": (7.0, 7.0, 7.0)}
_STATE = {"ssm.conv_kernel": 4, "ssm.inner_size": 2 * WIDTH, "ssm.state_size": 16, "ssm.time_step_rank": 4}
_MAMBA2 = {**_STATE, "ssm.group_count": 1}
_FIRST_RECURRENT = {"attention.head_count_kv": (0, 1)}
_DELTA = {**_STATE, **_SECTIONS, "ssm.state_size": 32, "ssm.group_count": 2, "full_attention_interval": 2}
_WKV6 = {"wkv.head_size": 32, "time_mix_extra_dim": 32, "time_decay_extra_dim": 32}
_WKV7 = {
    **{"wkv.head_size": 32, "attention.decay_lora_rank": 32, "attention.iclr_lora_rank": 32},
    **{"attention.value_residual_mix_lora_rank": 32, "attention.gate_lora_rank": 32},
}
_NEMOTRON = {
    **{**_MAMBA2, "block_count": 3, "attention.head_count_kv": (0, 1, 0)},
    "feed_forward_length": (0, 0, 2 * WIDTH),
}
# Latent attention: keys of 32 elements and 16 that are rotated, made from 32 latent elements of each token.
_LATENT = {
    **{"attention.q_lora_rank": 32, "attention.kv_lora_rank": 32, "rope.dimension_count": 16},
    **{"attention.key_length": 48, "attention.value_length": 32},
}
_MLA = {**_LATENT, "attention.key_length_mla": 48, "attention.value_length_mla": 32}
_INDEXER = {"attention.indexer.head_count": 4, "attention.indexer.key_length": 64, "attention.indexer.top_k": 2048}
_KDA = {
    **{**_MLA, **EXPERTS, "ssm.conv_kernel": 4, "kda.head_dim": 32, "kda.gate_lower_bound": -5.0},
    **_FIRST_RECURRENT,
}
_GEMMA4 = {
    **{**_TWO_OF_THREE, "embedding_length_per_layer_input": 0, "feed_forward_length": (128,) * 3},
    **{"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count_swa": 32},
    **{"attention.key_length_swa": 32, "attention.value_length_swa": 32, "final_logit_softcapping": 30.0},
}
_DEEPSEEK2 = {**_MLA, "leading_dense_block_count": 2, "expert_feed_forward_length": 32, "expert_shared_count": 0}
_GROUPS = {"attention.group_norm_groups": 4}
_GROVE = {"expert_chunk_feed_forward_length": 32, "expert_group_scale": 0.05, "experts_per_group": 2}

_PLAIN: Keys = {}
_DENSE: Mapping[str, Keys] = {
    **dict.fromkeys(("arcee", "baichuan", "bitnet", "bloom", "chameleon", "chatglm", "codeshell", "command-r"), _PLAIN),
    **dict.fromkeys(("deci", "ernie4_5", "exaone", "falcon", "gemma", "glm4", "gpt2", "gptneox", "granite"), _PLAIN),
    **dict.fromkeys(("hunyuan-dense", "hunyuan_vl", "internlm2", "jais", "jais2", "llama", "maincoder"), _PLAIN),
    **dict.fromkeys(("minicpm", "mistral3", "mpt", "nanbeige", "nemotron", "olmo", "openelm", "orion"), _PLAIN),
    **dict.fromkeys(("pangu-embedded", "phi2", "plamo", "qwen", "qwen2", "qwen3", "refact"), _PLAIN),
    **dict.fromkeys(("seed_oss", "smollm3", "stablelm", "starcoder", "starcoder2", "talkie", "xverse"), _PLAIN),
    "apertus": {f"xielu.{name}": (0.8, 0.8) for name in ("alpha_n", "alpha_p", "beta", "eps")},
    "graniteswitch": {
        **{"adapters.count": 2, "adapters.lora_rank": 32},
        **{"adapters.token_ids_activate": (260, 261), "adapters.token_ids_substitute": (5, 6)},
    },
    "hrm_text": {"block_count": 6, "hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2},
    "phi3": {"attention.sliding_window": WINDOW, "rope.scaling.original_context_length": 64},
    "k2-horizon": _GROUPS,
    "paddleocr": _SECTIONS,
    "qwen2vl": _SECTIONS,
    "qwen3vl": _SECTIONS,
    # Latent attention.
    "deepseek2": _DEEPSEEK2,
    "deepseek2/unabsorbed": {  # as files that were written before 2025-04
        **{**_DEEPSEEK2, **_PAIR, "attention.key_length_mla": 0, "attention.value_length_mla": 0},
    },
    "deepseek2/stretched": {  # as most of the real models
        **{**_DEEPSEEK2, "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0},
        **{"rope.scaling.original_context_length": 64, "rope.scaling.yarn_log_multiplier": 0.0707},
    },
    "minicpm3": {**_LATENT, **_PAIR},
    "plm": {**_LATENT, **_PAIR},
}

_WINDOWED: Mapping[str, Keys] = {
    "cohere2": _THREE_OF_FOUR,
    "exaone4": {**_WINDOW, "block_count": 2},
    "exaone4/window": {**_WINDOW, "block_count": 64},  # the library gives a window only to the model with 64 layers
    "gemma2": {**_WINDOW, "block_count": 4},
    "gemma3": {**_WINDOW, "block_count": 7},
    "gemma3n": _WINDOW,
    "gemma4": _GEMMA4,
    "gemma4/effective": {  # the small ones: embeddings for each layer, and layers that use the keys of earlier ones
        **{**_GEMMA4, "block_count": 6, "attention.sliding_window_pattern": (True, True, False) * 2},
        **{"feed_forward_length": (128,) * 6, "embedding_length_per_layer_input": 32, "attention.shared_kv_layers": 3},
        **{"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64},
    },
    "granite_swa": _TWO_OF_THREE,
    "muse-glimmer": {**_THREE_OF_FOUR, "final_logit_softcapping": 30.0},
    "olmo2": {},
    "olmo2/window": _THREE_OF_FOUR,  # OLMo 3
    "plamo3": {**_WINDOW, "block_count": 9},
    "spark2_5": _TWO_OF_THREE,
}

_MIXTURES: Mapping[str, Keys] = {
    **dict.fromkeys(("arctic", "bailingmoe", "bailingmoe2", "dbrx", "deepseek"), EXPERTS),
    **dict.fromkeys(("ernie4_5-moe", "glm4moe", "granite/experts", "granitemoe", "grok", "hunyuan-moe"), EXPERTS),
    **dict.fromkeys(("hy_v3", "llama/experts", "minicpm/experts", "minimax-m2", "mistral3/experts"), EXPERTS),
    **dict.fromkeys(("phimoe", "qwen2moe", "qwen3moe"), EXPERTS),
    "deepseek2-ocr": {**EXPERTS, **_PAIR, "rope.freq_base": 10000.0},  # the library accepts no other
    "dots1": {**EXPERTS, **_PAIR},
    "olmoe": {**EXPERTS, **_PAIR},
    "grovemoe": {**EXPERTS, **_GROVE},
    "k2-horizon/experts": {  # the values of attention have experts too
        **{**EXPERTS, **_GROUPS},
        **{"attention.value_expert_count": 8, "attention.value_expert_used_count": 3},
    },
    "qwen3vlmoe": {**EXPERTS, **_SECTIONS},
    # With a window.
    **dict.fromkeys(("afmoe", "cohere2moe", "exaone-moe", "laguna", "mellum", "smallthinker"), _WINDOWED_EXPERTS),
    "gemma4/experts": {**_GEMMA4, **EXPERTS},
    "gpt-oss": {**EXPERTS, **_WINDOW, "block_count": 3},
    "granite_swa/experts": {**_TWO_OF_THREE, **EXPERTS},
    "llama4": {**EXPERTS, "block_count": 5},  # chunks of 8,192 tokens
    "maple": {**_TWO_OF_THREE, **EXPERTS, **_CLAMP},
    "mimo2": {**_TWO_OF_THREE, **EXPERTS},
    "step35": {**_TWO_OF_THREE, **EXPERTS},
    # With latent attention.
    "deepseek2/experts": {**_MLA, **EXPERTS},
    "mistral4": {**_MLA, **EXPERTS},
    "deepseek32": {**_MLA, **EXPERTS, **_INDEXER},
    "glm-dsa": {**_MLA, **EXPERTS, **_INDEXER},
    "hy_v4": {
        **{**_MLA, **EXPERTS, **_INDEXER, "attention.indexer.types": (1, 0), "swiglu_clamp_exp": 10.0},
        **{"hyper_connection.count": 4, "hyper_connection.epsilon": 1e-6, "hyper_connection.magnitude": 2.0},
    },
    "dots3note": {
        **{**_MLA, **EXPERTS, **_INDEXER, **_WINDOW, "block_count": 3, "attention.indexer.types": (0, 0, 1)},
        **{"attention.sliding_window_pattern": (True, True, False), "attention.kv_lora_rank_swa": 32},
        **{"attention.key_length_swa": 48, "attention.value_length_swa": 32},
        **{"attention.key_length_mla_swa": 48, "attention.value_length_mla_swa": 32},
    },
    "deepseek4": {
        **{**EXPERTS, **_INDEXER, "block_count": 4, "attention.head_count": 4, "attention.sliding_window": WINDOW},
        **{"attention.q_lora_rank": 32, "attention.key_length": 64, "attention.value_length": 64},
        **{"rope.dimension_count": 32, "expert_gating_func": 4, "swiglu_clamp_exp": (10.0,) * 4},
        **{"attention.output_group_count": 2, "attention.output_lora_rank": 32, "hash_layer_count": 0},
        **{"attention.compress_ratios": (0, 0, 4, 128), "attention.compress_rope_freq_base": 160000.0},
        **{"hyper_connection.count": 4, "hyper_connection.epsilon": 1e-6},
        "hyper_connection.sinkhorn_iterations": 2,
    },
    "minimax-m3": {
        **{**EXPERTS, **_INDEXER, "attention.indexer.head_count": 1},
        **{"attention.indexer.block_size": 4, "attention.indexer.local_blocks": 1},
    },
}

_RECURRENT: Mapping[str, Keys] = {
    "falcon-h1": _MAMBA2,
    "granitehybrid": {**_MAMBA2, **_FIRST_RECURRENT},
    "jamba": {
        **{**_STATE, **_FIRST_RECURRENT, "ssm.time_step_rank": 32},
        **{"expert_count": 0, "expert_used_count": 0},
    },
    "lfm2": {"shortconv.l_cache": 3, **_FIRST_RECURRENT},
    "mamba": {**_STATE, "ssm.time_step_rank": 32},
    "mamba2": _MAMBA2,
    "nemotron_h": _NEMOTRON,
    "plamo2": {
        **{**_STATE, "ssm.state_size": 64, "ssm.group_count": 0, **_FIRST_RECURRENT},
        **{"attention.key_length": 32, "attention.value_length": 32},
    },
    "qwen35": _DELTA,
    "rwkv6": {**_WKV6, "attention.head_count": 0, "attention.head_count_kv": 0},
    "rwkv6qwen2": {**_WKV6, "token_shift_count": 1},
    "rwkv7": _WKV7,
    "arwkv7": {**_WKV7, "token_shift_count": 1},
    # With experts.
    "granitehybrid/experts": {**_MAMBA2, **_FIRST_RECURRENT, **EXPERTS},
    "jamba/experts": {**_STATE, **_FIRST_RECURRENT, **EXPERTS, "ssm.time_step_rank": 32},
    "lfm2moe": {"shortconv.l_cache": 3, **_FIRST_RECURRENT, **EXPERTS},
    "nemotron_h_moe": {**_NEMOTRON, **EXPERTS},
    "qwen3next": {
        **{**_DELTA, "expert_count": 4, "expert_used_count": 2},
        **{"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 32},
    },
    "qwen35moe": {**_DELTA, **EXPERTS},
    "minimax-01": {**EXPERTS, "residual_scale": 1.0, "full_attention_interval": 2},
    "kimi-linear": _KDA,
    "bailingmoe3": {**_KDA, **_SECTIONS},
    "kimi-k3": {
        **{**_KDA, "expert_latent_length": 32, "attn_res.block_size": 2},
        **{"activation.situ_beta": 1.0, "activation.situ_linear_beta": 1.0},
    },
    "glm5-next": {
        **{**_KDA, **_INDEXER, "attention.key_length": 32, "rope.dimension_count": 0},
        **{"attention.indexer.kpool": 4, "attention.indexer.kpool_select_tail": True},
        **{"hyper_connection.count": 4, "hyper_connection.epsilon": 1e-6},
        "hyper_connection.sinkhorn_iterations": 2,
    },
}

FORMS: Mapping[str, Keys] = {**_DENSE, **_WINDOWED, **_MIXTURES, **_RECURRENT}
"""The additional keys of each form, by its name."""

VOCABULARIES: Mapping[str, int] = {"chameleon": 8_480}
"""The least size of the vocabulary. Chameleon never generates the 8,192 tokens of images, which come first."""

_DELTA_TENSORS: Mapping[str, Shape] = {
    "blk.0.attn_qkv.weight": (4 * WIDTH, WIDTH),
    "blk.0.attn_gate.weight": (2 * WIDTH, WIDTH),
}
_CONVOLUTION_BIAS: Mapping[str, Shape] = {"blk.0.ssm_conv1d.bias": (2 * WIDTH + 2 * 16,)}


def _each_layer(shapes: Mapping[str, Shape], *layers: int) -> Mapping[str, Shape]:
    return {f"blk.{layer}.{name}": shape for layer in layers for name, shape in shapes.items()}


_DENSE_LAYER: Mapping[str, Shape] = {
    **{f"ffn_{part}.weight": (2 * WIDTH, WIDTH) for part in ("gate", "up")},
    "ffn_down.weight": (WIDTH, 2 * WIDTH),
}
_MIXTURE_LAYER: Mapping[str, Shape] = {
    **{"ffn_gate_inp.weight": (8, WIDTH), "exp_probs_b.bias": (8,)},
    **{f"ffn_{part}_exps.weight": (8, WIDTH, WIDTH) for part in ("gate", "up", "down")},
}
_INDEXER_LAYER: Mapping[str, Shape] = {
    **{"indexer.k_norm.weight": (64,), "indexer.k_norm.bias": (64,), "indexer.proj.weight": (4, WIDTH)},
    **{"indexer.attn_k.weight": (64, WIDTH), "indexer.attn_q_b.weight": (256, 32)},
}
_GATED_LAYER: Mapping[str, Shape] = {
    **{"attn_q_norm.weight": (WIDTH,), "attn_k_norm.weight": (WIDTH // 2,), "attn_gate.weight": (WIDTH, WIDTH)},
}
_SHARED_EXPERT: Mapping[str, Shape] = {
    **{f"ffn_{part}_shexp.weight": (WIDTH // 2, WIDTH) for part in ("gate", "up")},
    "ffn_down_shexp.weight": (WIDTH, WIDTH // 2),
}

OPTIONAL_TENSORS: Mapping[str, Mapping[str, Shape]] = {
    "falcon-h1": {**_CONVOLUTION_BIAS, "blk.1.ssm_conv1d.bias": (2 * WIDTH + 2 * 16,)},
    "gemma4/experts": _each_layer({"ffn_gate_inp.weight": (8, WIDTH)}, 0, 1, 2),
    "glm-dsa": _each_layer(_INDEXER_LAYER, 0, 1),
    "granitehybrid": _CONVOLUTION_BIAS,
    "jamba/experts": _each_layer({"ffn_gate_inp.weight": (8, WIDTH)}, 0, 1),
    "k2-horizon": _each_layer(_GATED_LAYER, 0, 1),
    "k2-horizon/experts": _each_layer({"exp_probs_b.bias": (8,), "attn_v_gate.bias": (8,)}, 1),
    "laguna": _each_layer({"attn_gate.weight": (2, WIDTH)}, *range(5)),
    "mimo2": {
        **_each_layer({"attn_sinks.weight": (2,)}, 0, 1, 2),
        **{**_each_layer(_DENSE_LAYER, 0), **_each_layer(_MIXTURE_LAYER, 1, 2)},
    },
    "nemotron_h": _CONVOLUTION_BIAS,
    "nemotron_h_moe": _CONVOLUTION_BIAS,
    "qwen35": _DELTA_TENSORS,
    "qwen35moe": _DELTA_TENSORS,
    "qwen3next": _DELTA_TENSORS,
    "phi3": {
        **{f"blk.{layer}.attn_qkv.weight": (2 * WIDTH, WIDTH) for layer in range(2)},
        **{f"rope_factors_{which}.weight": (WIDTH // 4,) for which in ("long", "short")},
    },
    "rwkv6": _each_layer({"time_mix_lerp_fused.weight": (5, 1, 1, WIDTH)}, 0, 1),
    "step35": {
        **_each_layer({"attn_gate.weight": (2, WIDTH)}, 0, 1, 2),
        **{**_each_layer(_DENSE_LAYER, 0), **_each_layer({**_MIXTURE_LAYER, **_SHARED_EXPERT}, 1, 2)},
    },
}
"""Tensors, by architecture or form, that a file may omit. The library then leaves out what they compute, or ends."""


def architecture_of(form: str) -> str:
    """The architecture of a form."""
    return form.partition("/")[0]


def has_experts(form: str) -> bool:
    """Whether a form is a mixture of experts."""
    return bool(FORMS[form].get("expert_count"))


def has_window(form: str) -> bool:
    """Whether some layers of a form have a sliding window. Llama 4 attends in chunks, which is a kind of window."""
    return form == "llama4" or ("attention.sliding_window" in FORMS[form] and form not in ("exaone4", "phi3"))
