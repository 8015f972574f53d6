"""Three published rules for selecting the latents to clamp. Each selects on rows that are not used for judging."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from molehunt.dictionary.dictionary import Dictionary
from molehunt.errors import NotTestable, UsageError
from molehunt.site import Site
from molehunt.steer.clamp import check_latents, written
from molehunt.stress.attacks.choice import AT_ONCE, Choice, choice_margin
from molehunt.stress.attacks.suffix import suffix_of
from molehunt.traffic.split import Select, expect

RETAINED = 0.01
"""Latents that fire on a larger share of the retained tokens are not clamped. SAEBench tries .001 and .01."""


@dataclass(frozen=True, eq=False)
class SelectedLatents:
    """Latents of one dictionary, best first."""

    latents: Int[Tensor, " latents"]
    score: Float[Tensor, " latents"]

    def first(self, n: int) -> "SelectedLatents":
        """The best n of them, or all where there are fewer."""
        return SelectedLatents(self.latents[:n], self.score[:n])


def by_attribution(
    model: nn.Module, site: Site, dictionary: Dictionary, rows: Select[Choice], n: int, *, everywhere: bool = False
) -> SelectedLatents:
    """The n latents with the largest attribution: the mean of z · ∂(logit gold − mean of the others')/∂z.

    Codes and gradients are those without any defence. Only latents with a positive attribution are selected, so there may
    be fewer.

    Args:
        everywhere: whether to sum over all tokens of each prompt except the first, which carries no content. Otherwise
            only the last token counts.

    Raises:
        NotTestable: no latent has a positive attribution.
        UsageError: see `check_latents`.
        WrongSplit: rows of another split.

    Source: arXiv 2606.18322, its IOI runner; attribution as in Marks et al., arXiv 2403.19647.
    """
    choices = expect(Select, rows).rows
    everything = torch.arange(dictionary.d_dict, device=dictionary.W_enc.device)
    check_latents(dictionary, everything)
    total = torch.zeros(dictionary.d_dict, dtype=torch.double)
    for start in range(0, len(choices), AT_ONCE):
        some = choices[start : start + AT_ONCE]
        cut = 1 if everywhere else None
        suffix = suffix_of(
            model, [row.prompt[:cut] for row in some], site, answers=[row.prompt[cut:] if cut else () for row in some]
        )
        code = dictionary.encode(suffix.entering)
        if everywhere:
            code[:, 0] = 0.0
        ends = suffix.answered.sum(1) - 1
        with torch.enable_grad():
            more = torch.zeros_like(code, requires_grad=True)
            perturbed = suffix.entering + written(dictionary, everything, more, suffix.entering)
            logits = suffix(perturbed)[torch.arange(len(some)), ends]
            loss = choice_margin(some, perturbed.device)(logits[:, None]).loss.sum()
            (slope,) = torch.autograd.grad(loss, more)
        total += -(code * slope).sum((0, 1)).double().cpu()
    return _best(total.float() / max(1, len(choices)), n, "no latent has a positive attribution on these rows.")


@torch.no_grad()
def by_sparsity(
    dictionary: Dictionary,
    forget: Select[Float[Tensor, "_ d_in"]],
    retain: Select[Float[Tensor, "_ d_in"]],
    n: int,
    *,
    retained: float = RETAINED,
) -> SelectedLatents:
    """The n latents that fire most often on the topic to forget, among those that hardly fire on the texts to retain.

    Args:
        dictionary: the dictionary of the site.
        forget: activations of texts about the topic, text by text.
        retain: activations of other texts.
        n: greatest number of latents.
        retained: share of the tokens of `retain` on which a selected latent may fire.

    Returns:
        Latents that fire at all on `forget`. The score is the share of its tokens on which a latent fires.

    Raises:
        NotTestable: every latent that fires on the topic fires elsewhere, too.
        WrongSplit: rows of another split.

    Source: Farrell et al., arXiv 2410.19278, as SAEBench runs it.
    """
    on_topic, elsewhere = (_firing(dictionary, expect(Select, rows).rows) for rows in (forget, retain))
    score = torch.where(elsewhere <= retained, on_topic, torch.zeros_like(on_topic))
    return _best(
        score, n, f"every latent that fires on the topic fires on more than {retained:.2g} of the other tokens, too."
    )


class LabelledText(NamedTuple):
    """Activations of one text, with its class."""

    acts: Float[Tensor, "_ d_in"]
    """Activations of each of the text's tokens, at the site."""
    label: str


@torch.no_grad()
def by_probe_effect(
    dictionary: Dictionary, weight: Float[Tensor, " d_in"], texts: Select[LabelledText], label: str, n: int
) -> SelectedLatents:
    """The n latents with the largest effect on a linear probe of one class, relu(mean on − mean off) · (W_dec · weight).

    Means are taken over each text's mean code. Raises as `by_sparsity` does, and UsageError where the class or the other
    texts are missing.

    Source: SAEBench, TPP (targeted probe perturbation).
    """
    labelled = expect(Select, texts).rows
    codes = torch.stack([dictionary.encode(text.acts).mean(0) for text in labelled]) if labelled else torch.zeros(0, 0)
    of_class = torch.tensor([text.label == label for text in labelled], dtype=torch.bool)
    if not of_class.any() or of_class.all():
        raise UsageError(f"an effect on {label!r} needs texts of this class and of others.")
    higher = (codes[of_class].mean(0) - codes[~of_class].mean(0)).relu()
    return _best(
        higher * (dictionary.W_dec @ weight),
        n,
        f"no latent that fires more on {label!r} has a positive effect on its probe.",
    )


def _firing(dictionary: Dictionary, texts: Sequence[Tensor]) -> Float[Tensor, " d_dict"]:
    """Share of all tokens on which each latent fires."""
    if not texts:
        raise UsageError("latents cannot be selected without texts; give at least one.")
    fires = torch.stack([(dictionary.encode(acts) > 0).sum(0) for acts in texts]).sum(0)
    return fires / sum(map(len, texts))


def _best(score: Tensor, n: int, otherwise: str) -> SelectedLatents:
    if n < 1:
        raise UsageError(f"select one latent or more, got {n}.")
    values, latents = score.topk(min(n, len(score)))
    kept = values > 0
    if not kept.any():
        raise NotTestable(f"Nothing to clamp: {otherwise}\nTry another dictionary, or another site.")
    return SelectedLatents(latents[kept], values[kept])
