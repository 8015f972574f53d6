"""What each recipe of a detector may be fitted on, where it is read, and which directions it names."""

import pytest
import torch

from molehunt.activation.shuffle import PairBatch
from molehunt.bench.cell import TRACKS, on_track
from molehunt.contracts import Reading
from molehunt.detect.logistic_probe import LogisticProbe
from molehunt.detect.readings import Readings
from molehunt.detect.recipe import AuditReadout, DetectorRecipe, FitInputs, LabelledRows, detector_recipes, two_thirds
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.train import DictionarySpec, untrained
from molehunt.site import Site
from molehunt.traffic.example import Example

SITE, D = Site(0), 8
RECIPES = detector_recipes()
BY_NAME = {recipe.name: recipe for recipe in RECIPES}


def readings(n: int, seed: int) -> Readings:
    rng = torch.Generator().manual_seed(seed)
    tuned, base = torch.randn(2, n, 6, D, generator=rng)
    batch = Reading(
        tokens=torch.zeros(n, 6, dtype=torch.long), mask=torch.ones(n, 6, dtype=torch.bool),
        decision=torch.full((n,), 3), tuned={SITE: tuned}, base={SITE: base},
    )  # fmt: skip
    return Readings(
        examples=tuple(Example(prompt=str(i)) for i in range(n)), prompts=((0,),) * n, answers=((0,),) * n,
        batches=(batch,), scores={}, order=torch.arange(n),
    )  # fmt: skip


CLEAN, LABELLED, CHOSEN, TRAFFIC = (readings(20, seed) for seed in range(4))
SUSPECT = torch.arange(20) < 6
TOKENS = PairBatch(base=torch.randn(40, D), tuned=torch.randn(40, D))
KINDS = {"Diff-SAE": "difference", "crosscoder": "both", "untrained Diff-SAE": "difference"}
DICTIONARIES = {
    label: untrained(DictionarySpec(site=SITE, architecture="relu", pairing=Pairing(kind=kind), expansion=2), TOKENS, D)  # pyright: ignore[reportArgumentType]
    for label, kind in KINDS.items()
}
WEIGHTS = {SITE: torch.linalg.qr(torch.randn(D, 2)).Q.mT.contiguous()}
INPUTS = {
    "R0": FitInputs(clean=CLEAN, labelled=LabelledRows(LABELLED, SUSPECT), select=LabelledRows(CHOSEN, SUSPECT),
                    dictionaries=DICTIONARIES, weights=WEIGHTS),
    "R1": FitInputs(clean=CLEAN, traffic=TRAFFIC, dictionaries=DICTIONARIES, weights=WEIGHTS),
    "R2": FitInputs(clean=CLEAN, weights=WEIGHTS),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.key)
def test_a_detector_is_fitted_on_the_tracks_that_offer_what_it_needs_and_on_no_other(recipe: DetectorRecipe) -> None:
    fitted = {track: recipe.fitted(inputs, SITE, "decision") for track, inputs in INPUTS.items()}
    offered = {track for track, given in TRACKS.items() if recipe.needs <= given}
    assert {track for track, detector in fitted.items() if detector is not None} == offered
    for detector in fitted.values():
        if detector is not None:
            assert detector.sites == ((SITE,) if recipe.reads == "site" else ())
            assert detector.needs_logits == (recipe.reads == "logits")


def test_the_benchmark_has_the_rows_and_the_order_that_its_published_tables_have() -> None:
    listed = {track: list(dict.fromkeys(recipe.name for recipe, _ in on_track(track))) for track in TRACKS}
    both = ["token KL", "logit difference", "answer log ratio", "‖Δ‖", "Δ PCA-4", "Mahalanobis", "Δ Mahalanobis",
            "weight range (published)", "Δ along weight directions"]  # fmt: skip
    latents = ["Diff-SAE latent", "Diff-SAE 4 latents", "crosscoder latent", "crosscoder 4 latents"]
    probes = ["mean difference", "Δ mean difference", "probe", "Δ probe"]
    chance = ["random direction of Δ", "probe of the base alone", "probe, permuted labels", "untrained Diff-SAE latent"]
    assert listed["R0"] == [*both, *probes, *latents, *chance]
    assert listed["R1"] == [*both, *latents, chance[0], chance[3]]
    assert listed["R2"] == [*both, chance[0]]


