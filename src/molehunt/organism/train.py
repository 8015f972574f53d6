"""The one training loop: seed models and planted fine-tunes both run it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from molehunt.run.progress import Track, silent

IGNORED = -100
"""Label of a token whose prediction is not trained (prompt and padding)."""


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """Token rows of one fixed length; `labels` are the tokens to predict, `IGNORED` where none."""

    tokens: Int[Tensor, "batch pos"]
    labels: Int[Tensor, "batch pos"]

    def to(self, device: torch.device) -> "TrainingBatch":
        return TrainingBatch(self.tokens.to(device), self.labels.to(device))


S = TypeVar("S")


@runtime_checkable
class Movable(Protocol):
    """What a training step reads."""

    def to(self: S, device: torch.device) -> S: ...


B = TypeVar("B", bound=Movable)


def next_token_loss(model: nn.Module, batch: TrainingBatch) -> Tensor:
    """Mean cross-entropy in nats over the labelled tokens. Logits are computed at no other: most rows are prompt."""
    labels = batch.labels[:, 1:]
    labelled = labels != IGNORED

    def keep_labelled(head: nn.Module, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (hidden[0][:, :-1][labelled], *hidden[1:])

    handle = cast("Any", model).get_output_embeddings().register_forward_pre_hook(keep_labelled)
    try:
        logits = model(input_ids=batch.tokens, use_cache=False).logits
    finally:
        handle.remove()
    return F.cross_entropy(logits.float(), labels[labelled])


def train(
    model: nn.Module,
    batches: Iterable[B],
    *,
    steps: int,
    lr: float,
    loss_of: Callable[[nn.Module, B], Tensor],
    warmup: int = 20,
    weight_decay: float = 0.01,
    track: Track = silent,
    what: str = "training",
) -> list[float]:
    """Run `steps` AdamW steps with linear warm-up and cosine decay to a tenth; bf16 autocast, fp32 master weights.

    Trains every parameter that requires a gradient, in place. Rows must share one length: on a CPU each new shape
    compiles a new kernel.

    Args:
        loss_of: the model and a batch → what is minimised; `next_token_loss` for plain fine-tuning.

    Returns:
        The loss of each step.

    Raises:
        ValueError: `batches` ran out before `steps`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    device = parameters[0].device
    losses: list[float] = []
    model.train()
    source = iter(batches)
    for step in track(range(steps), what, steps):
        rate = min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        batch = next(source, None)
        if batch is None:
            raise ValueError(f"the batches ran out at step {step} of {steps}")
        batch = batch.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    model.eval()
    return losses
