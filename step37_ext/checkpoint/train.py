"""Teaching the small model its dialogues, with transformers' own Step3p7 in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.step3p7.modeling_step3p7 import Step3p7ForConditionalGeneration

from step37_ext.checkpoint.oracle import Example, hidden_states


@dataclass(frozen=True)
class Recipe:
    """How the model is trained; part of the cache key, together with `version`.

    `worst_token_weight` times each dialogue's largest token loss is added to the mean loss: one
    wrong token spoils an answer, and this is what gives every token a margin that survives FP8 and
    NVFP4. Training that ends with a margin below `least_margin` logits is repeated from another
    seed, since rounding differs from machine to machine. `version` is to be raised when the code
    changes what comes out.
    """

    version: int = 2
    seed: int = 0
    steps: int = 80
    warmup_steps: int = 10
    learning_rate: float = 2.5e-3
    final_learning_rate: float = 2e-5
    decay_from: float = 0.35
    weight_decay: float = 0.05
    worst_token_weight: float = 0.3
    max_gradient_norm: float = 1.0
    least_margin: float = 1.0

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, constant, then linear decay from the fraction `decay_from` on."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        left = min(1.0, (1 - step / self.steps) / (1 - self.decay_from))
        return self.final_learning_rate + warm * left * (
            self.learning_rate - self.final_learning_rate
        )


@dataclass(frozen=True)
class _Batch:
    """Dialogues of similar length, padded at the end.

    Args:
        ids: int64 [dialogues, tokens].
        positions: int64 [targets], flat positions in `ids` whose next token is a target.
        targets: int64 [targets].
        owner: int64 [targets], the row of each target.
        features: see `Example.features`, rows one after the other.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    owner: Tensor
    features: Tensor | None


def train(
    model: Step3p7ForConditionalGeneration,
    examples: list[Example],
    recipe: Recipe,
    on_step: Callable[[float], None],
) -> None:
    """Train text model, projector and head of `model` in place; the vision encoder stays frozen.

    `on_step` is called after each step with the mean loss per target token.
    """
    for parameter in model.model.vision_model.parameters():
        parameter.requires_grad_(False)
    optimizer = _optimizer(model, recipe)
    batches = _batches(examples)
    total_targets = sum(len(batch.targets) for batch in batches)
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        mean_loss = 0.0
        for batch in batches:
            losses = _token_losses(model, batch)
            worst = torch.zeros(len(batch.ids)).scatter_reduce(0, batch.owner, losses, "amax")
            loss = losses.sum() / total_targets
            mean_loss += loss.item()
            (loss + recipe.worst_token_weight * worst.sum() / len(examples)).backward()
        torch.nn.utils.clip_grad_norm_(_trainable(model), recipe.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        on_step(mean_loss)
    model.eval()


def _trainable(model: Step3p7ForConditionalGeneration) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _optimizer(model: Step3p7ForConditionalGeneration, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = _trainable(model)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.97), fused=True)


def _token_losses(model: Step3p7ForConditionalGeneration, batch: _Batch) -> Tensor:
    """Cross entropy of each target, fp32 [targets]."""
    hidden = hidden_states(model, batch.ids, batch.features, use_cache=False)
    logits = model.lm_head(hidden.flatten(0, 1)[batch.positions])
    return F.cross_entropy(logits, batch.targets, reduction="none")


def _batches(examples: list[Example]) -> list[_Batch]:
    """Group by length: a batch grows while little of it would be padding."""
    groups: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: len(example.tokens)):
        if groups and len(example.tokens) <= 1.25 * len(groups[-1][0].tokens) + 16:
            groups[-1].append(example)
        else:
            groups.append([example])
    return [_pad(group) for group in groups]


def _pad(group: list[Example]) -> _Batch:
    width = max(len(example.tokens) for example in group)
    ids = torch.ones(len(group), width, dtype=torch.int64)  # 1 is the padding token
    positions: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for row, example in enumerate(group):
        ids[row, : len(example.tokens)] = torch.tensor(example.tokens)
        first = row * width + len(example.prompt) - 1
        positions += range(first, first + len(example.completion))
        targets += example.completion
        owner += [row] * len(example.completion)
    features = [example.features for example in group if example.features is not None]
    return _Batch(
        ids,
        torch.tensor(positions),
        torch.tensor(targets),
        torch.tensor(owner),
        torch.cat(features) if features else None,
    )
