"""A clamp with a monitor beside it: is the part that the dictionary cannot explain larger than it should be?

Most of an error's norm is predictable from the activation itself (Engels et al., arXiv 2410.14670: more than 90 % by a
linear probe), so that what is left over is small, and a perturbation that hides in the error stands out of it. Monitors
of that kind have fallen to attackers who know them (Bailey et al., arXiv 2412.09565): these ones know the threshold.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from experiments.hardened.threat import logits_and_acts
from molehunt.contracts import Reading
from molehunt.dictionary.dictionary import Dictionary
from molehunt.errors import NotTestable
from molehunt.measure.threshold import conformal_threshold
from molehunt.site import Site
from molehunt.steer.clamp import check_dictionary
from molehunt.stress.attacks.attack import PENALTY
from molehunt.stress.attacks.constraint import Constraint
from molehunt.stress.attacks.objective import Objective, ObjectiveValue
from molehunt.stress.attacks.suffix import Suffix
from molehunt.traffic.split import Calibrate, Fit, expect
from molehunt.transfer.linear_map import LinearMap
from molehunt.transfer.ridge import ridge
from molehunt.transfer.statistics import PairMoments

HELD = 4
"""Every fourth row of the fit chooses the ridge's penalty and gives the spread."""


@dataclass(frozen=True, eq=False)
class ErrorMonitor:
    """‖acts − reconstruction‖ in standard deviations above what a ridge on the activation predicts.

    A `Detector` (`score`) and a `Gate` (a call), token by token. Live, it opens another edit where it flags: a `Replace`
    by the benign mean blanks the token, an `ErrorShrink` takes the error away. Gates pass no gradient, so that an
    attacker who knows it stays under its threshold: `Unflagged` where it reads what leaves the attacked site,
    `Observed` with `Unobserved` where it reads a later one.
    """

    needs_logits: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False
    site: Site
    dictionary: Dictionary
    """Dictionary of the tuned model's activations at this site; keep it on the model's device."""
    predicted: LinearMap
    """Activation → norm of its error."""
    spread: float
    """Standard deviation of the norm about its prediction, of benign tokens that fitted nothing."""
    threshold: float
    """Flagged above, in standard deviations."""

    @classmethod
    def fit(
        cls,
        site: Site,
        dictionary: Dictionary,
        fit: Fit[Float[Tensor, "_ d_model"]],
        calibrate: Calibrate[Float[Tensor, "_ d_model"]],
        *,
        fpr: float,
    ) -> "ErrorMonitor":
        """Fit on benign activations, and set the threshold on others.

        Args:
            site: where it reads.
            dictionary: of one model's activations there.
            fit: tokens of each benign text, at least two texts and twice as many tokens as dimensions; as the monitor
                will meet them: attention sinks where it will read those, after a clamp where it will stand behind one.
            calibrate: tokens of other benign texts.
            fpr: share of benign tokens that may be flagged. It holds for tokens of texts like these on average; tokens of
                one text are not independent, so that single texts have more or less.

        Raises:
            NotTestable: too few texts or tokens, or too few to calibrate at this rate; or errors that never vary.
            WrongSplit: see `expect`.
            UsageError: the dictionary is not of this site or of both models.
        """
        check_dictionary(dictionary, site)
        rows, held_out = expect(Fit, fit).rows, torch.cat(expect(Calibrate, calibrate).rows)
        if len(rows) < 2:
            raise NotTestable(f"a monitor is fitted on two benign texts or more, got {len(rows)}.")
        held, used = torch.cat(rows[::HELD]), torch.cat([row for i, row in enumerate(rows) if i % HELD])

        def moments(acts: Tensor) -> PairMoments:
            return PairMoments.of(site, site, acts.float(), _error(dictionary, acts)[:, None])

        predicted = ridge(moments(used), moments(held))
        off = _error(dictionary, held) - predicted(held)[:, 0]
        spread = float(off.square().mean().sqrt())
        if not spread > 0:
            raise NotTestable(f"the errors of this dictionary at {site} never vary: nothing could stand out.")
        known = cls(site, dictionary, predicted, spread, torch.inf)
        threshold = conformal_threshold(known.z(held_out[None])[0], fpr)
        return cls(site, dictionary, predicted, spread, threshold)

    @property
    def name(self) -> str:
        return f"error norm {self.site}"

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def z(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos"]:
        """Standard deviations above the prediction. Differentiable."""
        flat = acts.reshape(-1, acts.shape[-1])
        above = _error(self.dictionary, flat) - self.predicted(flat)[:, 0]
        return (above / self.spread).reshape(acts.shape[:-1])

    def score(self, reading: Reading) -> Float[Tensor, "batch pos"]:
        return self.z(reading.tuned[self.site])

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
        """True where a token is flagged."""
        return self.z(acts) > self.threshold


def _error(dictionary: Dictionary, acts: Float[Tensor, "tokens d_model"]) -> Float[Tensor, " tokens"]:
    return (acts.float() - dictionary.to(acts.device).reconstruct(acts)).norm(dim=-1)


@dataclass(frozen=True, eq=False)
class Unflagged:
    """Another constraint, and no token that the perturbation touches above the threshold of a monitor which reads behind
    it, at the attacked site. Threat model *after*.

    The monitor should be calibrated on activations as they leave the defence. Rows that it flags without a perturbation
    are false positives: leave them out of the valid set.
    """

    name: ClassVar[str] = "unflagged"
    monitor: ErrorMonitor
    inner: Constraint

    def gradient(self, gradient: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.inner.gradient(gradient)

    def __call__(
        self, delta: Float[Tensor, "batch pos d_model"], defended: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        return self.inner(delta, defended)

    def violation(
        self, acts: Float[Tensor, "batch pos d_model"], defended: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, " batch"]:
        """Standard deviations above the threshold, of the token that is furthest; beside what the other is violation by."""
        over = (self.monitor.z(acts) - self.monitor.threshold).relu()
        touched = (acts != defended).any(-1)  # the others hold padding, and what is flagged there is not the attacker's
        return self.inner.violation(acts, defended) + over.masked_fill(~touched, 0.0).amax(1)


@dataclass(frozen=True, eq=False)
class Observed:
    """A suffix with a monitor at a later site (or its own): its logits have one more column, how far each token from the
    anchor on is above the threshold. Threat models *upstream* and *again*; give the objective as `Unobserved`.

    The monitor reads before the edits at its own site, as a gate of one of them would.
    """

    suffix: Suffix
    monitor: ErrorMonitor

    @property
    def entering(self) -> Float[Tensor, "batch pos d_model"]:
        return self.suffix.entering

    def __call__(self, entering: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos more"]:
        """Raises UsageError for a monitor below the site."""
        logits, acts = logits_and_acts(self.suffix, self.monitor.site, entering)
        over = (self.monitor.z(acts) - self.monitor.threshold).masked_fill(~self.suffix.answered, 0.0)
        return torch.cat([logits, over[..., None]], -1)

    def rows(self, kept: Int[Tensor, " kept"]) -> "Observed":
        return Observed(self.suffix.rows(kept), self.monitor)


@dataclass(frozen=True, eq=False)
class Unobserved:
    """What an attack wants, and not to be flagged anywhere: the objective to an `Observed` suffix.

    Where a token is above the threshold, the margin is minus by how much. Rows that are flagged without a perturbation
    are false positives: leave them out of the valid set.
    """

    inner: Objective

    def __call__(self, out: Float[Tensor, "batch pos more"]) -> ObjectiveValue:
        reached = self.inner(out[..., :-1])
        over = out[..., -1].relu().amax(1)
        return ObjectiveValue(
            loss=reached.loss + PENALTY * over, margin=torch.where(over > 0, -over, reached.margin.to(over.dtype))
        )

    def rows(self, kept: Int[Tensor, " kept"]) -> "Unobserved":
        return Unobserved(self.inner.rows(kept))
