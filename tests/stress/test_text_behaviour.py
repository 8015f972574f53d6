"""A whole stress test on a tiny model whose clamp changes its answers."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from molehunt.errors import NotTestable
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.constraint import Exact, Free, Paper
from molehunt.stress.drift import Latents
from molehunt.stress.study import AT, Defence, StressConfig, Study
from molehunt.stress.text_behaviour import stress_text
from molehunt.stress.valid import is_broken, valid_set
from random_dictionaries import dictionary_of
from tiny_models import prompts, tiny_model, tiny_tokenizer

SITE = Site(1)
MADE = dictionary_of("jumprelu")
LATENTS = torch.tensor([3, 8, 11])
CONFIG = StressConfig(steps=30, levels=3, max_new_tokens=2, draws=10, rows=12)
ASKED = prompts(seed=3, lengths=(4, 6, 5, 7, 8, 5, 9, 4, 6, 7, 5, 8) * 2)
CLEAN = prompts(seed=8, lengths=(5, 7, 6, 4))


def defence(value: float = 6.0, mode: str = "set") -> Defence:
    return Defence(
        edits=(Clamp(SITE, MADE, LATENTS, mode, value),),
        site=SITE,
        watched=Latents(MADE, LATENTS),
        constraints=(Free(), Paper(MADE, LATENTS), Exact(MADE, LATENTS)),
    )


@cache
def own_answers() -> frozenset[str]:
    found = valid_set(tiny_model("llama"), tiny_tokenizer(), ASKED, lambda _: True, (), max_new_tokens=2)
    return frozenset(str(tiny_tokenizer().decode(answer, skip_special_tokens=True)) for answer in found.before)


@cache
def study() -> Study:
    return stress_text(
        tiny_model("llama"), tiny_tokenizer(), ASKED, CLEAN, lambda t: t in own_answers(), defence(), CONFIG
    )


def test_rows_are_those_that_the_fix_flipped() -> None:
    found = study()
    assert 2 <= len(found.rows) <= CONFIG.rows
    for i in found.rows:
        assert found.valid.before[i] != found.valid.defended[i]
        assert found.valid.shown[i] and not found.valid.left[i]
    assert found.nothing.estimate == 0


def test_behaviour_comes_back_and_only_the_exact_arm_moves_nothing_that_is_watched() -> None:
    free, paper, exact = study().arms
    assert (free.name, paper.name, exact.name) == ("free", "paper", "exact")
    assert free.recovered.estimate > 0.5
    assert exact.recovered.estimate > 0.5
    assert float(exact.drift.pre.max()) <= 1e-5
    assert float(free.drift.pre.max()) > 1e-3
    assert float(paper.drift.pre.max()) > 1e-3
    assert float(paper.length.max()) <= CONFIG.most * 1.001
    for arm in study().arms:
        shares = arm.curve()
        assert shares == sorted(shares) and len(shares) == len(AT)
        assert shares[-1] == pytest.approx(arm.recovered.estimate)


def test_every_control_is_there() -> None:
    found = study()
    assert set(found.controls) == {"random target", "undefended", "random push", "universal push"}
    assert found.controls["random push"].recovered.estimate < found.arms[-1].recovered.estimate
    assert found.lower.shape == (len(found.rows),)
    assert found.cost.tokens > 0
    assert found.verdict in ("RECOVERABLE", "OVERRIDDEN", "UNDECIDED")
    assert 0 < float(found.lower.max()) <= found.lower_most * (1 + 1e-6)
    assert all(before in own_answers() for before, _, _ in found.told)


def test_the_verdict_needs_the_gap_and_the_random_push() -> None:
    found = study()
    weak = replace(found, arms=(replace(found.arms[-1], back=(False,) * len(found.rows)),))
    n, undefended = len(found.rows), found.controls["undefended"]
    nothing = replace(found.controls["random push"], back=(False,) * n)
    found = replace(found, controls={**found.controls, "random push": nothing})
    able, unable = ({**found.controls, "undefended": replace(undefended, back=(back,) * n)} for back in (True, False))
    assert replace(weak, controls=able).verdict == "NOT BROUGHT BACK"
    assert replace(weak, controls=unable).verdict == "UNDECIDED"  # too weak an attack is no sign of a good fix
    whole = replace(found.arms[-1], back=(True,) * n)
    for times, verdict in ((1.5, "RECOVERABLE"), (torch.inf, "RECOVERABLE"), (1.0, "UNDECIDED"), (0.5, "OVERRIDDEN")):
        target = replace(found.controls["random target"], lengths=whole.length * times)
        told = replace(found, arms=(whole,), controls={**found.controls, "random target": target})
        assert told.verdict == verdict, times


@pytest.mark.parametrize(
    ("fix", "shows", "wrong"),
    [
        (defence(), lambda text: False, "None of 24 prompts shows"),
        (defence(1.0, "scale"), lambda text: True, "changes none of 24 answers"),
        (defence(), lambda text: True, "from none of 24 prompts"),
    ],
)
def test_what_cannot_be_tested(fix: Defence, shows, wrong: str) -> None:
    with pytest.raises(NotTestable, match=wrong):
        stress_text(tiny_model("llama"), tiny_tokenizer(), ASKED, CLEAN, shows, fix, CONFIG)


def test_repetitions_are_no_answers() -> None:
    assert is_broken([5, 5, 5, 5, 5, 5, 7, 8])
    assert not is_broken([5, 5, 5])
    assert not is_broken(list(range(12)))
    assert is_broken([1, 2] * 10)