def test_names_are_unique_on_a_track_and_site() -> None:
    assert len(BY_NAME) == len({recipe.key for recipe in RECIPES}) == len(RECIPES)
    for track, inputs in INPUTS.items():
        recipes = dict.fromkeys(recipe.key for recipe, _ in on_track(track))
        by_key = {recipe.key: recipe for recipe in RECIPES}
        fitted = [by_key[key].fitted(inputs, SITE, "decision") for key in recipes]
        names = [detector.name for detector in fitted if detector is not None]
        repeated = {name for name in names if names.count(name) > 1}
        assert repeated <= {f"probe {SITE}"}, "the probe on permuted labels is a probe"


def test_where_scores_are_read() -> None:
    for recipe in RECIPES:
        if recipe.bench and recipe.key != "answer-log-ratio":
            assert [readout.where for readout in recipe.bench].count("generated") == 2
    assert [(r.where, r.how) for r in BY_NAME["answer log ratio"].bench] == [("generated", "sum")]


def test_controls() -> None:
    assert {recipe.name for recipe in RECIPES if recipe.control} == {
        "random direction of Δ", "random directions of Δ", "probe of the base alone", "probe, permuted labels",
        "untrained Diff-SAE latent",
    }  # fmt: skip
    base = BY_NAME["probe of the base alone"].fitted(INPUTS["R0"], SITE, "decision")
    assert isinstance(base, LogisticProbe) and base.reads == "base" and base.needs_base
    true, permuted = (BY_NAME[n].fitted(INPUTS["R0"], SITE, "decision") for n in ("probe", "probe, permuted labels"))
    assert isinstance(true, LogisticProbe) and isinstance(permuted, LogisticProbe)
    assert not torch.allclose(true.weight, permuted.weight)


def test_nothing_is_fitted_without_what_it_needs() -> None:
    bare = FitInputs(clean=CLEAN, labelled=LabelledRows(LABELLED, SUSPECT), select=LabelledRows(CHOSEN, SUSPECT))
    missing = {recipe.name for recipe in RECIPES if recipe.fitted(bare, SITE, "decision") is None}
    assert missing == {r.name for r in RECIPES if "SAE" in r.name or "crosscoder" in r.name or "weight" in r.name}
    elsewhere = FitInputs(clean=CLEAN, traffic=TRAFFIC, dictionaries=DICTIONARIES)
    assert BY_NAME["Diff-SAE latent"].fitted(elsewhere, Site(1), "decision") is None
    unchosen = FitInputs(clean=CLEAN, dictionaries=DICTIONARIES)
    assert BY_NAME["Diff-SAE latent"].fitted(unchosen, SITE, "decision") is None


WIDTHS = {"mean difference": 1, "Δ probe": 1, "Δ PCA-4": 4, "random direction of Δ": 1, "Δ along weight directions": 2,
          "crosscoder latent": 1, "Diff-SAE 4 latents": 4, "crosscoder 4 latents": 4}  # fmt: skip


@pytest.mark.parametrize(("name", "k"), WIDTHS.items())
def test_the_directions_an_intervention_would_take_out(name: str, k: int) -> None:
    recipe = BY_NAME[name]
    detector = recipe.fitted(INPUTS["R0"], SITE, "decision")
    assert detector is not None and recipe.directions is not None
    found = recipe.directions(detector)
    assert tuple(found.shape) == (k, D)
    if name.startswith("crosscoder"):
        rows = detector.dictionary.W_dec[detector.latents]  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(found, rows[:, D:]), "the tuned model's half"


def test_who_names_directions() -> None:
    named = {recipe.name for recipe in RECIPES if recipe.directions is not None}
    assert named == {*WIDTHS, "Δ mean difference", "probe", "Diff-SAE latent", "untrained Diff-SAE latent"}


def test_an_audit_can_read_only_what_its_scan_stores() -> None:
    with pytest.raises(ValueError, match="decision position and their mean over the generated"):
        DetectorRecipe(key="x", name="x", fit=lambda *_: None, audit=(AuditReadout("generated", "max"),))
    with pytest.raises(ValueError, match="reads logits is not fitted"):
        DetectorRecipe(key="x", name="x", fit=lambda *_: None, reads="logits", needs={"clean"})


@pytest.mark.parametrize("n", range(1, 60))
def test_two_thirds_into_the_model(n: int) -> None:
    sites = [Site(i) for i in range(n)]
    assert two_thirds(sites) == sites[round(2 / 3 * (n - 1))]
    assert two_thirds(sites, [sites[0], sites[-1]]) == (sites[-1] if n > 1 else sites[0])
