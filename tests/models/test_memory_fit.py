"""Tests of the choice of context and sequences: defaults are reduced until they fit, settings are kept or refused."""

from __future__ import annotations

import dataclasses

import pytest

from afterword.errors import SettingError
from afterword.models.gguf_facts import Facts
from afterword.models.memory_fit import CELL_BYTES, MAX_SNAPSHOT_BYTES, ComputeOptions, ModelShape, choose_shapes

GIB = 1 << 30

# 2 layers x 8 heads x (128 + 128) elements x 2 bytes = 8 KiB of KV cache for each token
FACTS = Facts(
    architecture="llama",
    name="Medium",
    file_type="Q8_0",
    context_length=8192,
    layers=2,
    embedding_length=0,
    heads=8,
    heads_kv=8,
    experts=0,
    kv_heads=16,
    hidden=0,
    state_bytes=0,
    key_length=128,
    value_length=128,
    vocabulary=0,
    size_bytes=GIB,
    tensor_count=20,
    split_count=1,
)


def choose_shape(
    facts: Facts, available: int, context: int | None, parallel: int | None, kv_bytes: int = 2
) -> ModelShape:
    """The shape of a single model."""
    return choose_shapes([(facts, ComputeOptions(kv_bytes))], available, context, parallel)[0]


def shape(available: float, context: int | None = None, parallel: int | None = None) -> tuple[int, int]:
    chosen = choose_shape(FACTS, int(available * GIB), context, parallel)
    assert chosen.kv_bytes == max(256, chosen.context) * chosen.parallel * 8192
    assert chosen.needed_bytes <= available * GIB
    return chosen.context, chosen.parallel


def error_message(available: float, context: int | None = None, parallel: int | None = None) -> str:
    with pytest.raises(SettingError) as caught:
        shape(available, context, parallel)
    return caught.value.message


ONE = dataclasses.replace(FACTS, size_bytes=1000, kv_heads=1, key_length=1, value_length=0)


def test_the_memory_of_a_shape() -> None:
    attention_mask = 256 * 256 * 4
    needed = 1512 + attention_mask
    assert ModelShape(256, 2, ONE, ComputeOptions(kv_bytes=1)).needed_bytes == needed + needed // 10 + (256 << 20)


def test_the_tokens_of_a_sequence_are_rounded_up() -> None:
    assert ModelShape(16, 2, ONE).kv_bytes == ModelShape(256, 2, ONE).kv_bytes == 2 * 256 * 2
    assert ModelShape(4096, 1, ONE, spare=1).kv_bytes == 2 * 4352 * 2


def test_a_pass_needs_logits_and_activations() -> None:
    wide = dataclasses.replace(ONE, kv_heads=0, vocabulary=1000, hidden=20, embedding_length=10)
    assert ModelShape(256, 2, wide, ComputeOptions(chunk=64)).pass_bytes == 64 * (2 * 1000 + 3 * 20 + 8 * 10) * 4
    assert ModelShape(256, 100, wide, ComputeOptions(chunk=64)).pass_bytes == 100 * (2 * 1000 + 3 * 20 + 8 * 10) * 4
    assert ModelShape(256, 2, ONE, ComputeOptions(chunk=64)).pass_bytes == 64 * 256 * 4
    assert ModelShape(256, 2, ONE, ComputeOptions(chunk=64, plain_attention=True)).pass_bytes == 64 * (8 + 1) * 256 * 4


def test_each_sequence_needs_the_states_of_recurrent_layers() -> None:
    recurrent = dataclasses.replace(ONE, kv_heads=0, state_bytes=1000)
    snapshots = ModelShape(4096, 3, recurrent).snapshot_bytes
    assert ModelShape(4096, 3, recurrent).sequences_bytes == 3000 + snapshots
    assert ModelShape(4096, 3, recurrent, spare=1).sequences_bytes == 4000 + snapshots
    large = dataclasses.replace(recurrent, state_bytes=GIB)
    assert choose_shape(large, 10 * GIB, None, None).parallel == 4


