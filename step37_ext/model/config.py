"""Every shape and constant of the model, read from the checkpoint's config: the one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention.

    Attributes:
        num_heads, num_kv_heads, head_dim: of the whole model, before tensor parallelism.
        rotary_dim: leading dimensions of a head that are rotated.
        rope_theta, rope_scaling: base and scaling dict (None: unscaled).
        window: keys a query sees, itself included; None for full attention.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    window: int | None

    @property
    def kind(self) -> str:
        return FULL if self.window is None else SLIDING


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer; limits are None where the layer does not clamp."""

    attention: AttentionShape
    is_moe: bool
    routed_limit: float | None
    shared_limit: float | None


@dataclass(frozen=True)
class TextShape:
    """The text model.

    Attributes:
        layers: one entry per decoder layer, and then per MTP layer if it was asked for.
        num_mtp_layers: extra layers a checkpoint may carry after the decoder's.
        router_renormalize: whether the selected experts' weights are divided by their sum.
        router_scaling: factor on the renormalised router weights.
    """

    hidden_size: int
    vocab_size: int
    rms_norm_eps: float
    max_position: int
    dense_intermediate: int
    num_experts: int
    top_k: int
    moe_intermediate: int
    shared_intermediate: int
    router_scaling: float
    router_renormalize: bool
    has_router_bias: bool
    has_head_gate: bool
    num_mtp_layers: int
    layers: tuple[LayerShape, ...]

    @property
    def window(self) -> int | None:
        """Keys a query of a sliding layer sees, itself included (None: no sliding layer)."""
        return next((x.attention.window for x in self.layers if x.attention.window), None)

    def mtp_layer(self, draft: int) -> int:
        """The number in the checkpoint of the MTP layer that is draft step `draft`.

        Of a shape that was read with its MTP layers.

        Raises:
            ValueError: there is no such layer, or it is not a sliding layer with a dense MLP.
        """
        if not 0 <= draft < self.num_mtp_layers:
            raise ValueError(
                f"the checkpoint has {self.num_mtp_layers} MTP layers; there is none for draft "
                f"step {draft}"
            )
        layer = len(self.layers) - self.num_mtp_layers + draft
        shape = self.layers[layer]
        if shape.attention.kind != SLIDING or shape.is_moe:
            block = "routed experts" if shape.is_moe else "a dense MLP"
            raise ValueError(
                f"MTP layer {layer} is {shape.attention.kind} with {block}; "
                f"{SLIDING} with a dense MLP is supported"
            )
        return layer

    @classmethod
    def from_config(cls, config: Any, *, with_mtp: bool = False) -> TextShape:
        """Read a text config (`Step3p5Config`, or the `text_config` of a `Step3p7Config`).

        Per-layer lists may be longer than the decoder: the releases have 45 or 48 entries, the
        extra ones being the MTP layers'. With `with_mtp` they have to be there, and are read.

        Raises:
            ValueError: an entry is missing, too short or not one of the allowed values.
        """
        decoder = _get(config, "num_hidden_layers")
        mtp_layers = _mtp_layers(config, decoder)
        depth = decoder + mtp_layers if with_mtp else decoder
        moe_layers = _moe_layers(_get(config, "moe_layers_enum"))
        if _get(config, "moe_router_activation", "sigmoid") != "sigmoid":
            raise ValueError(
                f"config: moe_router_activation is {config.moe_router_activation!r}; "
                "only 'sigmoid' is supported"
            )
        layers = tuple(
            LayerShape(
                attention=_attention(config, index, depth),
                is_moe=index in moe_layers,
                routed_limit=_limit(config, "swiglu_limits", index, depth),
                shared_limit=_limit(config, "swiglu_limits_shared", index, depth),
            )
            for index in range(depth)
        )
        return cls(
            hidden_size=_get(config, "hidden_size"),
            vocab_size=_get(config, "vocab_size"),
            rms_norm_eps=_get(config, "rms_norm_eps"),
            max_position=_get(config, "max_position_embeddings"),
            dense_intermediate=_get(config, "intermediate_size"),
            num_experts=_get(config, "moe_num_experts"),
            top_k=_get(config, "moe_top_k"),
            moe_intermediate=_get(config, "moe_intermediate_size"),
            shared_intermediate=_get(config, "share_expert_dim"),
            router_scaling=float(_get(config, "moe_router_scaling_factor", 1.0)),
            router_renormalize=bool(_get(config, "norm_expert_weight", True)),
            has_router_bias=bool(_get(config, "use_moe_router_bias", False)),
            has_head_gate=bool(_get(config, "use_head_wise_attn_gate", False)),
            num_mtp_layers=mtp_layers,
            layers=layers,
        )


