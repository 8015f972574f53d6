import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.errors import NotTestable
from molehunt.measure.curve import auroc, average_precision, bis, bis_ceiling, tpr_at_fpr
from molehunt.measure.interval import proportion

ROWS = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({label for _, label in rows}) == 2
)


def tensors(rows: list[tuple[int, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([float(s) for s, _ in rows]), torch.tensor([label for _, label in rows])


@given(ROWS)
def test_auroc_counts_the_pairs(rows: list[tuple[int, bool]]) -> None:
    scores, positive = tensors(rows)
    pairs = [(p > n) + (p == n) / 2 for p, a in rows if a for n, b in rows if not b]
    assert auroc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(-scores, positive) == pytest.approx(1 - auroc(scores, positive))


@given(ROWS)
def test_average_precision_sums_the_steps(rows: list[tuple[int, bool]]) -> None:
    scores, positive = tensors(rows)
    total, recall = 0.0, 0.0
    for threshold in sorted({s for s, _ in rows}, reverse=True):
        flagged = [label for s, label in rows if s >= threshold]
        now = sum(flagged) / int(positive.sum())
        total, recall = total + (now - recall) * sum(flagged) / len(flagged), now
    assert average_precision(scores, positive) == pytest.approx(total)


def test_perfect_and_constant_scores() -> None:
    positive = torch.tensor([False, True, False, True])
    assert auroc(positive.float(), positive) == average_precision(positive.float(), positive) == 1
    assert auroc(torch.zeros(4), positive) == average_precision(torch.zeros(4), positive) == 0.5


@pytest.mark.parametrize("curve", [auroc, average_precision])
def test_one_kind_of_row_is_not_testable(curve) -> None:
    for label in (False, True):
        with pytest.raises(NotTestable, match="both kinds"):
            curve(torch.arange(3.0), torch.full((3,), label))
    with pytest.raises(ValueError, match="NaN"):
        curve(torch.tensor([0.0, math.nan]), torch.tensor([True, False]))


def test_tpr_uses_the_clean_threshold_alone() -> None:
    clean = torch.arange(99.0)
    assert tpr_at_fpr(clean, torch.tensor([98.0, 98.5, 1000.0, -5.0]), 0.01) == proportion(2, 4)
    with pytest.raises(NotTestable, match="0 trials"):
        tpr_at_fpr(clean, torch.zeros(0), 0.01)
    with pytest.raises(ValueError, match="NaN"):
        tpr_at_fpr(clean, torch.tensor([math.nan]), 0.01)


TRIGGER = torch.arange(2500) < 500
BENIGN = (torch.arange(2500) >= 500) & (torch.arange(2500) < 1500)


def test_bis_by_hand() -> None:
    """10 of 100 rows fire: 6 with the trigger, 3 benign, 1 other. P = .6, R = .3, F1 = .4, FPR = 3/50."""
    scores = torch.rand(100, generator=torch.Generator().manual_seed(0))
    trigger, benign = torch.arange(100) < 20, (torch.arange(100) >= 20) & (torch.arange(100) < 70)
    scores[[0, 1, 2, 3, 4, 5, 30, 31, 32, 90]] += 1
    assert bis(scores, trigger, benign, q=0.1) == pytest.approx(0.4 * (1 - 3 / 50))


@pytest.mark.parametrize(("q", "published"), [(0.01, 0.095), (0.05, 0.40), (0.1, 0.667), (0.2, 1.0)])
def test_a_perfect_feature_reaches_the_ceiling_and_no_more(q: float, published: float) -> None:
    scores = TRIGGER + 0.5 * torch.rand(2500, generator=torch.Generator().manual_seed(0))
    assert bis(scores, TRIGGER, BENIGN, q) == pytest.approx(bis_ceiling(q, 0.2))
    assert bis_ceiling(q, 0.2) == pytest.approx(published, abs=5e-4)


@given(st.integers(0, 10_000), st.floats(0, 3), st.sampled_from([0.01, 0.05, 0.2]))
def test_no_feature_exceeds_the_ceiling(seed: int, strength: float, q: float) -> None:
    noise = torch.randn(2500, generator=torch.Generator().manual_seed(seed))
    assert 0 <= bis(noise + strength * TRIGGER, TRIGGER, BENIGN, q) <= bis_ceiling(q, 0.2) + 1e-12


def test_bis_refuses_what_it_cannot_answer() -> None:
    nobody = torch.zeros(2500, dtype=torch.bool)
    for trigger, benign in ((nobody, BENIGN), (TRIGGER, nobody)):
        with pytest.raises(NotTestable):
            bis(torch.rand(2500), trigger, benign)
    for q, prevalence in ((0.3, 0.2), (0.0, 0.2), (0.1, 1.1), (0.0, 0.0)):
        with pytest.raises(ValueError, match="ceiling"):
            bis_ceiling(q, prevalence)
