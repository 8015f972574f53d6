"""A suffix of embeddings that no token has: the baseline of an attacker who reaches only the input.

It is trained to make the target answer likely, with the defence live in every pass, and judged by cached greedy decoding.
Soft tokens elicit almost anything (arXiv 2502.15836), so a result says nothing without the same attack on another answer.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.contracts import Intervention
from molehunt.errors import UsageError
from molehunt.model.cache import DecoderCall, on_decoder_calls
from molehunt.model.generate import before_stop, generate, stop_ids
from molehunt.model.taps import live
from molehunt.run.progress import Track, silent
from molehunt.stress.attacks.attack import AttackConfig, AttackResult, attack
from molehunt.stress.attacks.constraint import Free
from molehunt.stress.attacks.insertion import Insertion, embedding
from molehunt.stress.attacks.objective import Objective

START = "!"
"""The token whose embedding every suffix starts from, as published."""


@dataclass(frozen=True, kw_only=True)
class SoftConfig:
    """Settings of the soft suffix, as in the runs of arXiv 2606.18322 (its adapters of arXiv 2412.09565).

    Unlike there, a row stops at its margin.
    """

    tokens: int = 16
    """Number of tokens in the suffix."""
    noise: float = 0.01
    """Standard deviation of the noise that is added to each coordinate at the start."""
    steps: int = 120
    """Number of optimisation steps."""
    lr: float = 0.01
    """Learning rate of Adam, for each coordinate."""
    max_norm: float = 40.0
    """The largest Frobenius norm of the change, over all tokens."""
    target_margin: float = 0.5
    """Margin at which a row is done. If it is infinite, all steps are taken."""


def soft_start(tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[int]:
    """The starting token, repeated."""
    return tokenizer.encode(START, add_special_tokens=False)[-1:] * tokens


def soft_suffixes(
    prompts: Insertion, objective: Objective, config: SoftConfig, *, seed: int, track: Track = silent
) -> tuple[Float[Tensor, "batch inserted d_model"], AttackResult]:
    """Train a suffix for each row.

    Args:
        prompts: prompts with the starting embeddings in the place.
        objective: the objective for their rows.
        config: settings of the training.
        seed: seed of the noise.
        track: shows the steps.

    Returns:
        The trained embeddings in fp32, and the attack: its changes to the start, with the margins that they reach.
    """
    shape = prompts.entering.shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(prompts.entering)
    started = prompts.starting(prompts.entering + config.noise * noise)
    found = attack(
        started,
        objective,
        Free(),
        torch.full((shape[0],), config.max_norm, device=noise.device),
        AttackConfig(
            steps=config.steps,
            lr=config.lr * (shape[1] * shape[2]) ** 0.5 / config.max_norm,  # the attack's is a length in radii
            optimiser="adam",
            positions=shape[1],
            target_margin=config.target_margin,
        ),
        track=track,
    )
    return started.entering + found.delta, found


def soft_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    embedded: Float[Tensor, "prompts inserted d_model"],
    *,
    marks: int = 0,
    defence: Sequence[Intervention] = (),
    max_new_tokens: int,
    track: Track = silent,
) -> list[list[int]]:
    """Greedy answers, token ids up to the stop token, to prompts with embeddings inserted before their last `marks` tokens.

    Args:
        model: the tuned model.
        tokenizer: the model's tokenizer.
        prompts: token ids, without the suffix; no two may be equal.
        embedded: the suffix of each prompt.
        marks: as in `insertion_of`.
        defence: live in the prefill and in every step.
        max_new_tokens: greatest number of tokens in an answer.
        track: shows the rows.

    Raises:
        UsageError: two prompts are equal.
    """
    start = soft_start(tokenizer, embedded.shape[1])  # what a gate that reads tokens sees in their place
    whole = [[*prompt[: len(prompt) - marks], *start, *prompt[len(prompt) - marks :]] for prompt in prompts]
    known = {tuple(row): soft for row, soft in zip(whole, embedded, strict=True)}
    if len(known) != len(whole):
        raise UsageError("two of the attacked prompts are equal; give each once.")
    with _put_in(model, known, marks):
        answers = generate(
            model,
            tokenizer,
            whole,
            max_new_tokens=max_new_tokens,
            interventions=defence,
            track=track,
            what="answers to soft suffixes",
        )
    stops = stop_ids(model, tokenizer)
    return [before_stop(answer, stops) for answer in answers]


@contextmanager
def _put_in(
    model: nn.Module, known: Mapping[tuple[int, ...], Float[Tensor, "inserted d_model"]], marks: int
) -> Generator[None, None, None]:
    """Inside the block, whenever these prompts are read, the embeddings in their place are replaced by these."""
    rows: list[Tensor] = []  # suffixes of the prompts that the running pass reads; empty in a cached step
    width = 0  # columns of these prompts

    def begin(call: DecoderCall) -> None:
        nonlocal width
        rows.clear()
        if call.begins or call.again:
            ids, real = call.tokens()
            width = call.again or ids.shape[1]
            prompts = zip(ids[:, :width], real[:, :width], strict=True)
            rows.extend(known[tuple(row[there].tolist())] for row, there in prompts)

    def put(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not rows:
            return None
        put_in, end = torch.stack(rows), width - marks  # padded on the left: the same columns in every row
        changed = output.clone()
        changed[:, end - put_in.shape[1] : end] = put_in.to(output)
        return changed

    with on_decoder_calls(model, begin):
        handle = embedding(model).register_forward_hook(live(put))
        try:
            yield
        finally:
            handle.remove()
