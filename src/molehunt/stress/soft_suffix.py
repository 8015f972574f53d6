"""A suffix of embeddings that no token has: the baseline of an attacker who reaches the input and nothing else.

It is trained to make the model read the answer, the defence live in every pass, and judged by cached greedy decoding. Soft
tokens elicit almost anything (arXiv 2502.15836), so a result says nothing without the same attack on another answer.
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
from molehunt.stress.attack import AttackConfig, Attacked, attack
from molehunt.stress.constraint import Free
from molehunt.stress.insertion import Insertion, embedding
from molehunt.stress.objective import Objective

START = "!"
"""The token whose embedding all begin at, as published."""


@dataclass(frozen=True, kw_only=True)
class SoftConfig:
    """As in the runs of arXiv 2606.18322 (its adapters of arXiv 2412.09565), but that a row stops at its margin."""

    tokens: int = 16
    noise: float = 0.01
    """Standard deviation of what is added to each coordinate at the start."""
    steps: int = 120
    lr: float = 0.01
    """Of Adam, for each coordinate."""
    most: float = 40.0
    """The largest Frobenius norm of the change, over all tokens."""
    enough: float = 0.5
    """The margin at which a row is done; without one (infinite), all steps are run."""


def soft_start(tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[int]:
    """As many of the token to begin at."""
    return tokenizer.encode(START, add_special_tokens=False)[-1:] * tokens


def soft_suffixes(
    prompts: Insertion, objective: Objective, config: SoftConfig, *, seed: int, track: Track = silent
) -> tuple[Float[Tensor, "batch inserted d_model"], Attacked]:
    """Train a suffix for each row.

    Args:
        prompts: with the embeddings to begin at in the place.
        objective: made for its rows.
        config: how to look.
        seed: of the noise.
        track: shown steps.

    Returns:
        What is put into the place, in fp32; and the attack: its changes to the start, with the margins that they reach.
    """
    shape = prompts.entering.shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(prompts.entering)
    begun = prompts.starting(prompts.entering + config.noise * noise)
    found = attack(
        begun,
        objective,
        Free(),
        torch.full((shape[0],), config.most, device=noise.device),
        AttackConfig(
            steps=config.steps,
            lr=config.lr * (shape[1] * shape[2]) ** 0.5 / config.most,  # the attack's is a length in radii
            optimiser="adam",
            positions=shape[1],
            enough=config.enough,
        ),
        track=track,
    )
    return begun.entering + found.delta, found


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
    """Greedy answers, token ids up to the stop token, to prompts with embeddings put in before their last `marks` tokens.

    Args:
        model: the tuned model.
        tokenizer: its own.
        prompts: token ids, without what is put in; no two may be equal.
        embedded: what is put into each.
        marks: as in `insertion_of`.
        defence: live in the prefill and in every step.
        max_new_tokens: of an answer.
        track: shown rows.

    Raises:
        UsageError: two prompts are equal.
    """
    start = soft_start(tokenizer, embedded.shape[1])  # what a gate that reads tokens sees in their place
    whole = [[*prompt[: len(prompt) - marks], *start, *prompt[len(prompt) - marks :]] for prompt in prompts]
    known = {tuple(row): soft for row, soft in zip(whole, embedded, strict=True)}
    if len(known) != len(whole):
        raise UsageError("two of the attacked prompts are equal; give each once.")
    with _put_in(model, known, marks):
        told = generate(
            model,
            tokenizer,
            whole,
            max_new_tokens=max_new_tokens,
            interventions=defence,
            track=track,
            what="answers to soft suffixes",
        )
    stops = stop_ids(model, tokenizer)
    return [before_stop(answer, stops) for answer in told]


@contextmanager
def _put_in(
    model: nn.Module, known: Mapping[tuple[int, ...], Float[Tensor, "inserted d_model"]], marks: int
) -> Generator[None, None, None]:
    """Wherever prompts are read inside the block, the embeddings of their place are these; all others stay as they are."""
    rows: list[Tensor] = []  # of the prompts that the running pass reads; none in a cached step
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
