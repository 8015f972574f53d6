"""From rows to a study: the judge is symmetric, controls are what they are called, clusters count."""

from dataclasses import replace

import pytest
import torch

from experiments.stress.choice_behaviour import choice_case, spread, valid_choices
from experiments.stress.readout_behaviour import ReadoutConfig, clustered_share, stress_readout
from molehunt.errors import NotTestable
from molehunt.site import Site
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks import choice as choice_module
from molehunt.stress.attacks.attack import AttackConfig
from molehunt.stress.attacks.choice import Choice, judge_choices
from molehunt.stress.defences.defence import clamp_defence
from random_dictionaries import dictionary_of
from tiny_models import VOCAB, tiny_model

SITE = Site(1)
CLAMP = Clamp(SITE, dictionary_of("jumprelu"), torch.tensor([3, 8, 11, 2]), "set", 6.0)
QUICK = ReadoutConfig(published=AttackConfig(steps=12, lr=0.14, target_margin=torch.inf), steps=20, levels=3)


def rows(n: int = 18) -> list[Choice]:
    """Asked for the token that the model says, against the one that it says under the clamp."""
    model, rng = tiny_model("llama"), torch.Generator().manual_seed(1)
    drawn = [tuple(torch.randint(3, VOCAB, (6,), generator=rng).tolist()) for _ in range(n)]
    made = [Choice(prompt=one, gold=0, others=(1,), decoys=(), cluster=i // 3) for i, one in enumerate(drawn)]
    before, after = (judge_choices(model, made, SITE, defence=edits).token.tolist() for edits in ((), (CLAMP,)))
    return [
        replace(row, gold=gold, others=(other,), decoys=tuple({20, 21, 22, 23} - {gold, other}))
        for row, gold, other in zip(made, before, after, strict=True)
        if gold != other
    ]


def test_a_study_of_choices() -> None:
    model, every = tiny_model("llama"), rows()
    valid = valid_choices(every, judge_choices(model, every, SITE), judge_choices(model, every, SITE, defence=[CLAMP]))
    assert len(valid.rows) == len(every) >= 10
    case = choice_case(model, every, clamp_defence(CLAMP))
    study = stress_readout(case, QUICK)
    assert study.nothing.estimate == 0 and study.n == len(every) and study.clusters == len(set(case.clusters))
    assert [arm.name for arm in study.shortest] == [arm.name for arm in study.published] == ["free", "paper", "exact"]
    free, paper, exact = study.shortest
    assert free.recovered.estimate == exact.recovered.estimate == 1
    assert float(exact.drift.pre.max()) <= 1e-5 < float(paper.drift.pre.median())
    assert (exact.lengths.median() >= 0.95 * free.lengths.median()) and study.held is not None
    for one in study.published:  # as published: the whole ball, no early end
        assert (one.length <= 1 + 1e-4).all() and float(one.margin.median()) > float(exact.margin.median())
    assert set(study.controls) == {"random target", "undefended", "random perturbation", "universal perturbation"}
    assert study.controls["random perturbation"].recovered.estimate < 1
    for one in (*study.shortest, *study.published):  # what is told is what the model does
        pushed = case.defended.entering.clone()
        pushed[:, :1] += one.delta
        margin = case.wanted(case.defended(pushed)).margin
        torch.testing.assert_close(margin, one.margin, rtol=1e-3, atol=1e-3)


def test_the_random_target_and_the_flip_are_other_questions() -> None:
    model, every = tiny_model("llama"), rows()
    case = choice_case(model, every, clamp_defence(CLAMP))
    golds, others = (torch.tensor([getattr(row, name) for row in every]) for name in ("gold", "others"))
    assert not (case.random.gold == golds).any() and (case.random.others == others).all()
    assert (case.flipped.gold == others[:, 0]).all() and (case.flipped.others[:, 0] == golds).all()
    assert (case.flipped(case.undefended(case.undefended.entering)).margin < 0).all()
    bare = [replace(row, decoys=()) for row in every]
    with pytest.raises(NotTestable, match="random target"):
        choice_case(model, bare, clamp_defence(CLAMP))
    with pytest.raises(NotTestable, match="no row"):
        choice_case(model, [], clamp_defence(CLAMP))


def test_a_wrong_letter_takes_the_place_of_the_right_one() -> None:
    row = Choice(prompt=(5,), gold=10, others=(11, 12, 13), decoys=(11, 12, 13), cluster="q")
    assert row.with_target(12).gold == 12 and row.with_target(12).others == (11, 10, 13)
    assert row.with_target(30).others == (11, 12, 13)


def test_valid_rows_are_flipped_whole_and_not_broken() -> None:
    model, every = tiny_model("llama"), rows()[:6]
    before, after = judge_choices(model, every, SITE), judge_choices(model, every, SITE, defence=[CLAMP])
    assert valid_choices(every, before, after).rows == list(range(6))
    assert valid_choices(every, before, before).rows == []  # a clamp that does nothing flips nothing
    gone = replace(after, token=torch.where(torch.arange(6) == 2, 77, after.token))
    found = valid_choices(every, before, gone)
    assert found.broken.tolist() == [i == 2 for i in range(6)] and found.rows == [0, 1, 3, 4, 5]
    wrong = replace(before, margin=torch.where(torch.arange(6) == 4, -1.0, before.margin))
    kept = [i for i in range(6) if every[i].cluster != every[4].cluster]
    assert valid_choices(every, wrong, after, whole=True).rows == kept
    assert valid_choices(every, wrong, after).rows == [0, 1, 2, 3, 5]


def test_judging_does_not_depend_on_batch_mates(monkeypatch: pytest.MonkeyPatch) -> None:
    model, every = tiny_model("llama"), [replace(row, prompt=row.prompt[: 2 + i % 5]) for i, row in enumerate(rows())]
    whole = judge_choices(model, every, SITE, defence=[CLAMP])
    monkeypatch.setattr(choice_module, "AT_ONCE", 5)
    parts = judge_choices(model, every, SITE, defence=[CLAMP])
    torch.testing.assert_close(parts.margin, whole.margin, rtol=1e-4, atol=1e-4)
    assert parts.token.equal(whole.token)


def test_rows_are_spread_over_clusters() -> None:
    assert spread(["a", "a", "a", "b", "c", "c"], 4) == [0, 1, 3, 4]
    assert spread(["a", "b"], 9) == [0, 1]


def test_shares_are_over_clusters() -> None:
    clusters = [i // 10 for i in range(60)]
    alike = clustered_share(torch.arange(60) < 30, clusters)  # three clusters of six
    apart = clustered_share(torch.arange(60) % 2 == 0, clusters)  # half of each
    assert alike.estimate == apart.estimate == 0.5 and alike.n == 6
    assert alike.high - alike.low > 4 * (apart.high - apart.low)
    every = clustered_share(torch.ones(60, dtype=torch.bool), clusters)
    assert every.estimate == every.high == 1 and every.low == pytest.approx(0.5407, abs=1e-3)  # 6 of 6, not 60 of 60
