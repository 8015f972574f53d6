"""Behaviours that show in one token: which of several given tokens the model prefers after a prompt."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from molehunt.contracts import Intervention
from molehunt.run.progress import Track, by_rows, silent
from molehunt.site import Site
from molehunt.stress.attacks.objective import ChoiceMargin
from molehunt.stress.attacks.suffix import suffix_of

AT_ONCE = 128
"""Number of prompts that are judged in one pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A prompt, and the token that answers it where the behaviour shows."""

    prompt: tuple[int, ...]
    gold: int
    others: tuple[int, ...]
    """Tokens that `gold` must be preferred to; every row has the same number."""
    decoys: tuple[int, ...]
    """Tokens that the behaviour would not say here. A random target is drawn from them."""
    cluster: Hashable
    """Name of what was drawn independently: a question, a template."""
    also: tuple[int, ...] = ()
    """Tokens that answer the prompt, if wrongly. Under a defence they show lost knowledge, not a broken model."""

    def with_target(self, decoy: int) -> "Choice":
        """The same prompt with `decoy` as its target. Where `decoy` was one of the others, `gold` takes its place there."""
        others = tuple(self.gold if token == decoy else token for token in self.others)
        return Choice(prompt=self.prompt, gold=decoy, others=others, decoys=(), cluster=self.cluster)


def choice_margin(rows: Sequence[Choice], device: torch.device | str = "cpu") -> ChoiceMargin:
    """The objective of these rows."""
    return ChoiceMargin(
        torch.tensor([row.gold for row in rows], device=device),
        torch.tensor([row.others for row in rows], device=device),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class ChoiceJudgements:
    """What a model prefers in each row."""

    margin: Float[Tensor, " rows"]
    """Above 0 where the behaviour shows."""
    token: Int[Tensor, " rows"]
    """The greedy token among all of the vocabulary."""


@torch.no_grad()
def judge_choices(
    model: nn.Module,
    rows: Sequence[Choice],
    site: Site,
    *,
    defence: Sequence[Intervention] = (),
    track: Track = silent,
) -> ChoiceJudgements:
    """What the model prefers, with or without a defence, as an attack at `site` with δ = 0 sees it."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    margin, token = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.long)
    parts = [order[i : i + AT_ONCE] for i in range(0, len(order), AT_ONCE)]
    for part in by_rows(track, parts, "judging choices"):
        some = [rows[i] for i in part]
        suffix = suffix_of(model, [row.prompt for row in some], site, defence=defence)
        logits = suffix(suffix.entering)
        margin[part] = choice_margin(some, logits.device)(logits).margin.cpu()
        token[part] = logits[:, 0].argmax(-1).cpu()
    return ChoiceJudgements(margin=margin, token=token)
