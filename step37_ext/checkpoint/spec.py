"""Every size of the small model in one place, and the two config dictionaries made from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class TinySpec:
    """Sizes of a small Step-3.7: the release's structure, shrunk.

    The defaults are those of the trained model. The expert intermediate of 384 is three FP8 blocks
    of 128, so that at two ranks a shard begins in the middle of a block.
    """

    hidden_size: int = 256
    head_dim: int = 64
    full_heads: int = 4
    sliding_heads: int = 6
    kv_heads: int = 2
    layer_types: tuple[str, ...] = (FULL, SLIDING, SLIDING, FULL)
    dense_layers: int = 1
    dense_intermediate: int = 512
    experts: int = 8
    top_k: int = 2
    expert_intermediate: int = 384
    shared_intermediate: int = 128
    router_scaling: float = 3.0
    # The release clamps its last two layers at 7 and 16; activations of this size call for less.
    clamped_layers: int = 2
    routed_limit: float = 1.0
    shared_limit: float = 2.0
    sliding_window: int = 64
    # As in the release, the context is twice the original length; 2048 is short enough for most
    # rotary frequencies of a full layer to lie in llama3's scaled or smoothed range.
    original_max_position: int = 2048
    rope_factor: float = 2.0
    mtp_layers: int = 3
    rms_norm_eps: float = 1e-5
    vocab_size: int = 640
    vision_width: int = 64
    vision_layers: int = 2
    vision_heads: int = 2
    vision_intermediate: int = 128

    def __post_init__(self) -> None:
        for name, heads in (("full_heads", self.full_heads), ("sliding_heads", self.sliding_heads)):
            if heads % self.kv_heads:
                raise ValueError(
                    f"{name} = {heads}: must be a multiple of kv_heads = {self.kv_heads}"
                )
        if not 0 < self.top_k <= self.experts:
            raise ValueError(f"top_k = {self.top_k}: must be between 1 and {self.experts} experts")
        if self.hidden_size % 16 or self.expert_intermediate % 16:
            raise ValueError(
                f"hidden_size = {self.hidden_size}, expert_intermediate = "
                f"{self.expert_intermediate}: both must be multiples of 16, the NVFP4 group"
            )

    @property
    def layers(self) -> int:
        """Number of decoder layers, without the MTP layers."""
        return len(self.layer_types)

    @property
    def moe_layers(self) -> range:
        """Indices of the layers with routed experts: all after the dense ones."""
        return range(self.dense_layers, self.layers)

    @property
    def all_layer_types(self) -> tuple[str, ...]:
        """Attention type per layer with the MTP layers' (sliding) at the end."""
        return self.layer_types + (SLIDING,) * self.mtp_layers

    def heads(self, layer: int) -> int:
        """Query heads of decoder or MTP layer `layer`."""
        return self.full_heads if self.all_layer_types[layer] == FULL else self.sliding_heads

    def _limits(self, limit: float) -> list[float]:
        """`limit` on the last `clamped_layers` decoder layers; 0.0, no clamp, elsewhere."""
        unclamped = self.layers - self.clamped_layers
        return [0.0] * unclamped + [limit] * self.clamped_layers + [0.0] * self.mtp_layers

    def text_config(self, eos_token_ids: list[int]) -> dict[str, Any]:
        """`text_config` of config.json; per-layer lists carry the MTP entries, as the release's."""
        full = [kind == FULL for kind in self.all_layer_types]
        return {
            "architectures": ["Step3p5ForCausalLM"],
            "model_type": "step3p5",
            "dtype": "bfloat16",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.dense_intermediate,
            "num_hidden_layers": self.layers,
            "num_nextn_predict_layers": self.mtp_layers,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": int(self.original_max_position * self.rope_factor),
            "max_seq_len": int(self.original_max_position * self.rope_factor),
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": eos_token_ids,
            "pad_token_id": 1,
            "att_impl_type": "GQA",
            "num_attention_heads": self.full_heads,
            "num_attention_groups": self.kv_heads,
            "head_dim": self.head_dim,
            "attention_other_setting": {
                "attention_type": SLIDING,
                "num_attention_heads": self.sliding_heads,
                "num_attention_groups": self.kv_heads,
                "head_dim": self.head_dim,
            },
            "use_head_wise_attn_gate": True,
            "use_qk_norm": True,
            "zero_centered": True,
            "sink": False,
            "sliding_window": self.sliding_window,
            "layer_types": list(self.all_layer_types),
            "rope_theta": [5e6 if is_full else 1e4 for is_full in full],
            "partial_rotary_factors": [0.5 if is_full else 1.0 for is_full in full],
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": self.rope_factor,
                "original_max_position_embeddings": self.original_max_position,
                "low_freq_factor": 1.0,
                "high_freq_factor": 32.0,
            },
            "yarn_only_types": [FULL],
            "use_moe": True,
            "moe_layers_enum": ",".join(str(layer) for layer in self.moe_layers),
            "moe_num_experts": self.experts,
            "moe_top_k": self.top_k,
            "moe_intermediate_size": self.expert_intermediate,
            "share_expert_dim": self.shared_intermediate,
            "moe_router_activation": "sigmoid",
            "use_moe_router_bias": True,
            "norm_expert_weight": True,
            "moe_router_scaling_factor": self.router_scaling,
            "need_fp32_gate": True,
            "swiglu_limits": self._limits(self.routed_limit),
            "swiglu_limits_shared": self._limits(self.shared_limit),
        }

    def vision_config(self) -> dict[str, Any]:
        """`vision_config` of config.json: the release's 728-pixel encoder, narrower."""
        return {
            "model_type": "perception_encoder",
            "width": self.vision_width,
            "layers": self.vision_layers,
            "heads": self.vision_heads,
            "num_channels": 3,
            "image_size": 728,
            "patch_size": 14,
            "mlp_ratio": self.vision_intermediate / self.vision_width,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "use_cls_token": False,
            "use_ln_pre": True,
            "use_ln_post": False,
            "use_abs_posemb": True,
            "use_rope2d": True,
            "ls_init_value": 0.1,
            "output_dim": None,
            "pool_type": "none",
        }


#: The trained model.
TINY = TinySpec()

#: The release's own query heads per KV head: 8 on full layers, 12 on sliding ones.
GROUPS_8_12 = replace(
    TINY,
    hidden_size=128,
    head_dim=32,
    full_heads=16,
    sliding_heads=24,
    layer_types=(FULL, SLIDING, FULL),
    dense_intermediate=128,
    vision_layers=1,
)

#: Heads, experts and vision heads that four ranks can share.
FOUR_KV_HEADS = replace(
    TINY,
    hidden_size=128,
    head_dim=32,
    full_heads=8,
    sliding_heads=12,
    kv_heads=4,
    layer_types=(FULL, SLIDING, FULL),
    dense_intermediate=256,
    vision_layers=1,
    vision_heads=4,
)
