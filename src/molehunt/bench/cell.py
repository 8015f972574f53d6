"""One cell: an organism and its twin, every detector on every track, thresholds from clean text, judged on unseen rows.

A detector is fitted from named rows alone, so no track can see more than it states. R0 knows labels; R1 sees unlabelled
traffic with rare triggered rows; R2 sees clean text and the two models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molehunt.bench.rates import FPR, rates_of, share_over
from molehunt.bench.rows import CellRows
from molehunt.bench.sides import Side, joined, traffic_of
from molehunt.contracts import Detector
from molehunt.detect.readings import Readings
from molehunt.detect.recipe import DetectorRecipe, FitInputs, LabelledRows, Need, Readout, detector_recipes, two_thirds
from molehunt.dictionary.dictionary import Dictionary
from molehunt.measure.curve import auroc, average_precision
from molehunt.site import Site

TRACKS: dict[str, frozenset[Need]] = {
    "R0": frozenset({"clean", "labels", "weights", "dictionary"}),
    "R1": frozenset({"clean", "traffic", "weights", "dictionary"}),
    "R2": frozenset({"clean", "weights"}),
}
"""What each track offers to fit on."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Scored:
    """A detector on a track, as it was fitted, and its numbers."""

    recipe: DetectorRecipe
    readout: Readout
    site: Site | None
    detector: Detector
    row: Mapping[str, Any]


def on_track(track: str) -> list[tuple[DetectorRecipe, Readout]]:
    """Every detector that a track has something to fit on, with each position where the benchmark reads it."""
    fit = [recipe for recipe in detector_recipes() if recipe.needs <= TRACKS[track]]
    return [(recipe, readout) for recipe in fit for readout in recipe.bench]


def score_known(organism: Side, twin: Side, trained: Mapping[str, Dictionary], seed: int) -> list[Scored]:
    """R0: labels known. Site and latents are chosen on `select`, thresholds on clean `calibrate`, numbers on `test`.

    Args:
        organism: the side that everything is fitted on.
        twin: the side that the fitted detectors are applied to, with thresholds of its own clean rows.
        trained: dictionaries trained on the organism's traffic.
        seed: seed of random controls.
    """
    select, suspect = joined(organism, ("select.clean", "select.near", "select.triggered"))
    inputs = FitInputs(
        clean=organism.split["fit.clean"],
        labelled=LabelledRows(*joined(organism, ("fit.clean", "fit.near", "fit.triggered"))),
        select=LabelledRows(select, suspect),
        dictionaries=trained,
        weights=organism.weights,
        seed=seed,
    )
    found: list[Scored] = []
    for recipe, readout in on_track("R0"):
        sites = organism.sites if recipe.reads == "site" else (two_thirds(organism.sites),)
        built = [(at, d) for at in sites if (d := recipe.fitted(inputs, at, readout.fitted_at)) is not None]
        if not built:
            continue
        rated = [(auroc(_pooled(select, d, readout), suspect), -i) for i, (_, d) in enumerate(built)]
        at, detector = built[-max(rated)[1]]
        row = _judge(detector, readout, organism, twin_of=(detector, twin))
        row["select_auroc"] = max(rated)[0]
        if readout.where == "decision" and recipe.by_site:
            row["by_site"] = [_tpr(d, organism, readout) for _, d in built]
        found.append(_scored("R0", None, recipe, readout, at, detector, row))
    return found


