"""What each method may be fitted on, and what it names."""

import pytest
import torch

from molehunt.activation.shuffle import PairBatch
from molehunt.bench.methods import METHODS, Known, Method, directions_of, where_how
from molehunt.bench.readings import Readings
from molehunt.contracts import Reading
from molehunt.detect.logistic_probe import LogisticProbe
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.train import DictionarySpec, untrained
from molehunt.site import Site
from molehunt.traffic.example import Example

SITE, D = Site(0), 8
BY_NAME = {method.name: method for method in METHODS}


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
KNOWN = {
    "R0": Known(clean=CLEAN, labelled=LABELLED, suspect=SUSPECT, chosen_on=CHOSEN, chosen_suspect=SUSPECT,
                dictionaries=DICTIONARIES, weights=WEIGHTS),
    "R1": Known(clean=CLEAN, traffic=TRAFFIC, dictionaries=DICTIONARIES, weights=WEIGHTS),
    "R2": Known(clean=CLEAN, weights=WEIGHTS),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_method_is_built_on_its_tracks_and_on_no_other(method: Method) -> None:
    built = {track: method.build(known, SITE, "decision") for track, known in KNOWN.items()}
    assert {track for track, detector in built.items() if detector is not None} == set(method.tracks)
    for detector in built.values():
        if detector is not None:
            assert detector.sites == ((SITE,) if method.sited else ())


def test_names_are_unique_on_a_track_and_site() -> None:
    assert len(BY_NAME) == len(METHODS)
    for track, known in KNOWN.items():
        names = [m.build(known, SITE, "decision").name for m in METHODS if track in m.tracks]  # pyright: ignore[reportOptionalMemberAccess]
        repeated = {name for name in names if names.count(name) > 1}
        assert repeated <= {f"probe {SITE}"}, "the probe on permuted labels is a probe"


def test_where_methods_are_scored() -> None:
    for method in METHODS:
        told = where_how(method)
        assert told == (("generated", "sum"),) or [where for where, _ in told].count("generated") == 2
    assert [m.name for m in METHODS if m.sums] == ["answer log ratio"]


def test_controls() -> None:
    assert {m.name for m in METHODS if m.control} == {
        "random direction of Δ", "probe of the base alone", "probe, permuted labels", "untrained Diff-SAE latent",
    }  # fmt: skip
    base = BY_NAME["probe of the base alone"].build(KNOWN["R0"], SITE, "decision")
    assert isinstance(base, LogisticProbe) and base.reads == "base" and base.needs_base
    true, permuted = (BY_NAME[n].build(KNOWN["R0"], SITE, "decision") for n in ("probe", "probe, permuted labels"))
    assert isinstance(true, LogisticProbe) and isinstance(permuted, LogisticProbe)
    assert not torch.allclose(true.weight, permuted.weight)


def test_nothing_is_built_without_what_it_needs() -> None:
    bare = Known(clean=CLEAN, labelled=LABELLED, suspect=SUSPECT, chosen_on=CHOSEN, chosen_suspect=SUSPECT)
    missing = {m.name for m in METHODS if m.build(bare, SITE, "decision") is None}
    assert missing == {m.name for m in METHODS if "SAE" in m.name or "crosscoder" in m.name or "weight" in m.name}
    elsewhere = Known(clean=CLEAN, traffic=TRAFFIC, dictionaries=DICTIONARIES)
    assert BY_NAME["Diff-SAE latent"].build(elsewhere, Site(1), "decision") is None
    assert BY_NAME["Diff-SAE latent"].build(Known(clean=CLEAN, dictionaries=DICTIONARIES), SITE, "decision") is None


WIDTHS = {"mean difference": 1, "Δ probe": 1, "Δ PCA-4": 4, "random direction of Δ": 1, "Δ along weight directions": 2,
          "weight range (published)": 2, "crosscoder latent": 1, "Diff-SAE 4 latents": 4, "crosscoder 4 latents": 4,
          "‖Δ‖": None, "Mahalanobis": None, "token KL": None}  # fmt: skip


@pytest.mark.parametrize(("name", "k"), WIDTHS.items())
def test_the_directions_an_intervention_would_take_out(name: str, k: int | None) -> None:
    detector = BY_NAME[name].build(KNOWN["R0"], SITE, "decision")
    assert detector is not None
    found = directions_of(detector)
    assert (None if found is None else tuple(found.shape)) == (None if k is None else (k, D))
    if name.startswith("crosscoder") and found is not None:
        rows = detector.dictionary.W_dec[detector.latents]  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(found, rows[:, D:]), "the tuned model's half"
