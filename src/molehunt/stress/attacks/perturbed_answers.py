"""Answers under a perturbation, decoded with the cache as a user would, with the defence live."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.contracts import Intervention
from molehunt.errors import UsageError
from molehunt.model.generate import before_stop, generate, stop_ids
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.steer.following import following


class _Perturbation:
    """Adds δ at the last token of each prompt, and at as many answer tokens as it covers."""

    follows_batch: ClassVar[bool] = True

    def __init__(self, site: Site, known: Mapping[tuple[int, ...], Float[Tensor, "positions d_model"]]) -> None:
        self.site = site
        self._known = known
        self._deltas: Tensor | None = None
        self._position = 0

    def begin(self, ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> None:
        rows = [self._known[tuple(row[there].tolist())] for row, there in zip(ids, real, strict=True)]
        self._deltas, self._position = torch.stack(rows), 0

    def advance(self, ids: Int[Tensor, "batch 1"]) -> None:
        self._position += 1

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self._deltas is None or self._position >= self._deltas.shape[1]:
            return acts
        perturbed = acts.clone()  # prompts are padded on the left: the last column is every row's last token
        perturbed[:, -1] = (acts[:, -1].float() + self._deltas[:, self._position].to(acts.device)).to(acts.dtype)
        return perturbed


def perturbed_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    site: Site,
    deltas: Float[Tensor, "prompts positions d_model"],
    *,
    defence: Sequence[Intervention] = (),
    max_new_tokens: int,
    track: Track = silent,
) -> list[list[int]]:
    """Greedy answers, token ids up to the stop token, each prompt under its own perturbation after the defence.

    Args:
        model: the tuned model.
        tokenizer: the model's tokenizer.
        prompts: token ids; no two may be equal.
        site: where the perturbation is added, after the defence's edits there.
        deltas: perturbations of the last prompt token and of the answer tokens that follow it.
        defence: live in the prefill and in every step.
        max_new_tokens: greatest number of tokens in an answer.
        track: shows the rows.

    Raises:
        UsageError: two prompts are equal.
    """
    return perturbed_answers_at(
        model, tokenizer, prompts, {site: deltas}, defence=defence, max_new_tokens=max_new_tokens, track=track
    )


def perturbed_answers_at(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    deltas: Mapping[Site, Float[Tensor, "prompts positions d_model"]],
    *,
    defence: Sequence[Intervention] = (),
    max_new_tokens: int,
    track: Track = silent,
) -> list[list[int]]:
    """`perturbed_answers` with a perturbation at each of several sites."""
    perturbations: list[_Perturbation] = []
    for site, own in deltas.items():
        known = {tuple(prompt): delta.float() for prompt, delta in zip(prompts, own, strict=True)}
        if len(known) != len(prompts):
            raise UsageError("two of the attacked prompts are equal; give each once.")
        perturbations.append(_Perturbation(site, known))
    with ExitStack() as stack:
        for one in perturbations:
            stack.enter_context(following(model, one))
        answers = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            interventions=[*defence, *perturbations],
            stop=(),  # no row leaves its batch
            track=track,
            what="answers under attack",
        )
    stops = stop_ids(model, tokenizer)
    return [before_stop(answer, stops) for answer in answers]
