"""Teaching the small model its dialogues, with transformers' own Step3p7 in fp32.

The MTP layers are taught afterwards, on the main model's finished hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.step3p7.modeling_step3p7 import Step3p7ForConditionalGeneration

from step37_ext.checkpoint.mtp_layers import MtpChain, states_before_norm
from step37_ext.checkpoint.oracle import Example, hidden_states


@dataclass(frozen=True)
class Recipe:
    """How the model is trained; part of the cache key, together with `version`.

    `worst_token_weight` times each dialogue's largest token loss is added to the mean loss: one
    wrong token spoils an answer, and this is what gives every token a margin that survives FP8 and
    NVFP4. Training that ends with a margin below `least_margin` logits is repeated from another
    seed, since rounding differs from machine to machine, and so is training whose MTP layers get
    less than `least_accepted` tokens accepted at a time. `version` is to be raised when the code
    changes what comes out.
    """

    version: int = 3
    seed: int = 0
    steps: int = 80
    mtp_steps: int = 15
    warm_up: float = 0.125
    learning_rate: float = 2.5e-3
    final_learning_rate: float = 2e-5
    decay_from: float = 0.35
    weight_decay: float = 0.05
    worst_token_weight: float = 0.3
    max_gradient_norm: float = 1.0
    least_margin: float = 1.0
    least_accepted: float = 3.0

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Linear warm-up, constant, then linear decay; both bounds are fractions of `steps`."""
        warm = min(1.0, (step + 1) / (self.warm_up * steps))
        left = min(1.0, (1 - step / steps) / (1 - self.decay_from))
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
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(parameters, recipe)
    batches = _batches(examples)
    total_targets = sum(len(batch.targets) for batch in batches)
    model.train()
    for step in range(recipe.steps):
        _set_learning_rate(optimizer, recipe.learning_rate_at(step, recipe.steps))
        mean_loss = 0.0
        for batch in batches:
            losses = _token_losses(model, batch)
            worst = torch.zeros(len(batch.ids)).scatter_reduce(0, batch.owner, losses, "amax")
            loss = losses.sum() / total_targets
            mean_loss += loss.item()
            (loss + recipe.worst_token_weight * worst.sum() / len(examples)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        on_step(mean_loss)
    model.eval()


def train_mtp(
    model: Step3p7ForConditionalGeneration,
    chain: MtpChain,
    examples: list[Example],
    recipe: Recipe,
    on_step: Callable[[float], None],
) -> None:
    """Train the MTP layers of `chain` in place, on what `model` says to `examples`.

    `on_step` is called after each step with the mean loss per target token and draft step.
    """
    batches = _batches(examples)
    states = [states_before_norm(model, batch.ids, batch.features) for batch in batches]
    parameters = list(chain.parameters())
    optimizer = _optimizer(parameters, recipe)
    count = sum(len(batch.targets) for batch in batches) * len(chain.layers())
    for step in range(recipe.mtp_steps):
        _set_learning_rate(optimizer, recipe.learning_rate_at(step, recipe.mtp_steps))
        mean_loss = 0.0
        for batch, before in zip(batches, states, strict=True):
            hidden = chain(batch.ids, before, model.config.image_token_id)
            loss = torch.zeros(())
            for draft, layer in enumerate(chain.layers()):
                # A target is two tokens and more further on than the main model's.
                proposed = layer.logits(hidden[draft].flatten(0, 1)[batch.positions - 1 - draft])
                loss = loss + F.cross_entropy(proposed, batch.targets, reduction="sum")
            mean_loss += loss.item() / count
            (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        on_step(mean_loss)


def _set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
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
