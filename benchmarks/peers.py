"""Trainers of sae-lens and dictionary-learning behind one form, each on its own defaults but for what makes them equal.

Equal: architecture, width, k or penalty, learning rate with its rise and fall, batch, tokens, and after how many tokens
a latent counts as dead. Each gets activations in the scale that its own code would bring them to.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = ("topk", "batch-topk", "relu")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One dictionary, in words that all three packages share."""

    architecture: str
    d_model: int
    d_dict: int
    k: int
    l1: float
    """In our units: of codes on inputs of RMS 1, over √d_model."""
    lr: float
    steps: int
    batch: int
    device: str

    @property
    def warmup(self) -> int:
        return max(2, self.steps // 20)

    @property
    def decay(self) -> int:
        return max(2, self.steps // 5)

    @property
    def dead_after(self) -> int:
        """Steps."""
        return max(1, self.steps // 10)


class Peer(ABC):
    """A dictionary of another package in training."""

    name: str

    @abstractmethod
    def step(self, x: Tensor) -> None:
        """One training step on inputs of RMS 1."""

    @abstractmethod
    def finished(self) -> Any:
        """Codes and reconstruction of inputs of RMS 1, as its own inference does: x → (code, rebuilt)."""


class SaeLens(Peer):
    """`SAETrainer.step`, with the normalisation `expected_average_only_in`, which is RMS 1."""

    def __init__(self, task: Task, *, sparse: bool = False) -> None:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
        from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self.name = f"sae-lens {metadata.version('sae-lens')}"
        common: dict[str, Any] = {"d_in": task.d_model, "d_sae": task.d_dict, "device": task.device}
        if task.architecture == "topk":
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=task.k, use_sparse_activations=sparse, **common))
        elif task.architecture == "batch-topk":
            sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=task.k, **common))
        else:
            penalty = {"l1_coefficient": task.l1 * task.d_model**0.5, "l1_warm_up_steps": task.steps // 10}
            sae = StandardTrainingSAE(StandardTrainingSAEConfig(**penalty, **common))
        config = SAETrainerConfig(
            total_training_samples=task.steps * task.batch,
            train_batch_size_samples=task.batch,
            lr=task.lr,
            lr_end=task.lr,
            lr_warm_up_steps=task.warmup,
            lr_decay_steps=task.decay,
            device=task.device,
            dead_feature_window=task.dead_after,
        )
        self.sae: Any = sae.to(task.device)
        self.trainer: Any = SAETrainer(config, self.sae, iter(()))

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def finished(self) -> Any:
        sae = self.sae.eval()
        threshold = getattr(sae, "topk_threshold", None)

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            code, pre = sae.encode_with_hidden_pre(x)
            if threshold is not None:  # the JumpReLU that it is saved as
                code = torch.where(pre > threshold, pre, torch.zeros_like(pre))
            return code, sae.decode(code)

        return run


class DictionaryLearning(Peer):
    """`trainer.update`, with the normalisation of `trainSAE(normalize_activations=True)`, which is mean square norm 1."""

    def __init__(self, task: Task) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.name = f"dictionary-learning {metadata.version('dictionary-learning')}"
        self.architecture, self.taken = task.architecture, 0
        self.scale = task.d_model**-0.5
        common: dict[str, Any] = {
            "steps": task.steps, "activation_dim": task.d_model, "dict_size": task.d_dict, "layer": 0, "lm_name": "none",
            "lr": task.lr, "warmup_steps": task.warmup, "decay_start": task.steps - task.decay, "device": task.device,
            "seed": 0,
        }  # fmt: skip
        if task.architecture == "relu":
            penalty = {"l1_penalty": task.l1, "sparsity_warmup_steps": task.steps // 10}
            self.trainer: Any = StandardTrainerAprilUpdate(**penalty, **common)
            return
        made = TopKTrainer if task.architecture == "topk" else BatchTopKTrainer
        self.trainer = made(k=task.k, threshold_start_step=task.steps // 2, threshold_beta=0.99, **common)
        self.trainer.dead_feature_threshold = task.dead_after * task.batch

    def step(self, x: Tensor) -> None:
        self.trainer.update(self.taken, x * self.scale)
        self.taken += 1

    def finished(self) -> Any:
        ae, scale = self.trainer.ae.eval(), self.scale

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            code = ae.encode(x * scale)
            return code, ae.decode(code) / scale

        return run


PEERS: dict[str, type[SaeLens] | type[DictionaryLearning]] = {
    "sae-lens": SaeLens,
    "dictionary-learning": DictionaryLearning,
}


def installed() -> dict[str, bool]:
    """Which of `PEERS` this Python has."""
    have = {
        distribution.name.lower().replace("_", "-") for distribution in metadata.distributions() if distribution.name
    }
    return {name: name in have for name in PEERS}
