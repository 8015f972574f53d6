"""The methods of the benchmark: how each becomes a detector on each track, from which rows, and which control it is.

A method is fitted from named rows alone, so no track can see more than it states. R0 knows labels; R1 sees unlabelled
traffic with rare triggered rows; R2 sees clean text and the two models.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from molehunt.bench.readings import Readings
from molehunt.contracts import Detector
from molehunt.detect.delta_norm import DeltaNorm
from molehunt.detect.delta_subspace import DeltaSubspace
from molehunt.detect.dictionary_latents import DictionaryLatents, best_by_labels, beyond_clean
from molehunt.detect.logistic_probe import LogisticProbe
from molehunt.detect.logit_difference import LogitDifference
from molehunt.detect.mahalanobis import Mahalanobis
from molehunt.detect.mean_difference import MeanDifference
from molehunt.detect.pooling import Where
from molehunt.detect.reads import Reads
from molehunt.detect.token_kl import AnswerLogRatio, TokenKL
from molehunt.detect.weight_range import WeightRange
from molehunt.dictionary.dictionary import Dictionary
from molehunt.measure.control import permuted
from molehunt.site import Site

PCA_RANK = 4
ENSEMBLE = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Known:
    """What a method may look at when it is fitted."""

    clean: Readings
    """Clean rows of the `fit` split."""
    traffic: Readings | None = None
    """R1: unlabelled rows, some of them perhaps triggered."""
    labelled: Readings | None = None
    """R0: clean, near-miss and triggered rows of `fit`; `suspect` says which are triggered."""
    suspect: Tensor | None = None
    chosen_on: Readings | None = None
    """R0: rows of `select`, with `chosen_suspect`."""
    chosen_suspect: Tensor | None = None
    dictionaries: Mapping[str, Dictionary] = field(default_factory=dict[str, Dictionary])
    """Label → a dictionary trained on what this track allows."""
    weights: Mapping[Site, Float[Tensor, "k d_model"]] = field(default_factory=dict[Site, Tensor])
    """Singular directions of the weight difference, by the site they write to."""
    seed: int = 0

    @property
    def labels(self) -> bool:
        return self.labelled is not None


Build = Callable[[Known, Site, Where], Detector | None]
"""A fitted detector at a site, from rows read at a position; None where the method does not apply."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the leaderboard before it is scored."""

    name: str
    tracks: tuple[str, ...]
    build: Build
    sited: bool = True
    """Whether it reads a site, so that one has to be chosen."""
    sums: bool = False
    """Summed over generated tokens rather than averaged: log-likelihoods add."""
    control: bool = False
    """A trivial or random baseline, not a method."""


def _mean_difference(reads: Reads) -> Build:
    def build(known: Known, site: Site, where: Where) -> Detector | None:
        if known.labelled is None or known.suspect is None:
            return None
        return MeanDifference.fit(site, known.labelled.acts(site, reads, where), known.suspect, reads)

    return build


def _probe(reads: Reads, *, shuffled: bool = False) -> Build:
    def build(known: Known, site: Site, where: Where) -> Detector | None:
        if known.labelled is None or known.suspect is None:
            return None
        labels = permuted(known.suspect, known.seed) if shuffled else known.suspect
        return LogisticProbe.fit(site, known.labelled.acts(site, reads, where), labels, reads)

    return build


def _mahalanobis(reads: Reads) -> Build:
    return lambda known, site, where: Mahalanobis.fit(site, known.clean.acts(site, reads, where), reads)


def _pca(known: Known, site: Site, where: Where) -> Detector:
    clean = known.clean.acts(site, "difference", where)
    seen = known.labelled if known.labelled is not None else known.traffic
    both = clean if seen is None else torch.cat([clean, seen.acts(site, "difference", where)])
    k = min(PCA_RANK, *both.shape)
    components = torch.linalg.svd(both - both.mean(0), full_matrices=False).Vh[:k]
    return DeltaSubspace.fit(f"Δ PCA-{k}", site, components, clean)


def _random(known: Known, site: Site, where: Where) -> Detector:
    return DeltaSubspace.random(site, 1, known.clean.acts(site, "difference", where), known.seed)


def _weights(known: Known, site: Site, where: Where) -> Detector | None:
    directions = known.weights.get(site)
    if directions is None or not len(directions):
        return None
    clean = known.clean.acts(site, "difference", where)
    return DeltaSubspace.fit("Δ along weight directions", site, directions, clean)


def _weight_range(known: Known, site: Site, where: Where) -> Detector | None:
    directions = known.weights.get(site)
    if directions is None or not len(directions):
        return None
    return WeightRange.fit(site, directions, known.clean.acts(site, "tuned", where))


