"""Where a perturbation enters, and which defences can meet it there.

- **after** (published): at the defence's own site, behind its edits. No edit at that site sees it, this pass or the next.
  What it may not do is a `Constraint` on the attacker: hold the clamped latents and directions (`Exact`), stay under a
  monitor that reads what leaves the site (`Unflagged`). Clamps that only edit differ here by their starting point alone.
- **upstream**: at the output of an earlier block. Every edit meets it, in every pass and at every later position, since a
  `Suffix` keeps edits above its site live. The attacker is `Free`; it knows the defence, for gradients pass through it.
- **again**: at the defence's own site, and the defence is applied a second time at the next block's output (`Again`),
  where it meets what the block carried over. Attention and MLP of that one block have read the perturbation by then.

| defence | after | upstream, again |
|---|---|---|
| `SpanClamp`, grown or not | as a constraint | live |
| `ErrorMonitor` | as a constraint, calibrated on defended activations | live, as a gate; its threshold as `Observed` |
| `ErrorShrink`, `BenignNull` | not at all | live |
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.contracts import Intervention
from molehunt.errors import UsageError
from molehunt.model.taps import read_sites
from molehunt.site import Site
from molehunt.stress.attacks.suffix import Suffix


@dataclass(frozen=True, eq=False)
class Again:
    """An edit made for one site, at another: the next block's output mostly holds what was in the stream before."""

    edit: Intervention
    site: Site

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.edit(acts)


def logits_and_acts(
    suffix: Suffix, site: Site, entering: Float[Tensor, "batch pos d_model"]
) -> tuple[Float[Tensor, "batch pos vocab"], Float[Tensor, "batch pos d_model"]]:
    """Logits of a pass, and its activations at a site before the edits there, in fp32. Gradients reach both.

    At the suffix's own site those are `entering`.

    Raises UsageError for a site below: nothing runs there.
    """
    if site.layer < suffix.site.layer:
        raise UsageError(
            f"{site} lies below {suffix.site}, where the perturbation enters: it never gets there.\n"
            "Attack from an earlier block."
        )
    with read_sites(suffix.model, [site]) as tap:  # outside of the suffix's own hooks: it sees what they are given
        logits = suffix(entering)
    return logits, tap[site].float()


@torch.no_grad()
def displacement(
    suffix: Suffix, site: Site, delta: Float[Tensor, "batch positions d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """What a perturbation changes at a site before the edits there, from the anchor on; 0 at padding."""
    perturbed = suffix.entering.clone()
    perturbed[:, : delta.shape[1]] += delta
    moved = logits_and_acts(suffix, site, perturbed)[1] - logits_and_acts(suffix, site, suffix.entering)[1]
    return moved * suffix.answered[..., None]
