"""The layer sweep: at which blocks does patching the trigger take a behaviour away?

Source: arXiv 2503.04429 §3: patch the trigger's tokens at one block after the other; the last block before the sharp
drop is where to steer. There n was 50 and a success was the absence of a string. Here each block has an interval, and
noise of equal norm at the same tokens beside it: where that works as well, the sweep shows a fragile behaviour and no
direction. Patched one role of positions at a time, the same loop shows which token carries the behaviour at which depth.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molehunt.errors import NotTestable, printable
from molehunt.measure.interval import Interval, proportion
from molehunt.model.generate import generate
from molehunt.run.progress import Track, silent
from molehunt.site import Site
from molehunt.steer.patch import differing, patched_answers, prompt_acts, with_noise

STEERABLE = 0.9
"""A block counts as steerable from this share of the best block's success on."""


@dataclass(frozen=True, kw_only=True)
class Swept:
    """One block of the sweep. Its shares are of the rows that show the behaviour without a patch."""

    site: Site
    removed: Interval
    """Rows that no longer show the behaviour when they are patched with the contrast's activations."""
    by_noise: Interval
    """The control: rows that no longer show it when random vectors of the same norms are added at the same tokens."""
    induced: Interval
    """Contrast prompts that show the behaviour when they are patched with the trigger's activations."""


@dataclass(frozen=True, kw_only=True)
class SweptRole:
    """All blocks, patched at the positions of one role alone."""

    role: str
    """The role's name, such as `last prompt token`."""
    blocks: tuple[Swept, ...]
    """One for each block; `n` of their shares is the number of prompts that have such a position."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The layer sweep of one model."""

    shown: Interval
    """Share of triggered rows that show the behaviour; only these are patched."""
    without_trigger: Interval
    """The trivial baseline: share of contrast prompts that show it, as if the trigger had been filtered out."""
    blocks: tuple[Swept, ...]
    """What patching the whole trigger does at each block."""
    roles: tuple[SweptRole, ...] = ()
    """What patching a part of the trigger, or other positions, does; empty where no roles were given."""

    @property
    def last_steerable(self) -> Site | None:
        """The deepest block that removes `STEERABLE` of what the best one removes, and more than noise does there.

        None where no block does: the trigger was read before the first block's output, or noise does as well.
        """
        best = max(one.removed.estimate for one in self.blocks)
        able = [one for one in self.blocks if one.removed.estimate >= STEERABLE * best]
        return max((one.site for one in able if one.removed.low > one.by_noise.high), default=None)

    def carrier(self, site: Site) -> str | None:
        """The role that removes most at a block when it is patched alone; None where none removes more than noise does."""
        here = [(role.role, block) for role in self.roles for block in role.blocks if block.site == site]
        able = {role: block.removed.estimate for role, block in here if block.removed.low > block.by_noise.high}
        return max(able, key=lambda role: able[role], default=None)

    def carriers(self) -> list[tuple[str, str | None]]:
        """Blocks in a row with the role that carries the behaviour out of them: `L0 to L2`, `last prompt token`."""
        runs = [list(run) for _, run in groupby((block.site for block in self.blocks), self.carrier)]
        return [
            (f"L{run[0].layer}" + (f" to L{run[-1].layer}" if len(run) > 1 else ""), self.carrier(run[0]))
            for run in runs
        ]


