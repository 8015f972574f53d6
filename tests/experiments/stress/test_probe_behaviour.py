"""Probes of mean activations: what is ablated is what they read, and the search finds what is known in closed form."""

import pytest
import torch
from torch import Tensor

from experiments.stress.probe_behaviour import ProbedTexts, Readouts, ablated, accuracy, one_vs_rest, pooled
from experiments.stress.readout_behaviour import ReadoutConfig, stress_readout
from molehunt.dictionary.dictionary import Dictionary
from molehunt.dictionary.nonlinearity import ReLUActivation
from molehunt.errors import NotTestable
from molehunt.site import Site
from molehunt.stress.attacks.attack import AttackConfig
from molehunt.stress.attacks.constraint import Exact
from molehunt.stress.attacks.objective import LinearReadout, least_norm
from molehunt.stress.defences.selection import LabelledText, by_probe_effect
from molehunt.stress.evaluation.norms import median
from molehunt.traffic.split import Calibrate, Fit, Select, Test

D, SITE = 16, Site(0)
CLASSES = ("birds", "fish", "trees")
QUICK = ReadoutConfig(published=AttackConfig(steps=10, lr=0.1, target_margin=torch.inf), steps=25, levels=6)


def dictionary() -> Dictionary:
    """Latents 0 to 2 are those of the classes, turned against the axes; the others read the rest."""
    turned = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0))).Q
    return Dictionary(
        W_enc=turned, b_enc=torch.zeros(D), W_dec=turned.T, b_dec=torch.zeros(D), nonlinearity=ReLUActivation()
    )


def texts(each: int, seed: int) -> tuple[LabelledText, ...]:
    """Texts of 3 to 8 tokens, half of which fire the latent of their class."""
    rng, made = torch.Generator().manual_seed(seed), dictionary()
    found: list[LabelledText] = []
    for _ in range(each):
        for i, label in enumerate(CLASSES):
            n = int(torch.randint(3, 7, (), generator=rng))
            code = 0.3 * torch.randn(n, D, generator=rng)
            code[::2, i] += 3.0
            found.append(LabelledText(code @ made.W_dec, label))
    return tuple(found)


def probed(target: str = "birds", n: int = 1) -> tuple[ProbedTexts, dict[str, LinearReadout]]:
    probes = one_vs_rest(Fit(texts(20, 1)), SITE)
    chosen = by_probe_effect(dictionary(), probes[target].weight, Select(texts(10, 2)), target, n)
    assert int(chosen.latents[0]) == CLASSES.index(target)
    return ProbedTexts.of(Test(texts(12, 3)), target, dictionary(), chosen.latents, SITE), probes


def test_ablation_takes_away_what_a_probe_reads() -> None:
    found, probes = probed()
    assert list(probes) == sorted(CLASSES)
    for label, probe in probes.items():
        own = torch.tensor([text.label == label for text in found.texts], dtype=torch.bool)
        assert accuracy(probe, found.before, own) > 0.95
    targeted = found.targeted(probes)
    assert targeted.drop["birds"] > 0.4 and targeted.score > 0.3
    assert len(found.flipped(probes["birds"])) >= 10


def test_what_the_dictionary_does_not_explain_is_kept() -> None:
    made, acts = dictionary(), [torch.randn(4, D, generator=torch.Generator().manual_seed(5))]
    (after,) = ablated(acts, made, torch.tensor([1]), SITE)
    code = made.encode(acts[0])
    torch.testing.assert_close(after, acts[0] - code[:, 1:2] * made.W_dec[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled(acts)[0], acts[0].mean(0))


def test_the_search_meets_the_closed_form_and_one_push_does_for_all() -> None:
    found, probes = probed(n=2)
    rows, own = found.flipped(probes["birds"]), probes["birds"]
    case = found.case(probes, rows)
    study = stress_readout(case, QUICK)
    basis = Exact(found.dictionary, found.latents).basis(torch.device("cpu"))
    for arm, span in ((study.shortest[0], None), (study.shortest[2], basis)):
        known = least_norm(own, found.after[rows], span) / case.unit
        if span is None:
            assert arm.is_recovered.all()
        close = median(arm.lengths / known)
        assert close is not None and 1 - 1e-4 <= close.estimate < 1.15
    assert study.controls["universal perturbation"].recovered.estimate > 0.9  # the readout is linear: one direction
    assert float(study.shortest[2].drift.largest.max()) < 1e-5 < float(study.shortest[0].drift.largest.max())


def test_controls_ask_for_what_is_not_there() -> None:
    found, probes = probed()
    case = found.case(probes, found.flipped(probes["birds"]))
    assert (case.random(case.defended(case.defended.entering)).margin <= 0).all()
    assert (case.flipped(case.undefended(case.undefended.entering)).margin <= 0).all()
    every = {label: LinearReadout(torch.zeros(D), 1.0) for label in CLASSES}
    with pytest.raises(NotTestable, match="every text"):
        found.case(every, [0])
    with pytest.raises(NotTestable, match="random target"):
        found.case({**every, "birds": probes["birds"]}, [0])


def test_each_row_has_its_own_readout() -> None:
    rng = torch.Generator().manual_seed(0)
    readouts = [LinearReadout(torch.randn(D, generator=rng), float(i)) for i in range(3)]
    acts: Tensor = torch.randn(3, 1, D, generator=rng)
    found = Readouts.of(readouts)(acts)
    for i, one in enumerate(readouts):
        assert float(one(acts[i : i + 1]).margin) == pytest.approx(float(found.margin[i]), abs=1e-4)
    kept = torch.tensor([2, 0])
    torch.testing.assert_close(Readouts.of(readouts).rows(kept)(acts[kept]).margin, found.margin[kept])


def test_splits_are_kept_apart() -> None:
    with pytest.raises(TypeError):  # WrongSplit, or the type checks of the tests before it
        one_vs_rest(Test(texts(3, 0)), SITE)
    with pytest.raises(TypeError):  # WrongSplit, or the type checks of the tests before it
        ProbedTexts.of(Calibrate(texts(3, 0)), "birds", dictionary(), torch.tensor([0]), SITE)
