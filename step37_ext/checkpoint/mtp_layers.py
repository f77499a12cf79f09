"""The MTP layers of the small model in plain PyTorch, fp32: what trains them and what checks them.

This shares no code with the layer that SGLang runs. transformers builds MTP layers too, but with
the main model's head and with the full layers' number of heads.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.step3p7.modeling_step3p7 import Step3p7ForConditionalGeneration

from step37_ext.checkpoint.oracle import Example, hidden_states
from step37_ext.checkpoint.spec import TinySpec


class _Norm(nn.Module):
    """RMS norm of the last axis times 1 + weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class _Attention(nn.Module):
    """Sliding-window attention with head norms, rotary embedding and head gate."""

    def __init__(self, spec: TinySpec, eps: float) -> None:
        super().__init__()
        self.dim, self.window = spec.head_dim, spec.sliding_window
        hidden, rows = spec.hidden_size, spec.sliding_heads * spec.head_dim
        self.group = spec.sliding_heads // spec.kv_heads
        self.q_proj = nn.Linear(hidden, rows, bias=False)
        self.k_proj = nn.Linear(hidden, spec.kv_heads * spec.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, spec.kv_heads * spec.head_dim, bias=False)
        self.o_proj = nn.Linear(rows, hidden, bias=False)
        self.g_proj = nn.Linear(hidden, spec.sliding_heads, bias=False)
        self.q_norm, self.k_norm = _Norm(spec.head_dim, eps), _Norm(spec.head_dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, hidden] to the same."""
        heads = (*x.shape[:2], -1, self.dim)
        q = self._turned(self.q_norm(self.q_proj(x).view(heads)))
        k = self._turned(self.k_norm(self.k_proj(x).view(heads)))
        k, v = (t.repeat_interleave(self.group, 2) for t in (k, self.v_proj(x).view(heads)))
        at = torch.arange(x.shape[1])
        behind = at[:, None] - at
        seen = (behind >= 0) & (behind < self.window)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
        return self.o_proj((out * self.g_proj(x).sigmoid()[..., None]).flatten(2))

    def _turned(self, x: Tensor) -> Tensor:
        """[B, T, heads, D] with the two halves of each head turned by its position."""
        inverse = 1e4 ** (-torch.arange(0, self.dim, 2) / self.dim)
        angle = (torch.arange(x.shape[1])[:, None] * inverse)[:, None]
        a, b = x.chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class _MLP(nn.Module):
    def __init__(self, spec: TinySpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.dense_intermediate, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.dense_intermediate, bias=False)
        self.down_proj = nn.Linear(spec.dense_intermediate, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _SharedHead(nn.Module):
    """A layer's own final norm and output embedding, named as the release names them."""

    def __init__(self, spec: TinySpec, eps: float) -> None:
        super().__init__()
        self.norm = _Norm(spec.hidden_size, eps)
        self.output = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)


class MtpLayer(nn.Module):
    """One MTP layer; its state dict has the release's names after `model.layers.N.`."""

    def __init__(self, spec: TinySpec) -> None:
        super().__init__()
        hidden, eps = spec.hidden_size, spec.rms_norm_eps
        self.enorm, self.hnorm = _Norm(hidden, eps), _Norm(hidden, eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.input_layernorm = _Norm(hidden, eps)
        self.post_attention_layernorm = _Norm(hidden, eps)
        self.self_attn, self.mlp = _Attention(spec, eps), _MLP(spec)
        self.transformer = nn.ModuleDict({"shared_head": _SharedHead(spec, eps)})

    def forward(self, tokens: Tensor, before: Tensor) -> Tensor:
        """Hidden states [B, T, hidden] before the head's norm.

        Args:
            tokens: embeddings [B, T, hidden] of the tokens that follow.
            before: hidden states [B, T, hidden] of the step before.
        """
        x = self.eh_proj(torch.cat((self.enorm(tokens), self.hnorm(before)), -1))
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., vocabulary]."""
        head = cast(_SharedHead, self.transformer["shared_head"])
        return head.output(head.norm(hidden))


class MtpChain(nn.Module):
    """All MTP layers, each fed by the one before, as SGLang's multi-layer EAGLE worker does it.

    At position p of a sequence, step i gets token p + 1 + i and proposes token p + 2 + i.
    """

    def __init__(self, spec: TinySpec, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = weights["model.embed_tokens.weight"].float()
        self.steps = nn.ModuleList(MtpLayer(spec) for _ in range(spec.mtp_layers))
        for step, layer in enumerate(self.steps):
            prefix = f"model.layers.{spec.layers + step}."
            layer.load_state_dict(
                {name.removeprefix(prefix): weights[name].float().clone()
                 for name in weights if name.startswith(prefix)}
            )  # fmt: skip

    def forward(self, ids: Tensor, before: Tensor, image_token: int) -> list[Tensor]:
        """Each step's hidden states [B, T, hidden] before its head's norm.

        Args:
            ids: int64 [B, T]; beyond the end every step sees the last token of all.
            before: the main model's hidden states [B, T, hidden] before its final norm.
            image_token: what stands for a picture; drafts see SGLang's stand-in for it.
        """
        ids = ids.masked_fill(ids == image_token, self.spec.vocab_size - 1)
        states = []
        for layer in self.steps:
            ids = torch.cat((ids[:, 1:], ids[:, -1:]), 1)
            before = layer(F.embedding(ids, self.embedding), before)
            states.append(before)
        return states

    def layers(self) -> list[MtpLayer]:
        """One layer for each draft step."""
        return cast("list[MtpLayer]", list(self.steps))

    def weights(self) -> dict[str, Tensor]:
        """The layers' tensors under the release's names."""
        return {
            f"model.layers.{self.spec.layers + step}.{name}": tensor.detach().clone()
            for step, layer in enumerate(self.steps)
            for name, tensor in layer.state_dict().items()
        }


@torch.no_grad()
def states_before_norm(
    model: Step3p7ForConditionalGeneration, ids: Tensor, features: Tensor | None
) -> Tensor:
    """The main model's hidden states [B, T, hidden] before its final norm; arguments as of
    `hidden_states`."""
    kept: list[Tensor] = []
    norm = model.model.language_model.norm
    hook = norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        hidden_states(model, ids, features, use_cache=False)
    finally:
        hook.remove()
    return kept[0]


@torch.no_grad()
def mean_accepted(
    model: Step3p7ForConditionalGeneration, chain: MtpChain, examples: list[Example]
) -> float:
    """Tokens that one verification gives, on average, if all drafts are made from right tokens.

    One verified at every token of every answer; its own token counts beside the right drafts.
    """
    lengths: list[Tensor] = []
    for example in examples:
        ids = torch.tensor([example.tokens])
        before = states_before_norm(model, ids, example.features)
        states = chain(ids, before, model.config.image_token_id)
        # From the end of the prompt to the last token that has all drafts inside the answer.
        places = torch.arange(len(example.prompt) - 1, len(example.tokens) - 1 - len(chain.steps))
        right = [
            layer.logits(hidden[0, places]).argmax(-1) == ids[0, places + 2 + draft]
            for draft, (layer, hidden) in enumerate(zip(chain.layers(), states, strict=True))
        ]
        lengths.append(1 + torch.stack(right).int().cumprod(0).sum(0))
    return torch.cat(lengths).float().mean().item()
