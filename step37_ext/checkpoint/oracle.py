"""Transformers' own Step3p7, in fp32, holding weights given under the release's names."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor
from transformers.models.step3p7.modeling_step3p7 import Step3p7ForConditionalGeneration
from transformers.utils import logging

from step37_ext.checkpoint.dequantised import dequantised_weights
from step37_ext.checkpoint.dialogues import Dialogue
from step37_ext.checkpoint.files import write_files
from step37_ext.checkpoint.headers import read_json
from step37_ext.checkpoint.spec import TinySpec
from step37_ext.checkpoint.tokenizer import load_tokenizer, render_prompt
from step37_ext.checkpoint.write import write_json, write_tensors

#: The release's name of a text tensor -> the name in transformers' state dict, applied in order.
_RENAMES = (
    (r"^vit_large_projector\.", "model.multi_modal_projector."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"\.moe\.gate\.weight$", ".mlp.gate.weight"),
    (r"\.moe\.router_bias$", ".mlp.gate.e_score_correction_bias"),
    (r"\.moe\.down_proj\.weight$", ".mlp.experts.down_proj"),
    (r"\.moe\.(gate|up)_proj\.weight$", ".mlp.experts.gate_up_proj"),
    (r"\.share_expert\.", ".mlp.shared_experts."),
)


def load_model(spec: TinySpec, weights: dict[str, Tensor]) -> Step3p7ForConditionalGeneration:
    """Transformers' model in fp32 with `weights` (names as in `tensor_shapes`), in eval mode.

    The weights go through a folder and transformers' own loader, so that its name mapping and its
    rotary permutation of the vision encoder apply.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), spec, "bf16")
        write_tensors(Path(folder), weights)
        return _from_pretrained(Path(folder), torch.float32)


def transformers_model(
    folder: Path, dtype: torch.dtype = torch.float32
) -> Step3p7ForConditionalGeneration:
    """Transformers' model of any checkpoint folder, its weights dequantised, in eval mode.

    The dequantisation is `dequantised.py`'s, which shares no code with what the server runs. It is
    exact in float32; another `dtype` rounds afterwards.

    Raises:
        RuntimeError: a tensor that transformers looks for is not there or has another shape.
    """
    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)
    with tempfile.TemporaryDirectory() as plain:
        write_json(Path(plain, "config.json"), config)
        write_tensors(Path(plain), dequantised_weights(folder))
        return _from_pretrained(Path(plain), dtype)


def _from_pretrained(folder: Path, dtype: torch.dtype) -> Step3p7ForConditionalGeneration:
    with _no_progress_bar():
        loaded: Any = Step3p7ForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    model, report = loaded
    if report["missing_keys"] or report["mismatched_keys"]:
        raise RuntimeError(f"transformers could not load {folder}: {report}")
    _columns_first(model)
    return model.eval()


def _columns_first(model: Step3p7ForConditionalGeneration) -> None:
    """Give the vision encoder's rotary embedding its two coordinates in the authors' order.

    SGLang's and vLLM's encoders, like Perception Encoder's, rotate the first half of a head's
    pairs by the column and the second by the row; transformers 5.19 does it the other way round.
    """
    model.model.vision_model.rotary_emb.register_forward_pre_hook(
        lambda _, args: (args[0], args[1].flip(-1))
    )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide the loader's bar, which would break the one of training."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read_weights(
    model: Step3p7ForConditionalGeneration, start: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of `model` under the release's names, fp32.

    Vision encoder and MTP layers are taken from `start`: the one is never trained and the other
    is not part of transformers' model.
    """
    state = model.state_dict()
    weights: dict[str, Tensor] = {}
    for name, tensor in start.items():
        source = name
        for pattern, replacement in _RENAMES:
            source = re.sub(pattern, replacement, source)
        trained = state.get(source, tensor)
        if name.endswith(".moe.gate_proj.weight"):
            trained = trained.chunk(2, dim=1)[0]
        if name.endswith(".moe.up_proj.weight"):
            trained = trained.chunk(2, dim=1)[1]
        weights[name] = trained.detach().float().clone()
    return weights


@dataclass(frozen=True)
class Example:
    """A dialogue in tokens.

    Args:
        prompt: token ids up to and with the opening of the reasoning, pictures expanded.
        completion: token ids of the right answer, the end of the turn last.
        features: fp32 [picture tokens, 4 * vision width], the vision encoder's output for every
            `<im_patch>` of the prompt before the projector, or None without pictures.
    """

    name: str
    prompt: list[int]
    completion: list[int]
    features: Tensor | None

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.completion


@torch.no_grad()
def encode(
    spec: TinySpec, model: Step3p7ForConditionalGeneration, dialogues: tuple[Dialogue, ...]
) -> list[Example]:
    """Tokenise `dialogues` and run the vision encoder of `model` over their pictures."""
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), spec, "bf16")
        processor = AutoProcessor.from_pretrained(folder)
    tokenizer = load_tokenizer(spec.vocab_size)
    examples = []
    for dialogue in dialogues:
        prompt = render_prompt(tokenizer, dialogue)
        completion = tokenizer(dialogue.completion, add_special_tokens=False).input_ids
        images = dialogue.images()
        if not images:
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            examples.append(Example(dialogue.name, ids, completion, None))
            continue
        inputs = processor(text=prompt, images=images, return_tensors="pt")
        examples.append(
            Example(
                dialogue.name,
                inputs["input_ids"][0].tolist(),
                completion,
                _vision_features(
                    model,
                    inputs["pixel_values"],
                    inputs.get("pixel_values_local"),
                    [int(crops) for crops in inputs["num_local_patches"]],
                ),
            )
        )
    return examples


def _vision_features(
    model: Step3p7ForConditionalGeneration, views: Tensor, crops: Tensor | None, counts: list[int]
) -> Tensor:
    """Features in the order of the prompt: of each picture its crops, then its global view."""
    vision = model.model.vision_model
    global_features = vision(views).last_hidden_state
    crop_features = list(vision(crops).last_hidden_state) if crops is not None else []
    ordered: list[Tensor] = []
    for view, count in zip(global_features, counts, strict=True):
        ordered += [*crop_features[:count], view]
        crop_features = crop_features[count:]
    return torch.cat(ordered)


def hidden_states(
    model: Step3p7ForConditionalGeneration,
    ids: Tensor,
    features: Tensor | None,
    **kwargs: object,
) -> Tensor:
    """Final hidden states [batch, tokens, hidden] of `ids` [batch, tokens].

    `features` are those of all pictures of the batch, row after row; `kwargs` go to the text model.
    """
    text = model.model.language_model
    embeddings = text.embed_tokens(ids)
    if features is not None:
        at_pictures = (ids == model.config.image_token_id)[..., None]
        projected = model.model.multi_modal_projector(features)
        embeddings = embeddings.masked_scatter(at_pictures, projected)
    return text(inputs_embeds=embeddings, **kwargs).last_hidden_state


@torch.no_grad()
def margins(model: Step3p7ForConditionalGeneration, examples: list[Example]) -> dict[str, float]:
    """Per example, the least lead in logits of a right token over the best wrong one.

    A positive margin means that greedy decoding gives exactly the expected answer.
    """
    result = {}
    for example in examples:
        ids = torch.tensor([example.tokens])
        hidden = hidden_states(model, ids, example.features, use_cache=False)
        logits = model.lm_head(hidden[0, len(example.prompt) - 1 : -1]).float()
        right = torch.tensor(example.completion)[:, None]
        lead = logits.gather(1, right)[:, 0] - logits.scatter(1, right, -torch.inf).amax(1)
        result[example.name] = lead.min().item()
    return result