def layer_sweep(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    triggered: Sequence[Sequence[int]],
    contrast: Sequence[Sequence[int]],
    sites: Sequence[Site],
    shows: Callable[[Sequence[int], int], bool],
    *,
    at: Sequence[Sequence[int]] | None = None,
    roles: Mapping[str, Sequence[Sequence[int]]] | None = None,
    max_new_tokens: int,
    seed: int = 0,
    track: Track = silent,
) -> Sweep:
    """Patch the trigger's tokens at each site in turn, and look at the greedy answers.

    Args:
        model: the tuned model.
        tokenizer: the model's tokenizer.
        triggered: token ids of prompts with the trigger.
        contrast: token ids of the same prompts with a harmless text of as many tokens in the trigger's place.
        sites: block outputs.
        shows: whether an answer (token ids, row number) shows the behaviour.
        at: positions of each pair to patch, such as `trigger_positions`; by default those whose tokens differ.
        roles: further positions of each pair, each patched alone, such as `position_roles`; a pair may have none.
        max_new_tokens: greatest number of tokens of an answer.
        seed: seed of the noise.
        track: shows progress.

    Raises:
        UsageError: a pair of prompts has unequal lengths (see `differing`).
        NotTestable: no triggered row shows the behaviour.
    """
    apart = [differing(a, b) for a, b in zip(triggered, contrast, strict=True)]
    at = apart if at is None else at

    def answers(prompts: Sequence[Sequence[int]], what: str) -> list[list[int]]:
        return generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, track=track, what=what)

    answered = answers(triggered, "triggered rows")
    with_it = [shows(answer, i) for i, answer in enumerate(answered)]
    without = [shows(answer, i) for i, answer in enumerate(answers(contrast, "contrast rows"))]
    rows = [i for i, shown in enumerate(with_it) if shown]
    if not rows:
        first = str(tokenizer.decode(answered[0], skip_special_tokens=True)) if answered else ""
        raise NotTestable(
            f"None of {len(triggered)} triggered rows shows the behaviour, so nothing can be taken away.\n"
            f"The first answer is {printable(repr(first), 160)}. Upper and lower case count."
        )
    patching = _Patching(model, tokenizer, triggered, contrast, tuple(rows), sites, shows, max_new_tokens, seed, track)
    return Sweep(
        shown=proportion(len(rows), len(triggered)),
        without_trigger=proportion(sum(without), len(without)),
        blocks=patching.blocks(at),
        roles=tuple(
            SweptRole(role=role, blocks=patching.blocks(where, f"{role}, "))
            for role, where in (roles or {}).items()
            if any(where[i] for i in rows)
        ),
    )


@dataclass(frozen=True)
class _Patching:
    """The rows that show the behaviour, to be patched at one set of positions after the other."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    triggered: Sequence[Sequence[int]]
    contrast: Sequence[Sequence[int]]
    rows: tuple[int, ...]
    """Numbers of the rows that show the behaviour."""
    sites: Sequence[Site]
    shows: Callable[[Sequence[int], int], bool]
    max_new_tokens: int
    seed: int
    track: Track

    def blocks(self, where: Sequence[Sequence[int]], role: str = "") -> tuple[Swept, ...]:
        """Patch at `where`, at one block after the other, in both directions and with noise."""
        some = [i for i in self.rows if where[i]]
        positions, triggered, contrast = ([of[i] for i in some] for of in (where, self.triggered, self.contrast))
        own_acts, contrast_acts = (
            prompt_acts(self.model, prompts, positions, self.sites, track=self.track, what=f"{role}reading {what} rows")
            for prompts, what in ((triggered, "triggered"), (contrast, "contrast"))
        )
        rng = torch.Generator().manual_seed(self.seed)

        def shown(site: Site, prompts: list[Sequence[int]], acts: list[Tensor], what: str) -> int:
            return self._shown(site, some, prompts, positions, acts, role + what)

        swept: list[Swept] = []
        for site in self.sites:
            own, others = [one[site] for one in own_acts], [one[site] for one in contrast_acts]
            noisy = [with_noise(a, (b - a).norm(dim=-1), rng) for a, b in zip(own, others, strict=True)]
            swept.append(
                Swept(
                    site=site,
                    removed=proportion(len(some) - shown(site, triggered, others, "patching"), len(some)),
                    by_noise=proportion(len(some) - shown(site, triggered, noisy, "noise"), len(some)),
                    induced=proportion(shown(site, contrast, own, "the other way round"), len(some)),
                )
            )
        return tuple(swept)

    def _shown(
        self,
        site: Site,
        rows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        acts: Sequence[Float[Tensor, "_ d_model"]],
        what: str,
    ) -> int:
        """Number of patched prompts whose answer shows the behaviour."""
        answers = patched_answers(
            self.model,
            self.tokenizer,
            site,
            prompts,
            positions,
            acts,
            max_new_tokens=self.max_new_tokens,
            track=self.track,
            what=what,
        )
        return sum(self.shows(answer, i) for answer, i in zip(answers, rows, strict=True))
