from typing import get_args

import pytest
import torch

from molehunt.contracts import Reading
from molehunt.detect.delta_subspace import DeltaSubspace
from molehunt.detect.mean_difference import MeanDifference
from molehunt.detect.pooling import How, Where, pool, positions
from molehunt.detect.token_kl import AnswerLogRatio, TokenKL
from molehunt.detect.weight_range import WeightRange
from molehunt.site import Site


def reading(**more: torch.Tensor) -> Reading:
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False, False] + [True] * 4])
    return Reading(tokens=torch.arange(18).reshape(3, 6) % 5, mask=mask, decision=torch.tensor([2, 3, 4]), **more)


@pytest.mark.parametrize("where", get_args(Where))
@pytest.mark.parametrize("how", get_args(How))
def test_pooling_equals_a_loop(where: str, how: str) -> None:
    r = reading()
    scores = torch.randn(3, 6)
    for i in range(3):
        d = int(r.decision[i])
        real = [j for j in range(6) if r.mask[i, j]]
        chosen = {
            "decision": [d],
            "prompt": [j for j in real if j <= d],
            "all": real,
            "generated": [j for j in real if j == d or (j > d and j + 1 in real)],
        }[where]
        values = [float(scores[i, j]) for j in chosen]
        wanted = {"max": max(values), "sum": sum(values), "mean": sum(values) / len(values)}[how]
        assert float(pool(scores, r, where, how)[i]) == pytest.approx(wanted, rel=1e-5)
        assert positions(r, where)[i].nonzero()[:, 0].tolist() == chosen


def test_token_scores_equal_a_loop() -> None:
    tuned, base = torch.randn(3, 6, 5), torch.randn(3, 6, 5)
    r = reading(tuned_logits=tuned, base_logits=base)
    kl, ratio = TokenKL().score(r), AnswerLogRatio().score(r)
    for i in range(3):
        for j in range(6):
            p, q = tuned[i, j].softmax(-1), base[i, j].softmax(-1)
            assert float(kl[i, j]) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-5)
            has_next = j < 5 and bool(r.mask[i, j]) and bool(r.mask[i, j + 1])
            wanted = float((p / q).log()[r.tokens[i, j + 1]]) if has_next else 0.0
            assert float(ratio[i, j]) == pytest.approx(wanted, abs=1e-5)


def test_what_cannot_be_fitted_or_read() -> None:
    site, some, none = Site(0), torch.randn(5, 4), torch.zeros(0, 4)
    with pytest.raises(ValueError, match="logits=True"):
        TokenKL().score(reading())
    for directions, clean in ((none, some), (some, none)):
        with pytest.raises(ValueError, match="at least one"):
            DeltaSubspace.fit("x", site, directions, clean)
        with pytest.raises(ValueError, match="at least one"):
            WeightRange.fit(site, directions, clean)
    for labels in (torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)):
        with pytest.raises(ValueError, match="one kind"):
            MeanDifference.fit(site, some, labels)


def test_random_directions_are_the_same_for_a_seed_and_others_for_another() -> None:
    site, clean = Site(0), torch.randn(30, 8)
    one, same, other = (DeltaSubspace.random(site, 2, clean, seed) for seed in (1, 1, 2))
    assert torch.equal(one.directions, same.directions) and not torch.equal(one.directions, other.directions)
    assert one.name == "random directions L0.resid"