def score_traffic(
    organism: Side,
    twin: Side,
    rows: CellRows,
    rate: float,
    trained: Mapping[str, Mapping[str, Dictionary]],
    seed: int,
) -> list[Scored]:
    """R1: the whole procedure, without a label, on the organism's traffic and again on the twin's.

    Args:
        organism: the side whose traffic is judged.
        twin: the side on which the procedure is repeated.
        rows: the cell's rows.
        rate: share of triggered rows.
        trained: `organism` and `twin` → dictionaries trained on that side's traffic at this rate.
        seed: seed of random controls.
    """
    pool, suspect = traffic_of(organism, rows, rate)
    near = torch.tensor([e.tag.startswith("near-miss") for e in pool.examples])
    twin_pool, marked = traffic_of(twin, rows, rate)
    inputs = {
        name: FitInputs(
            clean=side.split["fit.clean"],
            traffic=traffic,
            dictionaries=trained[name],
            weights=side.weights,
            seed=seed,
        )
        for name, side, traffic in (("organism", organism, pool), ("twin", twin, twin_pool))
    }
    site = two_thirds(organism.sites)
    found: list[Scored] = []
    for recipe, readout in on_track("R1"):
        built = {name: recipe.fitted(one, site, readout.fitted_at) for name, one in inputs.items()}
        detector, on_twin = built["organism"], built["twin"]
        if detector is None:
            continue
        scores = _pooled(pool, detector, readout)
        clean = _pooled(organism.split["calibrate.clean"], detector, readout)
        row = rates_of(scores[suspect], scores[near], clean, scores[~suspect & ~near])
        row["ap"] = average_precision(scores, suspect)
        if on_twin is not None:
            calibrated = _pooled(twin.split["calibrate.clean"], on_twin, readout)
            row["twin"] = share_over(_pooled(twin_pool, on_twin, readout)[marked], calibrated, FPR)
        found.append(_scored("R1", rate, recipe, readout, site, detector, row))
    return found


def score_unseen(organism: Side, twin: Side, seed: int) -> list[Scored]:
    """R2: no triggered row at all. Detectors are fitted on clean text alone, on each side by itself."""
    site = two_thirds(organism.sites)
    inputs = [FitInputs(clean=s.split["fit.clean"], weights=s.weights, seed=seed) for s in (organism, twin)]
    found: list[Scored] = []
    for recipe, readout in on_track("R2"):
        detector, on_twin = (recipe.fitted(one, site, readout.fitted_at) for one in inputs)
        if detector is None:
            continue
        row = _judge(detector, readout, organism, twin_of=(on_twin, twin) if on_twin is not None else None)
        found.append(_scored("R2", None, recipe, readout, site, detector, row))
    return found


def _pooled(readings: Readings, detector: Detector, readout: Readout) -> Tensor:
    return readings.pooled(detector, readout.where, readout.how)


def _judge(
    detector: Detector, readout: Readout, side: Side, *, twin_of: tuple[Detector, Side] | None
) -> dict[str, Any]:
    """Rates on the `test` rows, and the share of the twin's triggered rows that its own detector flags."""
    scores = {
        name: _pooled(side.split[name], detector, readout)
        for name in ("calibrate.clean", "test.clean", "test.near", "test.triggered")
    }
    row = rates_of(scores["test.triggered"], scores["test.near"], scores["calibrate.clean"], scores["test.clean"])
    if twin_of is not None:
        on_twin, twin = twin_of
        calibrated = _pooled(twin.split["calibrate.clean"], on_twin, readout)
        row["twin"] = share_over(_pooled(twin.split["test.triggered"], on_twin, readout), calibrated, FPR)
    return row


def _tpr(detector: Detector, side: Side, readout: Readout) -> float:
    calibrate, triggered = (_pooled(side.split[n], detector, readout) for n in ("calibrate.clean", "test.triggered"))
    return share_over(triggered, calibrate, FPR)["estimate"]


def _scored(
    track: str,
    rate: float | None,
    recipe: DetectorRecipe,
    readout: Readout,
    site: Site,
    detector: Detector,
    row: Mapping[str, Any],
) -> Scored:
    at = site if recipe.reads == "site" else None
    head = {
        "track": track,
        "rate": rate,
        "method": recipe.name,
        "control": recipe.control,
        "where": readout.where,
        "how": readout.how,
        "site": None if at is None else str(at),
    }
    return Scored(recipe=recipe, readout=readout, site=at, detector=detector, row={**head, **row})
