"""The text model: embedding, decoder layers, final norm, head.

The residual stream is kept here and not in SGLang's layer-boundary machinery, which was rebuilt in
each of 0.5.20, 0.5.21 and 0.5.22; what that costs (attention data parallelism, pipeline stages) is
refused at start by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from sglang.srt.layers.layernorm import GemmaRMSNorm
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_parallel
from torch import nn

from step37_ext.model import forward
from step37_ext.model.attention import Attention
from step37_ext.model.config import TextShape
from step37_ext.model.dense_format import dense_format
from step37_ext.model.feed_forward import MLP, MoE
from step37_ext.model.load import Load, whole
from step37_ext.model.operations import OperationTable
from step37_ext.model.weights import WeightLoader
from step37_ext.quantization import Step37QuantConfig
from step37_ext.server_facts import attention_backend_names, checkpoint_folder, device_target


class DecoderLayer(nn.Module):
    """Norm, attention, norm, feed-forward, each with its residual.

    Its number in the KV cache is `cache_layer`, unless that is the layer's own.
    """

    # SGLang, which looks for it in every module, then refuses an update before it writes anything.
    _derived_weight_cache_error = (
        "--model-impl step37 cannot take new weights: they were laid out for their kernels when "
        "the model was loaded, and recorded CUDA graphs hold their places; start the server again"
    )

    def __init__(
        self,
        text: TextShape,
        layer: int,
        weights: str,
        stock_quant: QuantizationConfig | None,
        operations: OperationTable,
        prefix: str,
        cache_layer: int | None = None,
    ) -> None:
        super().__init__()
        parallel = get_parallel()
        self.input_layernorm = GemmaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.self_attn = Attention(
            text,
            layer,
            parallel.tp_size,
            operations,
            attention_backend_names(),
            f"{prefix}.self_attn",
            layer if cache_layer is None else cache_layer,
        )
        self.post_attention_layernorm = GemmaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.moe: MoE | None = None
        self.mlp: MLP | None = None
        if text.layers[layer].is_moe:
            self.moe = MoE(text, layer, weights, stock_quant, operations, prefix)
        else:
            self.mlp = MLP(
                text.hidden_size,
                text.dense_intermediate,
                text.layers[layer].shared_limit,
                layer,
                operations,
                f"{prefix}.mlp",
            )

    def forward(
        self,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        forward_batch: ForwardBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the feed-forward output and the residual it is to be added to."""
        return forward.decoder_layer(self, positions, hidden, residual, forward_batch)

    @property
    def feed_forward(self) -> MLP | MoE:
        block = self.mlp if self.moe is None else self.moe
        assert block is not None
        return block

    def loaders(self) -> dict[str, Load]:
        """What to do with each checkpoint tensor, by its name after `model.layers.N.`."""
        loads: dict[str, Load] = {
            f"{name}.weight": whole(getattr(self, name).weight)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        for name, load in self.self_attn.loaders().items():
            loads[f"self_attn.{name}"] = load
        prefix = "mlp." if self.moe is None else ""
        for name, load in self.feed_forward.loaders().items():
            loads[prefix + name] = load
        return loads


class TextModel(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(
        self,
        text: TextShape,
        weights: str,
        stock_quant: QuantizationConfig | None,
        operations: OperationTable,
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(text, index, weights, stock_quant, operations, f"model.layers.{index}")
            for index in range(len(text.layers))
        )
        self.norm = GemmaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.start_layer, self.end_layer = 0, len(text.layers)

    def decoder_layers(self) -> list[DecoderLayer]:
        return cast("list[DecoderLayer]", list(self.layers))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns hidden states after and before the final norm, both `[T, hidden]`."""
        hidden = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        return forward.decoder(self.layers, self.norm, positions, hidden, forward_batch)


class Step37ForCausalLM(nn.Module):
    """Text model with its head; `Step3p5ForCausalLM` of a config is served by this class."""

    def __init__(
        self, config: Any, quant_config: Step37QuantConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.config, self.quant_config = config, quant_config
        self.text = TextShape.from_config(config)
        self.weight_format = "bf16" if quant_config is None else quant_config.weights
        self.operations = OperationTable(
            device_target(
                torch.get_default_device(), self.weight_format, torch.get_default_dtype()
            ),
            dense_format(),
        )
        stock_quant = None if quant_config is None else quant_config.stock
        self.model = TextModel(self.text, self.weight_format, stock_quant, self.operations)
        self.lm_head = ParallelLMHead(self.text.vocab_size, self.text.hidden_size)
        self.logits_processor = LogitsProcessor(config)
        if get_parallel().tp_rank == 0:
            self.operations.log()

    @property
    def start_layer(self) -> int:
        return self.model.start_layer

    @property
    def end_layer(self) -> int:
        return self.model.end_layer

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_attention_sliding_window_size(self) -> int | None:
        """SGLang's convention: keys before the query, which the config's number includes."""
        return None if self.text.window is None else self.text.window - 1

    def get_embed_and_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.embed_tokens.weight, self.lm_head.weight

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> Any:
        """Logits for sampling, as SGLang's logits processor returns them."""
        hidden, before_norm = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(
            input_ids,
            hidden,
            self.lm_head,
            forward_batch,
            hidden_states_before_norm=before_norm,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Stream a checkpoint's tensors into the model (see `WeightLoader`)."""
        WeightLoader(
            self.text, None, self.weight_format, self.loaders(), self.attentions(), self.dtype
        ).run(weights, checkpoint_folder())
        self.prepare()

    def post_load_weights(self) -> None:
        """SGLang calls it in place of `load_weights` where it fills the parameters itself."""
        self.prepare()

    def prepare(self) -> None:
        """After loading: lay the weights out for their kernels, layer by layer."""
        for layer in self.model.decoder_layers():
            layer.self_attn.prepare()
            layer.feed_forward.prepare()

    def attentions(self) -> list[Attention]:
        return [layer.self_attn for layer in self.model.decoder_layers()]

    def loaders(self) -> dict[str, Load]:
        """What to do with each tensor of a checkpoint, by canonical name."""
        loads: dict[str, Load] = {
            "model.embed_tokens.weight": whole(self.model.embed_tokens.weight),
            "model.norm.weight": whole(self.model.norm.weight),
            "lm_head.weight": whole(self.lm_head.weight),
        }
        for index, layer in enumerate(self.model.decoder_layers()):
            for name, load in layer.loaders().items():
                loads[f"model.layers.{index}.{name}"] = load
        return loads
