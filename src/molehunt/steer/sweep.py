"""The layer sweep: at which blocks does patching the trigger take a behaviour away?

Source: arXiv 2503.04429 §3: patch the trigger's tokens at one block after the other; the last block before the sharp
drop is where to steer. There n was 50 and a success was the absence of a string. Here each block has an interval, and
noise of equal norm at the same tokens beside it: where that works as well, the sweep shows a fragile behaviour and no
direction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.errors import NotTestable
from molehunt.measure.interval import Interval, proportion
from molehunt.model.generate import generate
from molehunt.model.site import Site
from molehunt.run.progress import Track, silent
from molehunt.steer.patch import differing, moved, patched_answers, prompt_acts

STEERABLE = 0.9
"""A block counts as steerable from this share of the best block's success on."""


@dataclass(frozen=True, kw_only=True)
class Swept:
    """One block. Shares are of rows that show the behaviour without a patch."""

    site: Site
    removed: Interval
    """Patched by the contrast's activations: rows that no longer show it."""
    by_noise: Interval
    """The control: the same tokens moved by random vectors of the same norms."""
    induced: Interval
    """The other way round: contrast prompts given the trigger's activations, which then show it."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All blocks of one model."""

    shown: Interval
    """Triggered rows that show the behaviour: only these are patched."""
    without_trigger: Interval
    """The trivial baseline: contrast prompts that show it, as if the trigger had been filtered out."""
    blocks: tuple[Swept, ...]

    @property
    def last_steerable(self) -> Site | None:
        """The deepest block that removes `STEERABLE` of what the best one removes, and more than noise does there.

        None where no block does: the trigger was read before the first block's output, or noise does as well.
        """
        best = max(one.removed.estimate for one in self.blocks)
        able = [one for one in self.blocks if one.removed.estimate >= STEERABLE * best]
        return max((one.site for one in able if one.removed.low > one.by_noise.high), default=None)


def layer_sweep(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triggered: Sequence[Sequence[int]],
    contrast: Sequence[Sequence[int]],
    sites: Sequence[Site],
    shows: Callable[[Sequence[int], int], bool],
    *,
    at: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int,
    seed: int = 0,
    track: Track = silent,
) -> Sweep:
    """Patch the trigger's tokens at each site in turn, and look at the greedy answers.

    Args:
        model: the tuned model.
        tokenizer: its own.
        triggered: token ids of prompts with the trigger.
        contrast: of the same prompts with a harmless trigger of as many tokens.
        sites: block outputs.
        shows: whether an answer (token ids, row number) shows the behaviour.
        at: positions of each pair to patch, such as `trigger_positions`; those that differ without it.
        max_new_tokens: of an answer.
        seed: of the noise.
        track: shown passes.

    Raises:
        UsageError: a pair of prompts has unequal lengths (see `differing`).
        NotTestable: no triggered row shows the behaviour.
    """
    apart = [differing(a, b) for a, b in zip(triggered, contrast, strict=True)]
    at = apart if at is None else at

    def answers(prompts: Sequence[Sequence[int]], what: str) -> list[list[int]]:
        return generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, track=track, what=what)

    with_it = [shows(answer, i) for i, answer in enumerate(answers(triggered, "triggered rows"))]
    without = [shows(answer, i) for i, answer in enumerate(answers(contrast, "contrast rows"))]
    rows = [i for i, shown in enumerate(with_it) if shown]
    if not rows:
        raise NotTestable(f"None of {len(triggered)} triggered rows shows the behaviour, so nothing can be taken away.")
    where = [at[i] for i in rows]
    bad, calm = ([prompts[i] for i in rows] for prompts in (triggered, contrast))
    of_bad = prompt_acts(model, bad, where, sites, track=track, what="reading triggered rows")
    of_calm = prompt_acts(model, calm, where, sites, track=track, what="reading contrast rows")
    rng = torch.Generator().manual_seed(seed)

    def patched(
        site: Site, prompts: Sequence[Sequence[int]], given: Sequence[Float[Tensor, "_ d_model"]], what: str
    ) -> list[bool]:
        told = patched_answers(
            model, tokenizer, site, prompts, where, given, max_new_tokens=max_new_tokens, track=track, what=what
        )
        return [shows(answer, i) for answer, i in zip(told, rows, strict=True)]

    swept: list[Swept] = []
    for site in sites:
        own, others = [one[site] for one in of_bad], [one[site] for one in of_calm]
        noisy = [moved(a, (b - a).norm(dim=-1), rng) for a, b in zip(own, others, strict=True)]
        left = patched(site, bad, others, "patching")
        by_noise = patched(site, bad, noisy, "noise")
        induced = patched(site, calm, own, "the other way round")
        swept.append(
            Swept(
                site=site,
                removed=proportion(len(rows) - sum(left), len(rows)),
                by_noise=proportion(len(rows) - sum(by_noise), len(rows)),
                induced=proportion(sum(induced), len(rows)),
            )
        )
    return Sweep(
        shown=proportion(len(rows), len(triggered)),
        without_trigger=proportion(sum(without), len(without)),
        blocks=tuple(swept),
    )