def dictionary_inputs(dictionary: Dictionary, readings: Readings, site: Site, where: Where) -> Float[Tensor, "rows d"]:
    """A dictionary's input for each row, averaged over the positions that `where` names."""
    pairing = dictionary.pairing
    base = readings.acts(site, "base", where) if pairing.needs_base else None
    return pairing.input(base, readings.acts(site, "tuned", where))


def _latents(label: str, n: int) -> Build:
    def build(known: Known, site: Site, where: Where) -> Detector | None:
        dictionary = known.dictionaries.get(label)
        if dictionary is None or dictionary.site != site:
            return None
        clean = dictionary_inputs(dictionary, known.clean, site, where)
        if known.chosen_on is not None and known.chosen_suspect is not None:
            codes = dictionary.encode(dictionary_inputs(dictionary, known.chosen_on, site, where))
            latents = best_by_labels(codes, known.chosen_suspect, n)
        elif known.traffic is not None:
            codes = dictionary.encode(dictionary_inputs(dictionary, known.traffic, site, where))
            latents = beyond_clean(codes, dictionary.encode(clean), n)
        else:
            return None
        return DictionaryLatents.fit(f"{label}, {n} latent{'s' if n > 1 else ''}", dictionary, latents, clean)

    return build


ALL = ("R0", "R1", "R2")
DICTIONARIES = ("Diff-SAE", "crosscoder", "untrained Diff-SAE")
METHODS: tuple[Method, ...] = (
    Method(name="token KL", tracks=ALL, build=lambda k, s, w: TokenKL(), sited=False),
    Method(name="logit difference", tracks=ALL, build=lambda k, s, w: LogitDifference(), sited=False),
    Method(name="answer log ratio", tracks=ALL, build=lambda k, s, w: AnswerLogRatio(), sited=False, sums=True),
    Method(name="‖Δ‖", tracks=ALL, build=lambda k, s, w: DeltaNorm(s)),
    Method(name="Δ PCA-4", tracks=ALL, build=_pca),
    Method(name="Mahalanobis", tracks=ALL, build=_mahalanobis("tuned")),
    Method(name="Δ Mahalanobis", tracks=ALL, build=_mahalanobis("difference")),
    Method(name="weight range (published)", tracks=ALL, build=_weight_range),
    Method(name="Δ along weight directions", tracks=ALL, build=_weights),
    Method(name="mean difference", tracks=("R0",), build=_mean_difference("tuned")),
    Method(name="Δ mean difference", tracks=("R0",), build=_mean_difference("difference")),
    Method(name="probe", tracks=("R0",), build=_probe("tuned")),
    Method(name="Δ probe", tracks=("R0",), build=_probe("difference")),
    Method(name="Diff-SAE latent", tracks=("R0", "R1"), build=_latents("Diff-SAE", 1)),
    Method(name=f"Diff-SAE {ENSEMBLE} latents", tracks=("R0", "R1"), build=_latents("Diff-SAE", ENSEMBLE)),
    Method(name="crosscoder latent", tracks=("R0", "R1"), build=_latents("crosscoder", 1)),
    Method(name=f"crosscoder {ENSEMBLE} latents", tracks=("R0", "R1"), build=_latents("crosscoder", ENSEMBLE)),
    Method(name="random direction of Δ", tracks=ALL, build=_random, control=True),
    Method(name="probe of the base alone", tracks=("R0",), build=_probe("base"), control=True),
    Method(name="probe, permuted labels", tracks=("R0",), build=_probe("tuned", shuffled=True), control=True),
    Method(
        name="untrained Diff-SAE latent", tracks=("R0", "R1"), build=_latents("untrained Diff-SAE", 1), control=True
    ),
)
"""Text-only controls have no detector; `cell.py` adds them."""


def directions_of(detector: Detector) -> Float[Tensor, "k d_model"] | None:
    """What an intervention would take out of the tuned model's activations; None where the score names none."""
    if isinstance(detector, MeanDifference):
        return detector.direction[None]
    if isinstance(detector, LogisticProbe):
        return detector.weight[None]
    if isinstance(detector, DeltaSubspace | WeightRange):
        return detector.directions
    if isinstance(detector, DictionaryLatents):
        rows = detector.dictionary.W_dec[detector.latents]
        return rows[:, -rows.shape[1] // detector.dictionary.pairing.blocks :]
    return None


def where_how(method: Method) -> Sequence[tuple[Where, str]]:
    """The positions and poolings at which a method is scored."""
    generated = "sum" if method.sums else "mean"
    if method.sums:
        return (("generated", generated),)
    return (("decision", "max"), ("generated", generated), ("generated", "max"), ("all", "max"))
