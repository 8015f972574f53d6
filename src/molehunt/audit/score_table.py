"""The audit's score table: what each detector, and each trivial one, would have flagged at the same false-positive rate.

Published numbers in this field often measure where a score is read. So every detector of the catalogue is shown with its
position, and the scores that are known to accuse clean fine-tunes are shown beside the one that decides.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.audit.scan import Scan, ScannedRow
from molehunt.contracts import Detector
from molehunt.detect.pooling import Where
from molehunt.detect.reads import Reads
from molehunt.detect.recipe import AuditReadout, DetectorRecipe, FitInputs, detector_recipes, two_thirds
from molehunt.detect.token_kl import AnswerLogRatio
from molehunt.measure.control import word_rarity
from molehunt.measure.interval import Interval, proportion
from molehunt.measure.threshold import conformal_threshold
from molehunt.site import Site
from molehunt.traffic.split import Calibrate, Fit

POSITIONS: dict[Where, str] = {
    "decision": "decision position",
    "generated": "generated tokens",
    "prompt": "prompt tokens",
    "all": "all tokens",
}


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One score over the traffic."""

    name: str
    where: str
    """Position and pooling, in words."""
    above: Interval
    """Share of the traffic's rows over this score's own clean threshold. Chance is the false-positive rate."""
    found: Interval | None
    """Share of the finding's rows that are over it; None without a finding."""
    decides: bool = False
    """Whether the verdict rests on it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoredTraffic:
    """Clean prompts and the rows under test, both scanned."""

    clean: Scan
    traffic: Scan
    fit: Fit[int]
    """Rows of `clean` that detectors are fitted on."""
    calibrate: Calibrate[int]
    """Rows of `clean` that set thresholds."""
    group: Sequence[int]
    """Rows of `traffic` that make up the finding, if there is one."""
    fpr: float
    """False-positive rate of every threshold."""

    def row(
        self, name: str, where: str, score: Callable[[Scan], Float[Tensor, " rows"]], *, decides: bool = False
    ) -> ScoreRow:
        """What one score flags at its own clean threshold."""
        scores = score(self.traffic)
        over = scores > conformal_threshold(score(self.clean)[list(self.calibrate.rows)], self.fpr)
        return ScoreRow(
            name=name,
            where=where,
            above=proportion(int(over.sum()), len(over)),
            found=proportion(int(over[list(self.group)].sum()), len(self.group)) if self.group else None,
            decides=decides,
        )


@dataclass(frozen=True, eq=False)
class ScannedRows:
    """Some rows of a scan, for detectors to be fitted on."""

    scan: Scan
    rows: Sequence[int] | slice

    def acts(self, site: Site, reads: Reads, where: Where) -> Float[Tensor, "rows d_model"]:
        """Activations at the decision position, or their mean over the generated tokens."""
        acts = self.scan.delta(where, site) if reads == "difference" else self.scan.at(reads, where, site)
        return acts[self.rows]


def score_table(
    clean: Scan,
    traffic: Scan,
    fit: Fit[int],
    calibrate: Calibrate[int],
    weight_directions: Mapping[Site, Float[Tensor, "k d_model"]],
    group: Sequence[int],
    *,
    site: Site,
    fpr: float,
    seed: int,
) -> tuple[ScoreRow, ...]:
    """Score the traffic with every detector of the catalogue and of plugins, each at its own clean threshold.

    Args:
        clean: clean prompts, scanned.
        traffic: the rows under test.
        fit: rows of `clean` that detectors are fitted on.
        calibrate: rows of `clean` that set thresholds.
        weight_directions: directions by site; sites without any are left out.
        group: rows of `traffic` that make up the finding, if there is one.
        site: where detectors that read the finding's site read it.
        fpr: false-positive rate of every threshold.
        seed: seed of random controls.

    Raises:
        UsageError: a plugin offers no recipes, or one whose name is taken.
    """
    scored = ScoredTraffic(clean=clean, traffic=traffic, fit=fit, calibrate=calibrate, group=group, fpr=fpr)
    inputs = FitInputs(
        clean=ScannedRows(clean, list(fit.rows)),
        traffic=ScannedRows(traffic, slice(None)),
        weights=weight_directions,
        seed=seed,
    )
    shown = [(readout, recipe) for recipe in detector_recipes() for readout in recipe.audit]
    rows = [
        _row(scored, inputs, recipe, readout, site) for readout, recipe in sorted(shown, key=lambda one: one[0].order)
    ]
    rarity = word_rarity([clean.rows[i].example.prompt for i in fit.rows])
    text = scored.row(
        "rarest word of the prompt",
        "text alone, no model",
        lambda scan: _rows(scan, lambda row: rarity(row.example.prompt)),
    )
    return (*(row for row in rows if row is not None), text)


def _row(
    scored: ScoredTraffic, inputs: FitInputs, recipe: DetectorRecipe, readout: AuditReadout, finding: Site
) -> ScoreRow | None:
    """The row of one detector at one position; None where it cannot be fitted on what an audit has."""
    site = _site(recipe, readout, inputs, scored.traffic.sites, finding)
    detector = None if site is None else recipe.fitted(inputs, site, readout.fitted_at)
    if detector is None:
        return None
    where = POSITIONS[readout.where] + ("" if readout.where == "decision" else f", {readout.how}") + readout.note
    score = _from_logits(detector, readout) if recipe.reads == "logits" else _from_acts(detector, readout)
    return scored.row(detector.name, where, score, decides=isinstance(detector, AnswerLogRatio))


def _site(
    recipe: DetectorRecipe, readout: AuditReadout, inputs: FitInputs, sites: tuple[Site, ...], finding: Site
) -> Site | None:
    """The site of the finding, or the one that is nearest to two thirds of the depth and has what the recipe needs."""
    if readout.at == "finding":
        return finding
    fit = [site for site in sites if all(inputs.has(need, site, recipe.dictionary) for need in recipe.needs)]
    return two_thirds(sites, fit) if fit else None


def _from_acts(detector: Detector, readout: AuditReadout) -> Callable[[Scan], Float[Tensor, " rows"]]:
    """Scores of the stored activations."""
    return lambda scan: detector.score(scan.reading(readout.where))[:, 0]


def _from_logits(detector: Detector, readout: AuditReadout) -> Callable[[Scan], Float[Tensor, " rows"]]:
    """Scores that were taken, token by token, while the models ran."""

    def value(row: ScannedRow) -> float:
        tokens = row.token_scores(detector.name)
        if readout.where == "decision":
            return tokens[row.decision]
        if readout.where == "generated":
            tokens = tokens[row.decision :]
        elif readout.where == "prompt":
            tokens = tokens[: row.decision + 1]
        return max(tokens) if readout.how == "max" else sum(tokens) / (1 if readout.how == "sum" else len(tokens))

    return lambda scan: _rows(scan, value)


def _rows(scan: Scan, value: Callable[[ScannedRow], float]) -> Float[Tensor, " rows"]:
    return torch.tensor([value(row) for row in scan.rows])
