import json
import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.errors import InvalidInput
from molehunt.measure.interval import proportion
from molehunt.measure.threshold import conformal_threshold
from molehunt.watch.drift import (
    JUMP,
    DriftMartingale,
    p_value_if_unflagged,
    reference_margin,
    smoothed_p_value,
)
from molehunt.watch.sketch import ScoreSketch

P = st.floats(0, 1)
LEVEL = 0.05


def fed(p_values: Iterable[float], **options: float) -> DriftMartingale:
    martingale = DriftMartingale(**options)
    for p in p_values:
        martingale.update(p)
    return martingale


def alarms(streams: Iterable[Iterable[float]], **options: float) -> tuple[int, int]:
    raised = [fed(stream, **options).alarm for stream in streams]
    return sum(raised), len(raised)


# The bet


def test_the_first_bets_by_hand() -> None:
    """Stakes 1/3 each; p = .1 pays slopes -1, 0, 1 with 1.4, 1 and .6; one more bet after the jump."""
    martingale = fed([0.1])
    assert math.isclose(martingale.log_wealth, 0, abs_tol=1e-12)  # 3/3: a mixture without a lean gains nothing
    lean = [1.4 / 3, 1 / 3, 0.6 / 3]
    spread = [(1 - JUMP) * stake + JUMP / 3 for stake in lean]
    wealth = 1.4 * spread[0] + spread[1] + 0.6 * spread[2]
    assert math.isclose(martingale.update(0.1).log_wealth, math.log(wealth), rel_tol=1e-12)
    assert np.allclose(martingale.stakes, np.array([1.4, 1, 0.6]) * spread / wealth)


@given(st.lists(P, max_size=40), P)
def test_no_bet_gains_on_average(history: list[float], p: float) -> None:
    """p and 1 - p together pay twice the stake, whatever came before: wealth is a martingale."""
    before = fed(history)
    state = before.to_dict()
    outcomes = [DriftMartingale.from_dict(state).update(end).log_wealth for end in (p, 1 - p)]
    mean = sum(math.exp(log - before.log_wealth) for log in outcomes) / 2
    assert math.isclose(mean, 1, rel_tol=1e-9)


@given(st.lists(P, max_size=40), st.floats(0, 0.5))
def test_a_mean_within_the_margin_does_not_pay(history: list[float], margin: float) -> None:
    before = fed(history, margin=margin)
    for mean in (0.5 - margin, 0.5, 0.5 + margin):  # bets are linear, so that a constant p is worst
        after = DriftMartingale.from_dict(before.to_dict()).update(mean)
        assert after.log_wealth <= before.log_wealth + 1e-12


def test_it_alarms_at_the_wealth_it_names_and_stays_on() -> None:
    martingale = DriftMartingale(level=LEVEL)
    while not martingale.alarm:
        below = math.exp(martingale.log_wealth)
        martingale.update(0.0)
    assert below < 1 / LEVEL <= math.exp(martingale.log_wealth)
    assert martingale.n < 20
    for _ in range(200):
        martingale.update(0.5)
        martingale.update(1.0)
        martingale.update(0.0)
    assert martingale.log_wealth < 0 and martingale.alarm


def test_uniform_p_values_alarm_no_more_often_than_promised() -> None:
    streams = np.random.default_rng(0).random((2_000, 120)).tolist()
    k, n = alarms(streams, level=LEVEL)
    assert proportion(k, n).low <= LEVEL
    assert k > 0, "a bet that never wins would pass, too"


@pytest.mark.parametrize("shape", [(1.0, 2.0), (2.0, 1.0)])
def test_a_shift_to_either_side_alarms_soon(shape: tuple[float, float]) -> None:
    rng = np.random.default_rng(1)
    clean, shifted = rng.random((200, 100)), rng.beta(*shape, (200, 300))
    k, n = alarms(np.concatenate([clean, shifted], axis=1).tolist(), level=0.01)
    assert proportion(k, n).low > 0.9
    blatant = np.concatenate(
        [clean, shifted[:, :40] ** 4 if shape[0] < shape[1] else 1 - (1 - shifted[:, :40]) ** 4], axis=1
    )
    k, n = alarms(blatant.tolist(), level=0.01)
    assert proportion(k, n).low > 0.9


