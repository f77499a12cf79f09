"""Text model plus SGLang's own vision encoder; serves `Step3p7ForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.linear import ColumnParallelLinear
from sglang.srt.models.step3_vl_10b import PerceptionEncoder
from sglang.srt.models.step3p7 import Step3p7ForConditionalGeneration
from torch import nn
from transformers.activations import ACT2FN

from step37_ext.model.config import VisionShape
from step37_ext.model.load import Load, plain, whole
from step37_ext.model.text import Step37ForCausalLM
from step37_ext.model.weights import WeightLoader
from step37_ext.quantization import Step37QuantConfig
from step37_ext.server_facts import checkpoint_folder

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import MultimodalDataItem

_VISION_NAMES = (  # the releases' names of the encoder's tensors to SGLang's modules
    (".attn.in_proj_", ".attn.qkv_proj."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)


class Step37ForConditionalGeneration(Step3p7ForConditionalGeneration):
    """SGLang's model class with this project's text model and weight loading.

    Image features, prompt padding and the forward that joins them are inherited.
    """

    def __init__(
        self, config: Any, quant_config: Step37QuantConfig | None = None, prefix: str = ""
    ) -> None:
        nn.Module.__init__(self)  # the stock constructor would build the stock text model
        self.config, self.quant_config = config, quant_config
        vision = config.vision_config
        self.vision_model = PerceptionEncoder(
            vision, ACT2FN[vision.hidden_act], quant_config=None, prefix="vision_model"
        )
        self.vit_large_projector = ColumnParallelLinear(
            vision.width * 4,
            config.text_config.hidden_size,
            bias=config.projector_bias,
            gather_output=True,
            quant_config=None,
            prefix="vit_large_projector",
        )
        self.language_model = Step37ForCausalLM(config.text_config, quant_config)

    def get_attention_sliding_window_size(self) -> int | None:
        return self.language_model.get_attention_sliding_window_size()

    def get_image_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """Features of the pictures of one forward pass, joined, `[patch tokens, hidden]`.

        SGLang hands over all pictures that miss its cache; the stock method takes exactly one.
        """
        stock = super().get_image_feature  # super() does not see self inside a comprehension
        return torch.cat([stock([item]) for item in items])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Stream a checkpoint's tensors into encoder, projector and text model."""
        language = self.language_model
        vision = VisionShape.from_config(self.config)
        WeightLoader(
            language.text,
            vision,
            language.weight_format,
            language.loaders() | self._vision_loaders(),
            language.attentions(),
            language.dtype,
        ).run(weights, checkpoint_folder())
        language.prepare()

    def post_load_weights(self) -> None:
        """SGLang calls it in place of `load_weights` where it fills the parameters itself."""
        self.language_model.post_load_weights()

    def _vision_loaders(self) -> dict[str, Load]:
        parts = {
            "vision_model.": self.vision_model,
            "vit_large_projector.": self.vit_large_projector,
        }
        loads: dict[str, Load] = {}
        for prefix, module in parts.items():
            for name, parameter in module.named_parameters():
                own = hasattr(parameter, "weight_loader")
                loads[_release_name(prefix + name)] = whole(parameter) if own else plain(parameter)
        return loads


def _release_name(name: str) -> str:
    for release, module in _VISION_NAMES:
        name = name.replace(module, release)
    return name