_REQUIRED = object()


def _get(config: Any, name: str, default: Any = _REQUIRED) -> Any:
    value = getattr(config, name, None)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"config: {name} is missing from the text config")
        return default
    return value


def _per_layer(config: Any, name: str, index: int, depth: int) -> Any:
    values = _get(config, name)
    if isinstance(values, str) or not isinstance(values, Sequence):
        return values
    if len(values) < depth:
        raise ValueError(
            f"config: {name} has {len(values)} entries, at least {depth} (one per layer) are needed"
        )
    return values[index]


def _limit(config: Any, name: str, index: int, depth: int) -> float | None:
    if not getattr(config, name, None):
        return None
    value = _per_layer(config, name, index, depth)
    if value is not None and value < 0:
        raise ValueError(f"config: {name}[{index}] is {value}; a limit is 0 (none) or positive")
    return float(value) if value else None


def _mtp_layers(config: Any, depth: int) -> int:
    """As the config counts them, or as its per-layer lists go on after the decoder's layers."""
    return max(
        int(_get(config, "num_nextn_predict_layers", 0)), len(_get(config, "layer_types")) - depth
    )


def _moe_layers(value: Any) -> frozenset[int]:
    entries = value.split(",") if isinstance(value, str) else value
    return frozenset(int(entry) for entry in entries)


def _attention(config: Any, index: int, depth: int) -> AttentionShape:
    kind = _per_layer(config, "layer_types", index, depth)
    if kind not in (FULL, SLIDING):
        raise ValueError(
            f"config: layer_types[{index}] is {kind!r}; allowed are {FULL!r} and {SLIDING!r}"
        )
    head_dim = _get(config, "head_dim")
    if kind == SLIDING:
        other = _get(config, "attention_other_setting")
        heads, kv_heads = other["num_attention_heads"], other["num_attention_groups"]
    else:
        heads, kv_heads = _get(config, "num_attention_heads"), _get(config, "num_attention_groups")
    scaled_kinds = _get(config, "yarn_only_types", ())
    factor = _per_layer(config, "partial_rotary_factors", index, depth)
    return AttentionShape(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * factor),
        rope_theta=float(_per_layer(config, "rope_theta", index, depth)),
        rope_scaling=_get(config, "rope_scaling", None) if kind in scaled_kinds else None,
        window=_get(config, "sliding_window") if kind == SLIDING else None,
    )


def text_config_of(config: Any) -> Any:
    """The text config inside a multimodal config, or the config itself if it is one."""
    return getattr(config, "text_config", None) or config


@dataclass(frozen=True)
class VisionShape:
    """The vision encoder and its projector, as far as their tensors' shapes need it."""

    width: int
    layers: int
    heads: int
    mlp_hidden: int
    num_channels: int
    patch_size: int
    grid: int
    use_ln_pre: bool
    use_ln_post: bool
    use_abs_posemb: bool
    projector_bias: bool
    text_hidden_size: int

    @classmethod
    def from_config(cls, config: Any) -> VisionShape:
        """Read a multimodal config (`Step3p7Config`)."""
        vision, text = config.vision_config, text_config_of(config)
        width, patch = _get(vision, "width"), _get(vision, "patch_size")
        return cls(
            width=width,
            layers=_get(vision, "layers"),
            heads=_get(vision, "heads"),
            mlp_hidden=int(width * _get(vision, "mlp_ratio")),
            num_channels=_get(vision, "num_channels", 3),
            patch_size=patch,
            grid=_get(vision, "image_size") // patch,
            use_ln_pre=bool(_get(vision, "use_ln_pre", True)),
            use_ln_post=bool(_get(vision, "use_ln_post", False)),
            use_abs_posemb=bool(_get(vision, "use_abs_posemb", True)),
            projector_bias=bool(_get(config, "projector_bias", False)),
            text_hidden_size=_get(text, "hidden_size"),
        )
