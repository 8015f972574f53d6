"""A stress test of one fix against a behaviour that shows in one token, such as the indirect object or a letter.

Source: arXiv 2606.18322, its IOI and WMDP runners, with the controls that it leaves out.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from experiments.stress.readout_behaviour import ReadoutCase
from molehunt.errors import NotTestable
from molehunt.stress.attacks.choice import Choice, ChoiceJudgements, choice_margin, judge_choices
from molehunt.stress.attacks.suffix import suffix_of
from molehunt.stress.defences.defence import Defence


@dataclass(frozen=True, eq=False, kw_only=True)
class ValidChoices:
    """Which rows say something about a defence, under one judge before and after."""

    shown: Bool[Tensor, " rows"]
    """The behaviour, without the defence."""
    left: Bool[Tensor, " rows"]
    """The behaviour, under it: what δ = 0 brings back."""
    broken: Bool[Tensor, " rows"]
    """Under the defence the greedy token is none that answers the prompt: the task is gone, not the behaviour."""

    @property
    def flipped(self) -> Bool[Tensor, " rows"]:
        return self.shown & ~self.left

    @property
    def rows(self) -> list[int]:
        """Shown before, not shown under the defence, and still an answer."""
        return (self.flipped & ~self.broken).nonzero()[:, 0].tolist()


def valid_choices(
    rows: Sequence[Choice], before: ChoiceJudgements, defended: ChoiceJudgements, *, whole: bool = False
) -> ValidChoices:
    """Judge rows without and with a defence.

    Args:
        whole: a row counts as shown only where all rows of its cluster are right: no luck of the place.
    """
    shown = before.margin > 0
    if whole:
        wrong = {row.cluster for row, right in zip(rows, shown.tolist(), strict=True) if not right}
        shown &= torch.tensor([row.cluster not in wrong for row in rows], dtype=torch.bool)
    among = [
        token in (row.gold, *row.others, *row.decoys, *row.also)
        for row, token in zip(rows, defended.token.tolist(), strict=True)
    ]
    return ValidChoices(shown=shown, left=defended.margin > 0, broken=~torch.tensor(among, dtype=torch.bool))


def spread(clusters: Sequence[Hashable], n: int) -> list[int]:
    """At most `n` of some rows, as evenly over their clusters as can be; in order."""
    seen: dict[Hashable, int] = {}
    rank: list[int] = []
    for cluster in clusters:
        rank.append(seen.get(cluster, 0))
        seen[cluster] = rank[-1] + 1
    return sorted(sorted(range(len(clusters)), key=lambda i: (rank[i], i))[:n])


def choice_case(model: nn.Module, rows: Sequence[Choice], defence: Defence) -> ReadoutCase:
    """Rows of the valid set as a case of `stress_readout`.

    The random target of a row is one of its decoys that it does not choose under the defence, against the same others.
    Without the defence, a row is asked for one of its others: what a flip costs where nothing is suppressed.

    Raises:
        NotTestable: there is no row, or one has no decoy left.
    """
    if not rows:
        raise NotTestable("The fix takes the behaviour away from no row, so there is nothing to bring back.")
    prompts = [row.prompt for row in rows]
    said = judge_choices(model, rows, defence.site, defence=defence.edits).token.tolist()
    bare = suffix_of(model, prompts, defence.site)
    device = bare.entering.device
    wrong = [row.with_target(row.others[i % len(row.others)]) for i, row in enumerate(rows)]
    random = [row.with_target(_decoy(row, token, i)) for i, (row, token) in enumerate(zip(rows, said, strict=True))]
    return ReadoutCase(
        defended=suffix_of(model, prompts, defence.site, defence=defence.edits),
        wanted=choice_margin(rows, device),
        random=choice_margin(random, device),
        undefended=bare,
        flipped=choice_margin(wrong, device),
        watched=defence.watched,
        constraints=defence.constraints,
        clusters=tuple(row.cluster for row in rows),
        unit=float(bare.entering[:, 0].norm(dim=-1).median()),
    )


def _decoy(row: Choice, said: int, at: int) -> int:
    left = [token for token in row.decoys if token != said]
    if not left:
        raise NotTestable("a row has no token for a random target that it does not choose under the fix already.")
    return left[at % len(left)]
