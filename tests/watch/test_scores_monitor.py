"""From extremes to a p-value."""

import math
from functools import cache

import pytest
import torch

from molehunt.errors import NotTestable
from molehunt.measure.threshold import conformal_p_values
from molehunt.traffic.split import Calibrate, Fit
from molehunt.watch.monitor import LEAST, Monitor, StratumCalibration
from molehunt.watch.profile import Profile, profiles
from molehunt.watch.scores import MahalanobisScore, RangeExceedance, RobustMax, TailSum, quantile, tail

SCORES = [RangeExceedance.fit, RobustMax.fit, MahalanobisScore.fit, TailSum.fit]


@cache
def answers(n: int, seed: int, *, shift: float = 0.0, columns: int = 12, at: int | None = None) -> list[Profile]:
    """Answers of 1 to 20 tokens with columns of unlike scales and heavy tails; `shift` moves half of the columns."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        tokens = int(torch.randint(1, 21, (1,), generator=rng)) if at is None else at
        values = torch.randn(1, tokens, columns, generator=rng) / torch.rand(1, tokens, 1, generator=rng).clamp_min(0.1)
        values[..., : columns // 2] += shift
        scale = 10.0 ** torch.linspace(-4, 1, columns)
        found += profiles(values * scale, [tokens], torch.empty(1, 0))
    return found


@pytest.mark.parametrize("fit", SCORES)
def test_scores_do_not_depend_on_a_columns_scale_except_the_published_range(fit) -> None:
    rng = torch.Generator().manual_seed(0)
    clean, new = torch.randn(300, 5, generator=rng), torch.randn(40, 5, generator=rng)
    scale = torch.tensor([1e-4, 1.0, 3.0, 100.0, 0.5])
    plain, scaled = fit(clean)(new), fit(clean * scale)(new * scale)
    assert torch.allclose(plain, scaled, rtol=1e-3, atol=1e-4) == (fit != RangeExceedance.fit)


@pytest.mark.parametrize("fit", SCORES)
def test_further_out_scores_higher_and_the_column_is_named(fit) -> None:
    clean = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    score = fit(clean)
    rows = torch.zeros(3, 6)
    rows[:, 4] = torch.tensor([4.0, 8.0, 16.0])
    values = score(rows)
    assert values[0] < values[1] < values[2]
    assert score.by_column(rows).argmax(1).tolist() == [4, 4, 4]


def test_tail_sum_adds_only_the_largest_and_counts_rarity_in_nats() -> None:
    clean = torch.empty(20_000, 3).exponential_(generator=torch.Generator().manual_seed(2))
    score = TailSum.fit(clean, 2)
    start = -math.log(0.1)
    torch.testing.assert_close(score.start, torch.full((3,), start), rtol=0.05, atol=0)
    torch.testing.assert_close(score.scale, torch.ones(3), rtol=0.05, atol=0)
    far = torch.tensor([[start + 5, start + 3, start + 1.0]])
    torch.testing.assert_close(score(far), torch.tensor([8.0]), rtol=0.05, atol=0)
    assert float(score(torch.zeros(1, 3))) == 0.0


def test_quantile_and_tail_of_constant_columns_are_finite() -> None:
    values = torch.arange(10.0)[:, None].repeat(1, 2)
    assert quantile(values, 0.9).tolist() == [8.0, 8.0] and quantile(values, 0.05).tolist() == [0.0, 0.0]
    start, scale = tail(torch.ones(10, 2))
    assert start.tolist() == [1.0, 1.0] and bool((scale > 0).all())


@pytest.mark.parametrize("fit", SCORES)
@pytest.mark.parametrize("fpr", [0.01, 0.1])
def test_the_joint_false_alarm_rate_is_what_was_asked_for(fit, fpr: float) -> None:
    """Over all columns, prefix checkpoints and lengths; a plain range over 12 columns would flag far more."""
    monitor = Monitor.fit(Fit(tuple(answers(300, 0))), Calibrate(tuple(answers(1000, 1))), fpr=fpr, score=fit)
    fresh = answers(1500, 2)
    scores = monitor.scores(fresh)
    p_values = conformal_p_values(monitor.calibration, scores)
    flagged = int((p_values <= fpr).sum())
    for row, score, p in zip(fresh[:40], scores, p_values, strict=False):
        judged = monitor.judge(row)
        assert judged.score == pytest.approx(
            float(score), rel=1e-3, abs=1e-4
        )  # one row or many: products round otherwise
        assert abs(judged.p_value - float(p)) <= 2 / 1000
    # a threshold from 1,000 rows has an error of its own, about as large as that of 1,500 fresh rows
    spread = 4 * math.sqrt(fpr * (1 - fpr) * (1 / 1000 + 1 / len(fresh)))
    assert abs(flagged / len(fresh) - fpr) <= spread
    assert flagged == int((scores > monitor.threshold).sum())


def test_a_shift_of_many_columns_is_caught_at_the_first_prefix_and_named() -> None:
    monitor = Monitor.fit(Fit(tuple(answers(300, 0))), Calibrate(tuple(answers(1000, 1))), fpr=0.01)
    judged = [monitor.judge(row) for row in answers(100, 3, shift=80.0)]
    assert sum(j.p_value <= 0.01 for j in judged) >= 95
    assert sum(all(c < 6 for c in j.columns) for j in judged) >= 90
    early = [monitor.judge(row) for row in answers(50, 3, shift=80.0, at=1)]
    assert {j.prefix for j in early} == {0} and sum(j.p_value <= 0.01 for j in early) >= 45


def test_longer_answers_than_any_calibrated_are_judged_and_marked() -> None:
    monitor = Monitor.fit(Fit(tuple(answers(600, 0))), Calibrate(tuple(answers(200, 1))), fpr=0.01)
    assert len(monitor.by_stratum[0].prefixes) == 6
    (long,) = answers(1, 5, at=100)
    assert not monitor.judge(long).within_calibration
    assert monitor.judge(answers(1, 5, at=20)[0]).within_calibration


def test_too_little_clean_text_abstains() -> None:
    with pytest.raises(NotTestable, match=f"at least {LEAST}"):
        Monitor.fit(Fit(tuple(answers(20, 0))), Calibrate(tuple(answers(20, 1))), fpr=0.01)
    with pytest.raises(NotTestable, match="200 clean rows cannot hold"):
        Monitor.fit(Fit(tuple(answers(600, 0))), Calibrate(tuple(answers(200, 1))), fpr=0.001)


def test_the_scale_of_a_rare_prefix_does_not_rest_on_two_answers() -> None:
    """Of the longest answers there are few; a checkpoint whose tail is estimated too narrow would dominate all others."""
    scales = []
    for seed in range(20):
        fit = [*answers(200, 1), *answers(64, 500 + seed, at=33)]
        one = StratumCalibration.fit(fit, answers(100, 2), TailSum.fit)
        assert len(one.prefixes) == 7
        scales.append(one.prefixes[6].scale)
    assert max(scales) < 6 * min(scales)
