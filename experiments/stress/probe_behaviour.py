"""Targeted probe perturbation: linear probes of what a text is about, read from its mean activation, and a clamp under them.

Source: SAEBench's TPP, and its attack in arXiv 2606.18322. The readout is linear at the clamp's own site, so that the
shortest push is known without a search (`least_norm`), and one direction does for every row: only a span that holds the
whole probe withstands it. One push at every token moves the mean by as much, so that lengths are per token; the Frobenius
norm over a text of T tokens is √T times that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from experiments.stress.readout_behaviour import ReadoutCase
from molehunt.detect.logistic_probe import LogisticProbe
from molehunt.dictionary.dictionary import Dictionary
from molehunt.errors import NotTestable
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks.attack import PooledActivations
from molehunt.stress.attacks.constraint import Exact, Free, Paper
from molehunt.stress.attacks.objective import LinearReadout, ObjectiveValue
from molehunt.stress.defences.selection import LabelledText
from molehunt.stress.defences.watched import WatchedLatents
from molehunt.traffic.split import Fit, Test, expect


def pooled(texts: Sequence[Float[Tensor, "_ d_model"]]) -> Float[Tensor, "texts d_model"]:
    """Each text's mean activation."""
    return torch.stack([acts.mean(0) for acts in texts])


def one_vs_rest(texts: Fit[LabelledText], site: Site) -> dict[str, LinearReadout]:
    """For each class a probe of mean activations: above 0 for texts of the class. Classes in alphabetical order.

    Raises ValueError for fewer than two classes.
    """
    rows = expect(Fit, texts).rows
    means, labels = pooled([text.acts for text in rows]), [text.label for text in rows]
    found: dict[str, LinearReadout] = {}
    for label in sorted(set(labels)):
        probe = LogisticProbe.fit(site, means, torch.tensor([own == label for own in labels], dtype=torch.bool))
        found[label] = LinearReadout(probe.weight, probe.bias)
    return found


@torch.no_grad()
def ablated(
    texts: Sequence[Float[Tensor, "_ d_model"]], dictionary: Dictionary, latents: Int[Tensor, " latents"], site: Site
) -> list[Float[Tensor, "_ d_model"]]:
    """Activations with these latents set to 0 and what the dictionary does not explain kept."""
    clamp = Clamp(site, dictionary, latents, "set", 0.0)
    return [clamp(acts[None])[0] for acts in texts]


def accuracy(readout: LinearReadout, means: Float[Tensor, "texts d_model"], positive: Bool[Tensor, " texts"]) -> float:
    """Balanced: the mean over both kinds of text of the share that is right."""
    says = means @ readout.weight + readout.bias > 0
    return float((says[positive].float().mean() + (~says[~positive]).float().mean()) / 2)


@dataclass(frozen=True, eq=False)
class Readouts:
    """A linear readout of its own for each row."""

    weight: Float[Tensor, "batch d_model"]
    bias: Float[Tensor, " batch"]

    @classmethod
    def of(cls, readouts: Sequence[LinearReadout]) -> "Readouts":
        return cls(torch.stack([one.weight for one in readouts]), torch.tensor([one.bias for one in readouts]))

    def __call__(self, out: Float[Tensor, "batch pos d_model"]) -> ObjectiveValue:
        margin = (out[:, 0] * self.weight).sum(-1) + self.bias
        return ObjectiveValue(loss=-margin, margin=margin)

    def rows(self, kept: Int[Tensor, " kept"]) -> "Readouts":
        return Readouts(self.weight[kept], self.bias[kept])


@dataclass(frozen=True, eq=False, kw_only=True)
class Targeted:
    """A clamp on the latents of one class, seen by the probes of all."""

    drop: dict[str, float]
    """Drop of each probe's balanced accuracy, by class."""
    target: str

    @property
    def score(self) -> float:
        """SAEBench's TPP: the drop on the target's own probe less the mean drop on the others'."""
        others = [drop for label, drop in self.drop.items() if label != self.target]
        return self.drop[self.target] - sum(others) / len(others)


@dataclass(frozen=True, eq=False, kw_only=True)
class ProbedTexts:
    """Texts that judge a clamp: activations as they are, and with the latents of one class ablated."""

    texts: tuple[LabelledText, ...]
    target: str
    before: Float[Tensor, "texts d_model"]
    """Mean activations."""
    after: Float[Tensor, "texts d_model"]
    dictionary: Dictionary
    latents: Int[Tensor, " latents"]

    @classmethod
    def of(
        cls,
        texts: Test[LabelledText],
        target: str,
        dictionary: Dictionary,
        latents: Int[Tensor, " latents"],
        site: Site,
    ) -> "ProbedTexts":
        rows = expect(Test, texts).rows
        acts = [text.acts for text in rows]
        return cls(
            texts=rows,
            target=target,
            before=pooled(acts),
            after=pooled(ablated(acts, dictionary, latents, site)),
            dictionary=dictionary,
            latents=latents,
        )

    @property
    def of_class(self) -> Bool[Tensor, " texts"]:
        return torch.tensor([text.label == self.target for text in self.texts], dtype=torch.bool)

    def targeted(self, probes: dict[str, LinearReadout]) -> Targeted:
        """What the ablation costs every probe."""
        drop: dict[str, float] = {}
        for label, probe in probes.items():
            positive = torch.tensor([text.label == label for text in self.texts], dtype=torch.bool)
            drop[label] = accuracy(probe, self.before, positive) - accuracy(probe, self.after, positive)
        return Targeted(drop=drop, target=self.target)

    def flipped(self, probe: LinearReadout) -> list[int]:
        """Texts of the class that the probe knows before the ablation, and not under it."""
        before, after = (means @ probe.weight + probe.bias for means in (self.before, self.after))
        return (self.of_class & (before > 0) & (after <= 0)).nonzero()[:, 0].tolist()

    def case(self, probes: dict[str, LinearReadout], rows: Sequence[int], *, seed: int = 0) -> ReadoutCase:
        """These rows as a case of `stress_readout`.

        The random target is another class whose probe is below 0, too; without the ablation, the target's own probe is to
        be flipped on texts of other classes.

        Raises:
            NotTestable: every probe takes a row for its own, or the target's takes every text.
        """
        rng = torch.Generator().manual_seed(seed)
        own, others = probes[self.target], [probe for label, probe in probes.items() if label != self.target]
        silent = (~self.of_class & (self.before @ own.weight + own.bias <= 0)).nonzero()[:, 0]
        if not len(silent):
            raise NotTestable(f"the probe of {self.target!r} takes every text for its own.")
        matched = silent[torch.randint(len(silent), (len(rows),), generator=rng)]
        return ReadoutCase(
            defended=PooledActivations(self.after[list(rows)][:, None]),
            wanted=own,
            random=Readouts.of([_drawn(others, self.after[row], rng) for row in rows]),
            undefended=PooledActivations(self.before[matched][:, None]),
            flipped=own,
            watched=WatchedLatents(self.dictionary, self.latents),
            constraints=(
                Free(),
                Paper(self.dictionary, self.latents),
                Exact(self.dictionary, self.latents),
            ),
            clusters=tuple(rows),
            unit=float(self.before.norm(dim=1).median()),
        )


def _drawn(probes: Sequence[LinearReadout], mean: Float[Tensor, " d_model"], rng: torch.Generator) -> LinearReadout:
    silent = [probe for probe in probes if float(mean @ probe.weight) + probe.bias <= 0]
    if not silent:
        raise NotTestable("every other probe takes this text for its own, so that none is left for a random target.")
    return silent[int(torch.randint(len(silent), (), generator=rng))]