def test_a_million_p_values_overflow_nothing() -> None:
    rich = fed([0.0] * 3_000)
    assert math.isfinite(rich.log_wealth) and rich.log_wealth > 1_000
    poor = fed([0.0, 1.0] * 3_000)
    assert math.isfinite(poor.log_wealth) and not poor.alarm


@pytest.mark.parametrize("p", [-0.01, 1.01, math.nan])
def test_what_is_no_p_value_is_refused_before_a_bet_is_made(p: float) -> None:
    martingale = fed([0.2])
    before = martingale.to_dict()
    with pytest.raises(ValueError, match="p-value"):
        martingale.update(p)
    assert martingale.to_dict() == before


# The state


@given(st.lists(P, max_size=30), st.lists(P, max_size=30))
def test_a_restart_goes_on_identically(first: list[float], second: list[float]) -> None:
    through = fed([*first, *second], level=0.02, margin=0.1)
    again = DriftMartingale.from_dict(json.loads(json.dumps(fed(first, level=0.02, margin=0.1).to_dict())))
    for p in second:
        again.update(p)
    assert again == through and again.n == len(first) + len(second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"molehunt_drift": 2}, "schema is 2"),
        ({"molehunt_drift": None}, "schema is None"),
        ({"level": 0.0}, "level"),
        ({"level": "much"}, "level"),
        ({"margin": 0.6}, "margin"),
        ({"n": -1}, "after -1"),
        ({"n": 1.5}, "field n"),
        ({"log_wealth": math.nan}, "log wealth"),
        ({"log_wealth": 3.0}, "log wealth"),
        ({"highest": -1.0}, "log wealth"),
        ({"highest": math.inf}, "log wealth"),
        ({"stakes": [0.5, 0.5]}, "stakes"),
        ({"stakes": [0.5, 0.5, 0.5]}, "stakes"),
        ({"stakes": [1.5, -0.5, 0.0]}, "stakes"),
        ({"stakes": [math.nan, 0.5, 0.5]}, "stakes"),
        ({"\x1b[31m": 1}, r"\\x1b"),
    ],
)
def test_a_state_that_cannot_be_true_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        DriftMartingale.from_dict({**fed([0.3]).to_dict(), **change})


# P-values


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_smoothed_p_values_of_exchangeable_scores_fill_0_to_1(scores: list[int]) -> None:
    """Each of the scores in turn is the new one: together their p-values cover 0..1 once, ties or not."""
    covered = []
    for i, score in enumerate(scores):
        others = scores[:i] + scores[i + 1 :]
        above, tied = sum(o > score for o in others), sum(o == score for o in others)
        ends = [smoothed_p_value(above, tied, len(others), Draws(u)) for u in (0.0, 1.0)]
        covered.append((min(ends), max(ends)))
    for p in np.linspace(0.001, 0.999, 50):
        density = sum((low < p <= high) / (high - low) for low, high in covered) / len(scores)
        assert math.isclose(density, 1)


