"""Profiles of many logged answers in one teacher-forced pass each, whatever their lengths."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from molehunt.model.batches import batches, padded
from molehunt.model.blocks import decoder
from molehunt.run.progress import Track, by_rows, silent
from molehunt.watch.bank import Bank
from molehunt.watch.columns import watched
from molehunt.watch.profile import Profile, profiles
from molehunt.watch.strata import prompt_features


@torch.inference_mode()
def answer_profiles(
    model: nn.Module,
    bank: Bank,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    layers_path: str | None = None,
    track: Track = silent,
    what: str = "scoring answers",
) -> list[Profile]:
    """The profile of each answer along the directions of `bank`, in the given order.

    The positions that count are those whose output is the answer: from the last prompt token (the decision) to the last
    but one of the answer. An empty answer is judged by the decision alone. No logits are computed.

    Args:
        model: the tuned model.
        bank: the watched directions.
        prompts: token ids, at least one each.
        answers: token ids that follow.
        layers_path: see `decoder_blocks`.
        track: shows rows.
        what: what progress calls this.

    Raises:
        ValueError: an empty prompt, or NaN among the activations.
        NotTestable, CannotTap: the model cannot be watched (see `watched`).
    """
    if not all(prompts):
        raise ValueError("a prompt without tokens has no decision position")
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    found: list[Profile | None] = [None] * len(rows)
    device = next(model.parameters()).device
    inner: Any = decoder(model)
    with watched(model, bank, layers_path=layers_path) as columns:
        groups = batches([len(row) for row in rows])
        for group in by_rows(track, groups, what):
            tokens, mask = padded([rows[i] for i in group])
            answered = [max(1, len(answers[i])) for i in group]
            first = torch.tensor([r * tokens.shape[1] + len(prompts[i]) - 1 for r, i in enumerate(group)])
            steps = torch.arange(max(answered)).minimum(torch.tensor(answered)[:, None] - 1)
            with columns.only(first[:, None] + steps):
                inner(input_ids=tokens.to(device), attention_mask=mask.long().to(device), use_cache=False)
            made_of = prompt_features(model, [prompts[i] for i in group])
            for i, profile in zip(group, profiles(columns.take(), answered, made_of), strict=True):
                found[i] = profile
    return [profile for profile in found if profile is not None]


@torch.inference_mode()
def token_columns(
    model: nn.Module, bank: Bank, ids: Sequence[int], *, layers_path: str | None = None
) -> Float[Tensor, "pos columns"]:
    """Every column at every token of one row, on the CPU: for looking at what was flagged. Raises as `answer_profiles`."""
    tokens = torch.tensor([list(ids)], device=next(model.parameters()).device)
    inner: Any = decoder(model)
    with watched(model, bank, layers_path=layers_path) as columns:
        inner(input_ids=tokens, use_cache=False)
        return columns.take()[0].cpu()
