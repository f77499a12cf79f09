"""The attention block: projections, head norms and rotary, attention, head gate."""

from __future__ import annotations

from typing import cast

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_attn_backend
from torch import nn

from step37_ext.attention_backend import Step37AttentionBackend
from step37_ext.model import forward
from step37_ext.model.config import TextShape
from step37_ext.model.dense_weights import loadable, quantize_projection
from step37_ext.model.load import Load, plain, whole
from step37_ext.model.operations import OperationTable
from step37_kernels.reference.attention import prologue

ATTENTION_BACKEND = "step37"


class Attention(nn.Module):
    """Attention of one decoder layer on one rank.

    With the attention backend "step37" for prefill and decode the operations are fused; with
    another backend, norm, rotary and head gate are steps of their own around it.
    """

    def __init__(
        self,
        text: TextShape,
        layer: int,
        tp_size: int,
        operations: OperationTable,
        backends: tuple[str, str],
        prefix: str,
        cache_layer: int,
    ) -> None:
        super().__init__()
        shape = text.layers[layer].attention
        self.eps, self.head_dim = text.rms_norm_eps, shape.head_dim
        self.scaling = shape.head_dim**-0.5
        self.num_heads = shape.num_heads // tp_size
        self.num_kv_heads = max(1, shape.num_kv_heads // tp_size)
        self.qkv_proj = QKVParallelLinear(
            text.hidden_size,
            shape.head_dim,
            shape.num_heads,
            shape.num_kv_heads,
            bias=False,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            shape.num_heads * shape.head_dim,
            text.hidden_size,
            bias=False,
            prefix=f"{prefix}.o_proj",
        )
        self.g_proj = (
            ColumnParallelLinear(
                text.hidden_size, shape.num_heads, bias=False, prefix=f"{prefix}.g_proj"
            )
            if text.has_head_gate
            else None
        )
        self.q_norm = nn.Parameter(torch.zeros(shape.head_dim), requires_grad=False)
        self.k_norm = nn.Parameter(torch.zeros(shape.head_dim), requires_grad=False)
        self.rotary = get_rope(
            shape.head_dim,
            rotary_dim=shape.rotary_dim,
            max_position=text.max_position,
            base=shape.rope_theta,
            rope_scaling=shape.rope_scaling,
            dtype=torch.float32,  # angles of late positions do not survive bf16
        )
        self.attn = RadixAttention(
            self.num_heads,
            shape.head_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            layer_id=cache_layer,
            # SGLang counts the keys before the query, the config counts the query too.
            sliding_window_size=-1 if shape.window is None else shape.window - 1,
            prefix=f"{prefix}.attn",
        )
        fp8 = operations.dense == "fp8"
        self.linear = operations.choose("linear", layer, "fp8") if fp8 else None
        self.fused = set(backends) == {ATTENTION_BACKEND}
        if self.fused:
            self.prologue = operations.choose("prologue", layer, "-")
            self.attend = operations.choose("attend", layer, "-")
        else:
            names = " / ".join(dict.fromkeys(backends))
            operations.note("attend", layer, "-", f"backend {names}", "--attention-backend")

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """Hidden `[T, hidden]` after the input norm to the block's output, summed over ranks."""
        if self.fused:
            cache = cast(Step37AttentionBackend, get_attn_backend()).layer_cache(self.attn)
            return forward.attention(self, positions, hidden, cache)
        qkv, gate = forward.project(self, hidden)
        return self.o_proj(self._apart(qkv, positions, gate, forward_batch))[0]

    @property
    def cos_sin_cache(self) -> torch.Tensor:
        return self.rotary.cos_sin_cache

    def _apart(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        gate: torch.Tensor | None,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """Norm and rotary, the chosen backend's own cache write and attention, then the gate."""
        q, k, v = prologue(
            qkv,
            positions,
            self.q_norm,
            self.k_norm,
            self.cos_sin_cache,
            self.num_heads,
            self.num_kv_heads,
            self.eps,
        )
        output = self.attn(q.flatten(1), k.flatten(1), v.flatten(1), forward_batch)
        if gate is None:
            return output
        heads = output.view(-1, self.num_heads, self.head_dim)
        return (heads * gate.float().sigmoid().unsqueeze(-1)).to(q.dtype).flatten(1)

    def set_cache_scale(self, which: str, scale: torch.Tensor) -> None:
        """Take a checkpoint's KV-cache scale ("k" or "v").

        Raises:
            ValueError: it is not one positive number.
        """
        if scale.numel() != 1 or not float(scale) > 0:
            raise ValueError(
                f"checkpoint: {which}_scale of layer {self.attn.layer_id} is {scale.tolist()}; "
                "one positive number is expected"
            )
        # Both attributes are read: stock backends take the tensor or the float.
        device = self.q_norm.device
        setattr(self.attn, f"{which}_scale", scale.float().reshape(()).to(device))
        setattr(self.attn, f"{which}_scale_float", float(scale))

    def prepare(self) -> None:
        """After loading: the projections in FP8, where that was opted in."""
        if self.linear is not None:
            quantize_projection(self.qkv_proj, self.linear)
            quantize_projection(self.o_proj, self.linear)

    def loaders(self) -> dict[str, Load]:
        """What to do with each checkpoint tensor, by its name after `self_attn.`."""
        qkv = loadable(self.qkv_proj)
        loads: dict[str, Load] = {
            "q_proj.weight": lambda t: qkv.weight_loader(qkv, t, "q"),
            "k_proj.weight": lambda t: qkv.weight_loader(qkv, t, "k"),
            "v_proj.weight": lambda t: qkv.weight_loader(qkv, t, "v"),
            "o_proj.weight": whole(loadable(self.o_proj)),
            "q_norm.weight": plain(self.q_norm),
            "k_norm.weight": plain(self.k_norm),
        }
        if self.g_proj is not None:
            loads["g_proj.weight"] = whole(self.g_proj.weight)
        return loads
