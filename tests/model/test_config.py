"""Shapes read from a checkpoint's text config, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from step37_ext.model.config import FULL, SLIDING, TextShape, text_config_of

DECODER, MTP = 45, 3
PER_LAYER = (
    "layer_types",
    "rope_theta",
    "partial_rotary_factors",
    "swiglu_limits",
    "swiglu_limits_shared",
)


def release(entries: int = DECODER + MTP, **changes: Any) -> SimpleNamespace:
    """The release's text config, its per-layer lists with `entries` entries; None removes one."""
    full = [layer % 4 == 0 for layer in range(DECODER + MTP)]
    fields: dict[str, Any] = {
        "num_hidden_layers": DECODER,
        "num_nextn_predict_layers": MTP,
        "hidden_size": 4096,
        "vocab_size": 128896,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "intermediate_size": 11264,
        "num_attention_heads": 64,
        "num_attention_groups": 8,
        "head_dim": 128,
        "attention_other_setting": {"num_attention_heads": 96, "num_attention_groups": 8},
        "use_head_wise_attn_gate": True,
        "sliding_window": 512,
        "layer_types": [FULL if is_full else SLIDING for is_full in full],
        "rope_theta": [5e6 if is_full else 1e4 for is_full in full],
        "partial_rotary_factors": [0.5 if is_full else 1.0 for is_full in full],
        "rope_scaling": {"rope_type": "llama3", "factor": 2.0},
        "yarn_only_types": [FULL],
        "moe_layers_enum": ",".join(map(str, range(3, DECODER))),
        "moe_num_experts": 288,
        "moe_top_k": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "norm_expert_weight": True,
        "use_moe_router_bias": True,
        "swiglu_limits": [0.0] * 43 + [7, 7] + [0.0] * MTP,
        "swiglu_limits_shared": [0.0] * 43 + [16, 16] + [0.0] * MTP,
    }
    fields |= {name: fields[name][:entries] for name in PER_LAYER}
    return SimpleNamespace(**fields | changes)


@pytest.mark.parametrize("entries", [DECODER, DECODER + MTP])
def test_lists_with_and_without_the_mtp_layers(entries: int) -> None:
    text = TextShape.from_config(release(entries))
    assert len(text.layers) == DECODER and text.num_mtp_layers == MTP
    assert [layer.attention.kind for layer in text.layers[:5]] == [FULL, *[SLIDING] * 3, FULL]
    assert [layer.is_moe for layer in text.layers] == [False] * 3 + [True] * 42
    assert [layer.routed_limit for layer in text.layers] == [None] * 43 + [7.0, 7.0]
    assert [layer.shared_limit for layer in text.layers] == [None] * 43 + [16.0, 16.0]


def test_mtp_layers_where_they_are_asked_for() -> None:
    text = TextShape.from_config(release(), with_mtp=True)
    assert len(text.layers) == DECODER + MTP and text.num_mtp_layers == MTP
    assert [text.mtp_layer(draft) for draft in range(MTP)] == [45, 46, 47]
    of_mtp = text.layers[45]
    assert of_mtp.attention.num_heads == 96 and of_mtp.attention.window == 512
    assert not of_mtp.is_moe and of_mtp.shared_limit is None
    with pytest.raises(ValueError, match="there is none for draft step 3"):
        text.mtp_layer(3)
    with pytest.raises(ValueError, match="layer_types has 45 entries, at least 48"):
        TextShape.from_config(release(DECODER), with_mtp=True)
    full = release(layer_types=[FULL] * (DECODER + MTP))
    with pytest.raises(ValueError, match="MTP layer 46 is full_attention with a dense MLP"):
        TextShape.from_config(full, with_mtp=True).mtp_layer(1)


def test_the_two_kinds_of_attention() -> None:
    text = TextShape.from_config(release())
    full, sliding = text.layers[0].attention, text.layers[1].attention
    assert (full.num_heads, full.num_kv_heads, full.head_dim) == (64, 8, 128)
    assert (full.rotary_dim, full.rope_theta, full.window) == (64, 5e6, None)
    assert full.rope_scaling == {"rope_type": "llama3", "factor": 2.0}
    assert (sliding.num_heads, sliding.num_kv_heads, sliding.head_dim) == (96, 8, 128)
    assert (sliding.rotary_dim, sliding.rope_theta, sliding.window) == (128, 1e4, 512)
    assert sliding.rope_scaling is None
    assert text.window == 512


@pytest.mark.parametrize("absent", [None, []])
def test_no_limits_is_no_clamp(absent: Any) -> None:
    text = TextShape.from_config(release(swiglu_limits=absent, swiglu_limits_shared=absent))
    assert {(layer.routed_limit, layer.shared_limit) for layer in text.layers} == {(None, None)}


def test_one_number_for_all_layers() -> None:
    text = TextShape.from_config(release(rope_theta=10000, partial_rotary_factors=0.5))
    assert {layer.attention.rope_theta for layer in text.layers} == {10000.0}
    assert {layer.attention.rotary_dim for layer in text.layers} == {64}


def test_moe_layers_as_a_list() -> None:
    text = TextShape.from_config(release(moe_layers_enum=[1, 4]))
    assert [index for index, layer in enumerate(text.layers) if layer.is_moe] == [1, 4]


def test_no_sliding_layer_is_no_window() -> None:
    assert TextShape.from_config(release(layer_types=[FULL] * DECODER)).window is None


def test_text_config_inside_a_multimodal_one() -> None:
    text = release()
    assert text_config_of(SimpleNamespace(text_config=text)) is text
    assert text_config_of(text) is text


@pytest.mark.parametrize("name", PER_LAYER)
def test_a_list_that_is_too_short(name: str) -> None:
    short = getattr(release(), name)[: DECODER - 1]
    with pytest.raises(ValueError, match=f"{name} has 44 entries, at least 45"):
        TextShape.from_config(release(**{name: short}))


@pytest.mark.parametrize(
    "name",
    [
        "num_hidden_layers",
        "hidden_size",
        "layer_types",
        "sliding_window",
        "attention_other_setting",
        "moe_layers_enum",
        "moe_num_experts",
        "share_expert_dim",
        "rope_theta",
    ],
)
def test_a_missing_entry(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is missing"):
        TextShape.from_config(release(**{name: None}))


@pytest.mark.parametrize("name", ["swiglu_limits", "swiglu_limits_shared"])
def test_a_negative_limit(name: str) -> None:
    limits = [0.0] * 44 + [-7.0]
    with pytest.raises(ValueError, match=rf"{name}\[44\] is -7.0"):
        TextShape.from_config(release(**{name: limits}))


def test_an_unknown_layer_type() -> None:
    kinds = [FULL, "linear_attention", *[SLIDING] * 43]
    with pytest.raises(ValueError, match=r"layer_types\[1\] is 'linear_attention'.*sliding"):
        TextShape.from_config(release(layer_types=kinds))


def test_another_router_activation() -> None:
    with pytest.raises(ValueError, match="moe_router_activation is 'softmax'.*'sigmoid'"):
        TextShape.from_config(release(moe_router_activation="softmax"))
