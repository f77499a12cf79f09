"""A small Step3p7 text config of transformers, whose modules are the references' oracle."""

from collections.abc import Callable

import pytest
import torch
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 32.0,
    "original_max_position_embeddings": 4096,  # puts frequencies below, in and above the ramp
}


@pytest.fixture
def text_config() -> Step3p7TextConfig:
    """Both attention types: full with half rotary and llama3 scaling, sliding with full rotary."""
    return Step3p7TextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        layer_types=["full_attention", "sliding_attention"],
        mlp_layer_types=["sparse", "sparse"],
        rope_theta=[5e6, 1e4],
        partial_rotary_factors=[0.5, 1.0],
        rope_scaling=dict(LLAMA3),
        sliding_window=5,
        max_position_embeddings=8192,
        n_routed_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=48,
        moe_router_scaling_factor=3.0,
        share_expert_dim=48,
        swiglu_limits=[0.0, 0.7],
        swiglu_limits_shared=[0.0, 0.9],
        gating="per-head",
        rms_norm_eps=1e-5,
        query_pre_attn_scalar=32,
        attn_implementation="eager",
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, in whatever order they run."""
    torch.manual_seed(0)


@pytest.fixture
def randomize() -> Callable[[torch.nn.Module], None]:
    """Fills a module's parameters and buffers so that every output is of order one."""

    def fill(module: torch.nn.Module) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            fan_in = tensor.shape[-1] if tensor.ndim > 1 else 4
            torch.nn.init.normal_(tensor.data, std=fan_in**-0.5)

    return fill
