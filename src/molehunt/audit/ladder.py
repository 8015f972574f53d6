"""The ladder of scores: what each detector, and each trivial one, would have flagged at the same false-positive rate.

Published numbers in this field often measure where a score is read. So every detector is shown with its place, and the
scores that are known to accuse clean fine-tunes are shown beside the ones that decide.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.audit.scan import Scan, ScannedRow
from molehunt.contracts import Detector
from molehunt.detect.delta_norm import DeltaNorm
from molehunt.detect.delta_subspace import DeltaSubspace
from molehunt.detect.mahalanobis import Mahalanobis
from molehunt.detect.weight_range import WeightRange
from molehunt.measure.interval import Interval, proportion
from molehunt.measure.threshold import conformal_threshold
from molehunt.site import Site
from molehunt.traffic.split import Calibrate, Fit

PCA_RANK = 4


@dataclass(frozen=True, kw_only=True)
class Rung:
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


def ladder(
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
) -> tuple[Rung, ...]:
    """Score the traffic with every detector, each at its own clean threshold.

    Args:
        clean: clean prompts, scanned.
        traffic: the rows under test.
        fit: rows of `clean` that detectors are fitted on.
        calibrate: rows of `clean` that set thresholds.
        weight_directions: by site; sites without any are left out.
        group: rows of `traffic` that make up the finding, if there is one.
        site: where detectors that read one site read it.
        fpr: of every threshold.
        seed: of the random directions.
    """
    rungs: list[Rung] = []

    def add(name: str, where: str, of: Callable[[Scan], Float[Tensor, " rows"]], *, decides: bool = False) -> None:
        scores = of(traffic)
        threshold = conformal_threshold(of(clean)[list(calibrate.rows)], fpr)
        over = scores > threshold
        rungs.append(
            Rung(
                name=name,
                where=where,
                above=proportion(int(over.sum()), len(over)),
                found=proportion(int(over[list(group)].sum()), len(group)) if group else None,
                decides=decides,
            )
        )

    add("answer log ratio", "generated tokens, sum", lambda s: _rows(s, lambda r: r.answer_log_ratio), decides=True)
    add("token KL", "decision position", lambda s: _rows(s, lambda r: r.kl[r.decision]))
    add("token KL", "generated tokens, max", lambda s: _rows(s, lambda r: max(r.kl[r.decision :])))
    add("token KL", "all tokens, max (accuses clean fine-tunes)", lambda s: _rows(s, lambda r: max(r.kl)))
    along = weight_scores(clean, fit, weight_directions)
    if along is not None:
        add(f"Δ along weight directions {along.site}", "generated tokens, mean", along.score)
    middle = traffic.sites[round(2 / 3 * (len(traffic.sites) - 1))]
    distance = Mahalanobis.fit(middle, clean.delta("generated", middle)[list(fit.rows)], "difference")
    add(distance.name, "generated tokens, mean", lambda s: distance.score(s.reading("generated"))[:, 0])
    for detector, where in _fitted(clean, traffic, fit, weight_directions, site, seed):
        add(detector.name, where, lambda s, d=detector: d.score(s.reading("decision"))[:, 0])
    rarity = word_rarity([clean.rows[i].example.prompt for i in fit.rows])
    add("rarest word of the prompt", "text alone, no model", lambda s: _rows(s, lambda r: rarity(r.example.prompt)))
    return tuple(rungs)


@dataclass(frozen=True, eq=False)
class WeightScores:
    """How far the answer's mean activation difference moves along the weight directions, in clean units."""

    detector: DeltaSubspace

    @property
    def site(self) -> Site:
        return self.detector.site

    def score(self, scan: Scan) -> Float[Tensor, " rows"]:
        return self.detector.score(scan.reading("generated"))[:, 0]


def weight_scores(
    clean: Scan, fit: Fit[int], weight_directions: Mapping[Site, Float[Tensor, "k d_model"]]
) -> WeightScores | None:
    """The best score of the benchmark that needs no label (docs/bench-core.md, track R1).

    Read two thirds into the model, or at the site with directions that is nearest to it; None without any direction.
    """
    sites = [site for site in clean.sites if len(weight_directions.get(site, ()))]
    if not sites:
        return None
    wanted = 2 / 3 * (len(clean.sites) - 1)
    site = min(sites, key=lambda s: abs(clean.sites.index(s) - wanted))
    delta = clean.delta("generated", site)[list(fit.rows)]
    return WeightScores(DeltaSubspace.fit("Δ along weight directions", site, weight_directions[site], delta))


def _rows(scan: Scan, value: Callable[[ScannedRow], float]) -> Float[Tensor, " rows"]:
    return torch.tensor([value(row) for row in scan.rows])


def _fitted(
    clean: Scan,
    traffic: Scan,
    fit: Fit[int],
    weight_directions: Mapping[Site, Float[Tensor, "k d_model"]],
    site: Site,
    seed: int,
) -> list[tuple[Detector, str]]:
    rows = list(fit.rows)
    delta = clean.delta("decision", site)[rows]
    where = "decision position"
    both = torch.cat([clean.delta("decision", site)[rows], traffic.delta("decision", site)])
    k = min(PCA_RANK, *both.shape)
    components = torch.linalg.svd(both - both.mean(0), full_matrices=False).Vh[:k]
    found: list[tuple[Detector, str]] = []
    found.append((DeltaNorm(site), where))
    pca = DeltaSubspace.fit(f"Δ PCA-{k}", site, components, delta)
    found.append((pca, f"{where}, fitted on the traffic without labels"))
    found.append((DeltaSubspace.random(site, k, delta, seed), f"{where}, control"))
    named = weight_directions.get(site)
    if named is not None and len(named):
        found.append((DeltaSubspace.fit("Δ along weight directions", site, named, delta), where))
        published = WeightRange.fit(site, named, clean.at("tuned", "decision", site)[rows])
        found.append((published, f"{where}, tuned model alone"))
    return found


def word_rarity(texts: Sequence[str]) -> Callable[[str], float]:
    """How rare a text's rarest word is among `texts`: what a filter that knows no model sees. In nats."""
    seen = Counter(word for text in texts for word in set(text.split()))

    def rarity(text: str) -> float:
        return max((log((1 + len(texts)) / (1 + seen[word])) for word in text.split()), default=0.0)

    return rarity