@pytest.mark.parametrize(
    ("state_bytes", "snapshot_bytes"),
    [(0, 0), (1000, 8 * 4 * 1000), (GIB // 16, MAX_SNAPSHOT_BYTES), (GIB, 4 * GIB)],
)
def test_the_memory_for_snapshots_is_bounded_but_holds_one_for_each_sequence(state_bytes, snapshot_bytes) -> None:
    assert ModelShape(4096, 4, dataclasses.replace(ONE, state_bytes=state_bytes)).snapshot_bytes == snapshot_bytes


def test_defaults_halve_until_they_fit() -> None:
    assert shape(64) == (4096, 16)
    assert shape(1.89) == (4096, 8)
    assert shape(1.5) == (4096, 4)
    assert shape(1.39) == (4096, 1)
    assert shape(1.375) == (2048, 1)
    assert shape(1.355) == (512, 1)


def test_settings_are_kept_and_the_rest_adapts() -> None:
    assert shape(64, context=8192) == (8192, 16)
    assert shape(1.5, context=8192) == (8192, 2)
    assert shape(1.5, parallel=16) == (1024, 16)
    assert shape(64, context=16, parallel=256) == (16, 256)


SMALL = dataclasses.replace(FACTS, name="Small", layers=1, kv_heads=8, size_bytes=GIB // 4)


def shapes(available: float, *models: Facts, **settings: int) -> list[tuple[int, int]]:
    settings = {"context": None, "parallel": None} | settings
    chosen = choose_shapes([(facts, ComputeOptions()) for facts in models], int(available * GIB), **settings)
    assert sum(shape.needed_bytes for shape in chosen) <= available * GIB
    return [(shape.context, shape.parallel) for shape in chosen]


def test_models_that_are_loaded_together_share_the_memory() -> None:
    assert shapes(64, FACTS, SMALL) == [(4096, 16), (4096, 16)]
    assert shapes(2.5, FACTS, SMALL) == [(4096, 8), (4096, 16)], "the largest gives way first"
    assert shapes(2.3, FACTS, SMALL) == [(4096, 4), (4096, 16)]
    assert shapes(2.5, SMALL, FACTS) == [(4096, 16), (4096, 8)]
    assert shapes(2.0, FACTS, SMALL) == [(4096, 1), (4096, 4)]
    assert shapes(2.2, FACTS, SMALL, context=4096) == [(4096, 4), (4096, 8)]


def test_the_message_for_several_models_says_what_to_do() -> None:
    with pytest.raises(SettingError, match=r"The 2 models need .* together, .* take turns with --keep-alive"):
        shapes(1.5, FACTS, FACTS)
    with pytest.raises(SettingError, match="trained on"):
        shapes(64, FACTS, dataclasses.replace(FACTS, name="Short", context_length=300), context=4096)


def test_short_and_unknown_training_lengths() -> None:
    short = dataclasses.replace(FACTS, context_length=300)
    assert choose_shape(short, 64 * GIB, None, None).context == 300
    unknown = dataclasses.replace(FACTS, context_length=0)
    assert choose_shape(unknown, 64 * GIB, None, None).context == 2048
    assert choose_shape(unknown, 64 * GIB, 100_000, None).context == 100_000


def test_the_message_says_which_setting_to_lower() -> None:
    assert error_message(1) == (
        "The model needs 1.35 GiB of memory, but 1.00 GiB are available. Choose a smaller or more quantized model."
    )
    assert error_message(1.5, 8192, 16) == (
        "16 x 8192 tokens need 2.46 GiB of memory, but 1.50 GiB are available. Lower context or parallel."
    )
    assert error_message(1.4, 8192).endswith("available. Lower context.")


@pytest.mark.parametrize(
    ("context", "parallel", "message"),
    [
        (8193, None, "more than the 8192 tokens that Medium was trained on"),
        (None, 257, "Set a number from 1 to 256"),
    ],
)
def test_invalid_settings_are_refused(context: int | None, parallel: int | None, message: str) -> None:
    assert message in error_message(64, context, parallel)


def test_spare_sequences_need_memory_and_reduce_the_limit() -> None:
    (chosen,) = choose_shapes([(FACTS, ComputeOptions())], 64 * GIB, None, None, spare=1)
    assert (chosen.context, chosen.parallel, chosen.kv_bytes) == (4096, 15, 4352 * 16 * 8192)
    (chosen,) = choose_shapes([(FACTS, ComputeOptions())], int(1.89 * GIB), None, None, spare=1)
    assert (chosen.context, chosen.parallel, chosen.kv_bytes) == (4096, 7, 4352 * 8 * 8192)
    with pytest.raises(SettingError, match="Set a number from 1 to 255"):
        choose_shapes([(FACTS, ComputeOptions())], 64 * GIB, None, 256, spare=1)


ON_DEMAND = ComputeOptions(on_demand=True)


@pytest.mark.parametrize(
    ("available", "context", "full"),
    [(64, 8192, True), (1.9, 8192, False), (1.48, 8192, False), (1.40, 4096, False), (1.36, 512, False)],
)
def test_sequences_that_take_memory_on_demand_have_the_trained_context(
    available: float, context: int, full: bool
) -> None:
    (chosen,) = choose_shapes([(FACTS, ON_DEMAND)], int(available * GIB), None, None)
    assert (chosen.context, chosen.parallel, chosen.capacity is None) == (context, 16, full)
    assert chosen.needed_bytes <= available * GIB
    if not full:
        assert chosen.context <= (chosen.capacity or 0) < 16 * chosen.context
        assert chosen.kv_bytes == (chosen.capacity or 0) * 8192


def test_an_operators_context_needs_memory_for_one_full_sequence() -> None:
    (chosen,) = choose_shapes([(FACTS, ON_DEMAND)], int(1.6 * GIB), 8192, 64)
    assert (chosen.context, chosen.parallel) == (8192, 64)
    with pytest.raises(SettingError, match="64 x 8192 tokens need"):
        choose_shapes([(FACTS, ON_DEMAND)], int(1.36 * GIB), 8192, 64)


def test_the_records_of_cells_count() -> None:
    shape = ModelShape(4096, 2, ONE, ON_DEMAND, capacity=100)
    assert shape.sequences_bytes == 100 * 2 + 2 * 4096 * CELL_BYTES


def test_keys_and_values_get_half_of_the_memory_by_default() -> None:
    wide = dataclasses.replace(FACTS, kv_heads=160)  # 80 KiB for each token
    (chosen,) = choose_shapes([(wide, ON_DEMAND)], 8 * GIB, None, None)
    assert (chosen.context, chosen.parallel) == (8192, 16)
    assert 3.5 * GIB < chosen.kv_bytes <= 4 * GIB
    (asked,) = choose_shapes([(wide, ON_DEMAND)], 16 * GIB, 8192, 16)
    assert asked.capacity is None, "an operator's settings are kept"
    both = choose_shapes([(wide, ON_DEMAND), (FACTS, ON_DEMAND)], 8 * GIB, None, None)
    assert sum(each.kv_bytes for each in both) <= 4 * GIB
    assert all((each.capacity or each.cells) >= each.context == 8192 for each in both)
    (long,) = choose_shapes([(dataclasses.replace(wide, context_length=65536), ON_DEMAND)], 8 * GIB, None, None)
    assert (long.context, long.capacity) == (65536, 65536), "one full sequence, which takes 5 GiB"