class Draws(np.random.Generator):
    """A generator whose every draw is `u`."""

    def __init__(self, u: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.u = u

    def random(self) -> float:
        return self.u


@pytest.mark.parametrize("counts", [(-1, 0, 5), (0, -1, 5), (3, 3, 5)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="reference scores"):
        smoothed_p_value(*counts, np.random.default_rng(0))


@given(st.permutations(range(40)), st.sampled_from([0.05, 0.1, 0.24]))
def test_an_unflagged_row_s_p_value_is_that_among_the_unflagged_reference(order: list[int], fpr: float) -> None:
    """Exactly, and for the threshold that `measure` sets."""
    clean, score = torch.tensor(order[:-1]).double(), order[-1]
    threshold = conformal_threshold(clean, fpr)
    if score > threshold:
        return
    n = len(clean)
    alpha = math.floor(fpr * (n + 1)) / (n + 1)
    p = smoothed_p_value(int((clean > score).sum()), 0, n, np.random.default_rng(3))
    kept = clean[clean < threshold]  # the threshold itself, as a new row among these, would be flagged
    among = smoothed_p_value(int((kept > score).sum()), 0, len(kept), np.random.default_rng(3))
    assert math.isclose(p_value_if_unflagged(p, alpha), among, abs_tol=1e-12)


def test_what_was_flagged_is_refused() -> None:
    assert p_value_if_unflagged(0.01, 0.01) == 0 and p_value_if_unflagged(1.0, 0.01) == 1
    assert p_value_if_unflagged(0.3, 0.0) == 0.3
    for p, alpha in ((0.009, 0.01), (1.1, 0.01), (math.nan, 0.01), (0.5, 1.0), (0.5, -0.1)):
        with pytest.raises(ValueError):
            p_value_if_unflagged(p, alpha)


def test_without_the_rescaling_the_removal_of_flagged_rows_is_taken_for_drift() -> None:
    rng = np.random.default_rng(5)
    streams = [[p for p in row if p > 0.2] for row in rng.random((150, 300)).tolist()]
    k, n = alarms(streams, level=LEVEL)
    assert proportion(k, n).low > LEVEL
    k, n = alarms([[p_value_if_unflagged(p, 0.2) for p in stream] for stream in streams], level=LEVEL)
    assert proportion(k, n).low <= LEVEL


# The reference


def test_a_fixed_reference_needs_its_margin() -> None:
    rng = np.random.default_rng(7)
    size, level = 40, LEVEL
    streams = []
    for _ in range(120):
        reference = np.sort(rng.random(size))
        rank = size - np.searchsorted(reference, rng.random(1_000))
        streams.append(((rank + rng.random(1_000)) / (size + 1)).tolist())
    k, n = alarms(streams, level=level)
    assert proportion(k, n).low > 2 * level, "the shared error of the reference is found out"
    k, n = alarms(streams, level=level, margin=reference_margin(size, level))
    assert proportion(k, n).low <= 2 * level
    shifted = np.random.default_rng(8).beta(1, 4, (50, 300)).tolist()
    k, n = alarms(shifted, level=level, margin=reference_margin(size, level))
    assert proportion(k, n).low > 0.9, "and a real shift is still seen"


def test_the_margin_is_hoeffding_s() -> None:
    rng = np.random.default_rng(2)
    for n, level in ((20, 0.1), (500, 0.01)):
        off = np.abs(rng.integers(0, 2, (20_000, n)).mean(1) - 0.5)  # coins spread widest
        k = int((off > reference_margin(n, level)).sum())
        assert proportion(k, 20_000).low <= level and k > 0
    assert math.isclose(reference_margin(50, 0.02), math.sqrt(math.log(100) / 100))
    assert reference_margin(1, 0.01) == 0.5
    for n, level in ((0, 0.1), (5, 0.0), (5, 1.0)):
        with pytest.raises(ValueError, match="margin"):
            reference_margin(n, level)


def test_a_change_of_mix_is_drift_only_where_strata_are_pooled() -> None:
    """Long inputs score higher and become the rule: benign. P-values within each stratum stay uniform."""
    rng = np.random.default_rng(4)

    def rows(n: int, long: float) -> tuple[np.ndarray, np.ndarray]:
        stratum = (rng.random(n) < long).astype(int)
        return stratum, rng.normal(size=n) + 2 * stratum

    pooled, stratified = [], []
    for _ in range(40):
        strata, scores = (np.concatenate(pair) for pair in zip(rows(300, 0.2), rows(300, 0.8), strict=True))
        everything, own = [], []
        for i in range(100, 600):  # each among all before it
            everything.append((np.sum(scores[:i] > scores[i]) + rng.random()) / (i + 1))
            same = scores[:i][strata[:i] == strata[i]]
            own.append((np.sum(same > scores[i]) + rng.random()) / (len(same) + 1))
        pooled.append([float(p) for p in everything])
        stratified.append([float(p) for p in own])
    k, n = alarms(pooled, level=LEVEL)
    assert proportion(k, n).low > 0.5
    k, n = alarms(stratified, level=LEVEL)
    assert proportion(k, n).low <= LEVEL


def test_p_values_from_a_growing_sketch_are_uniform_with_ties() -> None:
    """The pieces together: counts from a sketch, ties broken by the generator, no false alarm, then a shift."""
    rng = np.random.default_rng(6)
    sketch = ScoreSketch.empty(1)
    martingale = DriftMartingale(level=0.01)
    for i in range(700):
        score = torch.tensor([float(rng.integers(0, 12) + (6 if i >= 500 else 0))])
        if i == 500:
            assert not martingale.alarm
        if i >= 50:
            above = int(sketch.at_least(score.nextafter(torch.tensor(math.inf))))
            tied = int(sketch.at_least(score)) - above
            martingale.update(smoothed_p_value(above, tied, sketch.n, rng))
        sketch.add(score[None])
    assert martingale.alarm
