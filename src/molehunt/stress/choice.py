"""Behaviours that show in one token: which of some given ones the model prefers behind a prompt."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from molehunt.contracts import Intervention
from molehunt.run.progress import Track, by_rows, silent
from molehunt.site import Site
from molehunt.stress.objective import ChoiceMargin
from molehunt.stress.suffix import suffix_of

AT_ONCE = 128
"""Prompts in one pass where all are judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A prompt, and what it is answered with where the behaviour shows."""

    prompt: tuple[int, ...]
    gold: int
    others: tuple[int, ...]
    """What `gold` must be preferred to; as many in every row."""
    decoys: tuple[int, ...]
    """Tokens that the behaviour would not say here: a random target is drawn from them."""
    cluster: Hashable
    """What was drawn independently: a question, a template."""
    also: tuple[int, ...] = ()
    """What answers the prompt, too, if wrongly: said under a defence, it is a sign of lost knowledge, not of a broken model."""

    def asked_for(self, decoy: int) -> "Choice":
        """The same prompt, asked for `decoy`: it takes the place of `gold`, and `gold` its own where it was an other."""
        others = tuple(self.gold if token == decoy else token for token in self.others)
        return Choice(prompt=self.prompt, gold=decoy, others=others, decoys=(), cluster=self.cluster)


def choice_margin(rows: Sequence[Choice], device: torch.device | str = "cpu") -> ChoiceMargin:
    """The objective of these rows."""
    return ChoiceMargin(
        torch.tensor([row.gold for row in rows], device=device),
        torch.tensor([row.others for row in rows], device=device),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Judged:
    """What a model prefers, row by row."""

    margin: Float[Tensor, " rows"]
    """Above 0 where the behaviour shows."""
    token: Int[Tensor, " rows"]
    """The greedy one of all tokens."""


@torch.no_grad()
def judged(
    model: nn.Module,
    rows: Sequence[Choice],
    site: Site,
    *,
    defence: Sequence[Intervention] = (),
    track: Track = silent,
) -> Judged:
    """What the model prefers, with or without a defence: as an attack at `site` with δ = 0 sees it."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    margin, token = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.long)
    parts = [order[i : i + AT_ONCE] for i in range(0, len(order), AT_ONCE)]
    for part in by_rows(track, parts, "judging choices"):
        some = [rows[i] for i in part]
        suffix = suffix_of(model, [row.prompt for row in some], site, defence=defence)
        logits = suffix(suffix.entering)
        margin[part] = choice_margin(some, logits.device)(logits).margin.cpu()
        token[part] = logits[:, 0].argmax(-1).cpu()
    return Judged(margin=margin, token=token)
