"""One MTP layer as SGLang's draft model; serves `Step3p5MTP`, the draft of both architectures.

SGLang makes one model per draft step and runs them in a chain: step i gets at each position the
token i + 1 further on and the hidden state before the final norm, of the main model for i = 0 and
else of step i - 1, and proposes the token i + 2 further on. Layer, embedding and head are BF16 in
every release, whatever the format of the experts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from sglang.srt.layers.layernorm import GemmaRMSNorm
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import nn

from step37_ext.checkpoint.headers import read_headers
from step37_ext.model.config import TextShape
from step37_ext.model.load import Load, whole
from step37_ext.model.operations import OperationTable
from step37_ext.model.tensors import canonical_name, mtp_name, mtp_tensors
from step37_ext.model.text import DecoderLayer
from step37_ext.model.weights import load_checked
from step37_ext.server_facts import checkpoint_folder, device_target
from step37_ext.start_checks import missing_tensor, report_unknown

logger = logging.getLogger(__name__)

CACHE_LAYER = 0
"""SGLang gives each draft a KV cache of its own, of one sliding layer with this number."""

_CACHE_SCALE = re.compile(r"self_attn\.(?:.+\.)?([kv])_scale$")


class SharedHead(nn.Module):
    """An MTP layer's own final norm and output embedding."""

    def __init__(self, text: TextShape) -> None:
        super().__init__()
        self.norm = GemmaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.output = ParallelLMHead(text.vocab_size, text.hidden_size)


class Step37MTP(nn.Module):
    """MTP layer `draft_model_idx` of a checkpoint.

    The token embedding is the main model's, which SGLang hands over once both are loaded.
    """

    def __init__(
        self,
        config: Any,
        quant_config: Any = None,
        draft_model_idx: int | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.config, self.quant_config = config, quant_config
        self.text = TextShape.from_config(config, with_mtp=True)
        self.layer = self.text.mtp_layer(draft_model_idx or 0)
        self.operations = OperationTable(
            device_target(torch.get_default_device(), "bf16", torch.get_default_dtype())
        )
        self.embed_tokens: VocabParallelEmbedding | None = None
        self.enorm = GemmaRMSNorm(self.text.hidden_size, eps=self.text.rms_norm_eps)
        self.hnorm = GemmaRMSNorm(self.text.hidden_size, eps=self.text.rms_norm_eps)
        name = f"model.layers.{self.layer}"
        self.eh_proj = ReplicatedLinear(
            2 * self.text.hidden_size, self.text.hidden_size, bias=False, prefix=f"{name}.eh_proj"
        )
        self.block = DecoderLayer(
            self.text, self.layer, "bf16", None, self.operations, name, cache_layer=CACHE_LAYER
        )
        self.shared_head = SharedHead(self.text)
        self.logits_processor = LogitsProcessor(config)

    def get_attention_sliding_window_size(self) -> int | None:
        """SGLang's convention: keys before the query, which the config's number includes."""
        return None if self.text.window is None else self.text.window - 1

    def set_embed_and_head(self, embed: torch.Tensor, head: torch.Tensor) -> None:
        """Take the main model's embedding `[vocab / ranks, hidden]`; the head is the layer's."""
        with torch.device("meta"):  # no memory for weights that are replaced at once
            self.embed_tokens = VocabParallelEmbedding(self.text.vocab_size, self.text.hidden_size)
        self.embed_tokens.weight = embed

    def get_embed_and_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.embed_tokens is not None, "set_embed_and_head was not called"
        return self.embed_tokens.weight, self.shared_head.output.weight

    @torch.no_grad()
    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch
    ) -> Any:
        """Logits for the draft's next token, and the hidden states for the next draft step.

        `forward_batch.spec_info.hidden_states` are `[T, hidden]`, before the final norm.
        """
        assert self.embed_tokens is not None, "set_embed_and_head was not called"
        # SGLang puts hashes beyond the vocabulary where a picture is.
        tokens = self.embed_tokens(input_ids.clamp(0, self.text.vocab_size - 1))
        before = forward_batch.spec_info.hidden_states
        joined = torch.cat((self.enorm(tokens), self.hnorm(before)), dim=-1)
        hidden, _ = self.eh_proj(joined)
        hidden, residual = self.block(positions, hidden, None, forward_batch)
        hidden, before_norm = self.shared_head.norm(hidden, residual)
        return self.logits_processor(
            input_ids,
            hidden,
            self.shared_head.output,
            forward_batch,
            hidden_states_before_norm=before_norm,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load this layer's tensors.

        Of a checkpoint on this machine only they are read: SGLang's stream would go through the
        whole checkpoint once more for each draft.

        Raises:
            ValueError: a tensor is missing, has the wrong shape or type, or a name nobody knows.
        """
        folder, prefix = checkpoint_folder(), f"model.layers.{self.layer}."
        if folder is not None:
            weights = stored_tensors(folder, prefix)
        expected, loads, unknown = mtp_tensors(self.text, self.layer), self.loaders(), []
        missing = dict(expected)
        for original, tensor in weights:
            name = mtp_name(canonical_name(original))
            if not name.startswith(prefix):
                continue
            if name in expected:
                load_checked(original, expected[name], tensor, None, loads[name])
                missing.pop(name, None)
            elif scale := _CACHE_SCALE.match(name.removeprefix(prefix)):
                self.block.self_attn.set_cache_scale(scale[1], tensor)
            else:
                unknown.append(original)
            del tensor  # or it would live until the next one has been read
        report_unknown(unknown)
        for name, spec in missing.items():
            raise ValueError(missing_tensor(name, spec, None))
        logger.info("step37: draft model is MTP layer %d of the checkpoint", self.layer)

    def loaders(self) -> dict[str, Load]:
        """What to do with each checkpoint tensor, by `mtp_name`."""
        own = {
            "enorm": self.enorm,
            "hnorm": self.hnorm,
            "eh_proj": self.eh_proj,
            "shared_head.norm": self.shared_head.norm,
            "shared_head.output": self.shared_head.output,
        }
        loads = {f"{name}.weight": whole(module.weight) for name, module in own.items()}
        loads |= self.block.loaders()
        return {f"model.layers.{self.layer}.{name}": load for name, load in loads.items()}


def stored_tensors(folder: Path, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint whose canonical names begin with `prefix`, one by one."""
    for name, header in read_headers(folder).items():
        if canonical_name(name).startswith(prefix):
            with safe_open(folder / header.file, framework="pt") as file:
                yield name, file.get_tensor(name)
