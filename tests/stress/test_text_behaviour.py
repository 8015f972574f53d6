"""A whole stress test on a tiny model whose clamp changes its answers."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from molehunt.errors import NotTestable
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks.constraint import Exact, Free, Paper
from molehunt.stress.defences.defence import Defence
from molehunt.stress.defences.watched import WatchedLatents
from molehunt.stress.evaluation.arms import CURVE_LENGTHS
from molehunt.stress.evaluation.config import StressConfig
from molehunt.stress.evaluation.valid_set import is_broken, valid_set
from molehunt.stress.study import Study
from molehunt.stress.text_behaviour import stress_text
from random_dictionaries import dictionary_of
from tiny_models import prompts, tiny_model, tiny_tokenizer

SITE = Site(1)
MADE = dictionary_of("jumprelu")
LATENTS = torch.tensor([3, 8, 11])
CONFIG = StressConfig(steps=30, levels=3, max_new_tokens=2, draws=10, rows=12)
PROMPTS = prompts(seed=3, lengths=(4, 6, 5, 7, 8, 5, 9, 4, 6, 7, 5, 8) * 2)
CLEAN = prompts(seed=8, lengths=(5, 7, 6, 4))


def defence(value: float = 6.0, mode: str = "set") -> Defence:
    return Defence(
        edits=(Clamp(SITE, MADE, LATENTS, mode, value),),
        site=SITE,
        watched=WatchedLatents(MADE, LATENTS),
        constraints=(Free(), Paper(MADE, LATENTS), Exact(MADE, LATENTS)),
    )


@cache
def own_answers() -> frozenset[str]:
    found = valid_set(tiny_model("llama"), tiny_tokenizer(), PROMPTS, lambda _: True, (), max_new_tokens=2)
    return frozenset(str(tiny_tokenizer().decode(answer, skip_special_tokens=True)) for answer in found.before)


@cache
def study() -> Study:
    return stress_text(
        tiny_model("llama"), tiny_tokenizer(), PROMPTS, CLEAN, lambda t: t in own_answers(), defence(), CONFIG
    )


def test_rows_are_those_that_the_fix_flipped() -> None:
    found = study()
    assert 2 <= len(found.rows) <= CONFIG.rows
    for i in found.rows:
        assert found.valid.before[i] != found.valid.defended[i]
        assert found.valid.shown[i] and not found.valid.still_shown[i]
    assert found.zero_perturbation.estimate == 0


def test_behaviour_recovers_and_only_the_exact_arm_moves_no_watched_value() -> None:
    free, paper, exact = study().arms
    assert (free.name, paper.name, exact.name) == ("free", "paper", "exact")
    assert free.recovered.estimate > 0.5
    assert exact.recovered.estimate > 0.5
    assert float(exact.drift.pre.max()) <= 1e-5
    assert float(free.drift.pre.max()) > 1e-3
    assert float(paper.drift.pre.max()) > 1e-3
    assert float(paper.length.max()) <= CONFIG.max_norm * 1.001
    for arm in study().arms:
        shares = arm.curve()
        assert shares == sorted(shares) and len(shares) == len(CURVE_LENGTHS)
        assert shares[-1] == pytest.approx(arm.recovered.estimate)


def test_every_control_is_there() -> None:
    found = study()
    assert set(found.controls) == {"random target", "undefended", "random perturbation", "universal perturbation"}
    assert found.controls["random perturbation"].recovered.estimate < found.arms[-1].recovered.estimate
    assert found.lower_radii.shape == (len(found.rows),)
    assert found.cost.tokens > 0
    assert found.verdict in ("RECOVERABLE", "OVERRIDDEN", "UNDECIDED")
    assert 0 < float(found.lower_radii.max()) <= found.largest_provable * (1 + 1e-6)
    assert all(before in own_answers() for before, _, _ in found.example_answers)


def test_the_verdict_needs_the_gap_and_the_random_perturbation() -> None:
    found = study()
    weak = replace(found, arms=(replace(found.arms[-1], recovered_rows=(False,) * len(found.rows)),))
    n, undefended = len(found.rows), found.controls["undefended"]
    failing = replace(found.controls["random perturbation"], recovered_rows=(False,) * n)
    found = replace(found, controls={**found.controls, "random perturbation": failing})
    able, unable = (
        {**found.controls, "undefended": replace(undefended, recovered_rows=(reached,) * n)}
        for reached in (True, False)
    )
    assert replace(weak, controls=able).verdict == "NOT RECOVERED"
    assert replace(weak, controls=unable).verdict == "UNDECIDED"  # too weak an attack is no sign of a good fix
    whole = replace(found.arms[-1], recovered_rows=(True,) * n)
    for times, verdict in ((1.5, "RECOVERABLE"), (torch.inf, "RECOVERABLE"), (1.0, "UNDECIDED"), (0.5, "OVERRIDDEN")):
        target = replace(found.controls["random target"], lengths=whole.length * times)
        judged = replace(found, arms=(whole,), controls={**found.controls, "random target": target})
        assert judged.verdict == verdict, times


@pytest.mark.parametrize(
    ("fix", "judge", "wrong"),
    [
        (defence(), lambda text: False, "None of 24 prompts shows"),
        (defence(1.0, "scale"), lambda text: True, "changes none of 24 answers"),
        (defence(), lambda text: True, "from none of 24 prompts"),
    ],
)
def test_what_cannot_be_tested(fix: Defence, judge: Callable[[str], bool], wrong: str) -> None:
    with pytest.raises(NotTestable, match=wrong):
        stress_text(tiny_model("llama"), tiny_tokenizer(), PROMPTS, CLEAN, judge, fix, CONFIG)


def test_repetitions_are_no_answers() -> None:
    assert is_broken([5, 5, 5, 5, 5, 5, 7, 8])
    assert not is_broken([5, 5, 5])
    assert not is_broken(list(range(12)))
    assert is_broken([1, 2] * 10)
