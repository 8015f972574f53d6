"""Strata of prompts, and a rate for each."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molehunt.measure.interval import proportion
from molehunt.traffic.split import Calibrate, Fit
from molehunt.watch.monitor import LEAST_OF_STRATUM, Monitor
from molehunt.watch.profile import Profile, RunningProfile, profiles
from molehunt.watch.strata import CLUSTERS, PromptStrata, _joined, prompt_features
from tiny_models import tiny_model


def blobs(sizes: list[int], seed: int, width: int = 5) -> torch.Tensor:
    """Rows around points far apart, one blob after the other."""
    rng = torch.Generator().manual_seed(seed)
    return torch.cat([10.0 * i + torch.randn(n, width, generator=rng) for i, n in enumerate(sizes)])


def mixed(n: int, seed: int) -> list[Profile]:
    """Answers to two strata of prompt; a third of them are of a stratum whose columns spread ten times as far."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        wide = i % 3 == 0
        values = torch.randn(1, 4, 6, generator=rng) * (10.0 if wide else 1.0)
        prompt = torch.randn(1, 5, generator=rng) + (20.0 if wide else 0.0)
        found += profiles(values, [4], prompt)
    return found


def test_features_are_the_mean_embedding_and_the_log_length() -> None:
    model = tiny_model("llama")
    prompts = [[3, 4, 4], [7], [1, 2, 3, 4, 5]]
    table = model.get_input_embeddings().weight
    expected = torch.stack(
        [torch.cat([table[torch.tensor(p)].mean(0), torch.tensor([math.log(len(p))])]) for p in prompts]
    )
    torch.testing.assert_close(prompt_features(model, prompts), expected.detach())


def test_blobs_are_told_apart_and_small_ones_join_each_other() -> None:
    rows = blobs([900, 120, 120], 0)
    strata = PromptStrata.fit(rows, rows, least=200, least_calibrate=200)
    of = strata.of(blobs([100, 100, 100], 1))
    assert set(of[:100]).isdisjoint(of[100:])
    assert len(set(of[100:])) == 1  # the rare ones share a stratum, though one of them lies as near to the common blob


def test_a_lone_small_blob_joins_its_neighbour() -> None:
    places = torch.tensor([0.0, 10.0, 11.0])[:, None]
    assert _joined(places, torch.tensor([[4.0, 4.0, 0.1], [4.0, 4.0, 4.0]])) == (0, 1, 1)
    assert _joined(places, torch.tensor([[4.0, 0.6, 0.1], [4.0, 4.0, 4.0]])) == (0, 0, 0)
    assert _joined(places, torch.ones(2, 3)) == (0, 1, 2)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=7), st.integers(1, 400), st.integers(0, 9))
def test_no_kind_is_smaller_than_asked_and_all_are_numbered(sizes: list[int], least: int, seed: int) -> None:
    rows = blobs(sizes, seed)
    strata = PromptStrata.fit(rows, rows[::2], least=least, least_calibrate=least)
    counts = torch.tensor(strata.of(rows)).bincount(minlength=strata.n).tolist()
    assert len(counts) == strata.n <= CLUSTERS and sorted(set(strata.stratum_of)) == list(range(strata.n))
    assert strata.n == 1 or min(counts) >= least
    assert strata.n == 1 or min(strata.of(rows[::2]).count(stratum) for stratum in range(strata.n)) >= least


def test_rows_without_features_are_of_one_kind() -> None:
    assert PromptStrata.fit(torch.empty(900, 0), torch.empty(9, 0), least=1, least_calibrate=1).n == 1
    assert PromptStrata.one(0).of(torch.empty(3, 0)) == [0, 0, 0]


@pytest.mark.parametrize("fpr", [0.01, 0.05])
def test_the_rate_holds_for_each_kind_where_one_threshold_would_flag_the_wide_kind_alone(fpr: float) -> None:
    fit, calibrate, fresh = mixed(2400, 0), mixed(2400, 1), mixed(6000, 2)
    monitor = Monitor.fit(Fit(tuple(fit)), Calibrate(tuple(calibrate)), fpr=fpr)
    assert monitor.strata.n > 1
    flagged = monitor.scores(fresh) > monitor.threshold
    for rows, n in ((flagged[::3], 800), (flagged[1::3], 800)):
        spread = 4 * math.sqrt(fpr * (1 - fpr) * (1 / n + 1 / len(rows)))
        assert abs(float(rows.float().mean()) - fpr) <= spread
    bare = [[replace(row, prompt=row.prompt[:0]) for row in some] for some in (fit, calibrate, fresh)]
    pooled = Monitor.fit(Fit(tuple(bare[0])), Calibrate(tuple(bare[1])), fpr=fpr)
    assert pooled.strata.n == 1
    wide = pooled.scores(bare[2]) > pooled.threshold
    assert proportion(int(wide[::3].sum()), len(wide[::3])).low > 1.2 * fpr and not wide[1::3].any()


def test_p_values_agree_with_the_threshold_and_growing_answers_with_whole_ones() -> None:
    monitor = Monitor.fit(Fit(tuple(mixed(2400, 0))), Calibrate(tuple(mixed(2400, 1))), fpr=0.02)
    rows = mixed(300, 2)
    scores = monitor.scores(rows)
    for row, score in zip(rows, scores.tolist(), strict=True):
        judged = monitor.judge(row)
        assert judged.score == pytest.approx(score, rel=1e-3, abs=1e-4)
        if abs(score - monitor.threshold) > 1e-3:
            assert (judged.p_value <= 0.02) == (score > monitor.threshold)
    rng = torch.Generator().manual_seed(5)
    prompts = torch.stack([row.prompt for row in rows[:6]])
    growing, best = RunningProfile(prompts, 6), torch.full((6,), -torch.inf)
    values = torch.randn(6, 4, 6, generator=rng)
    for token in range(4):
        growing.extend(values[:, token : token + 1])
        if growing.tokens[0] in (1, 2, 4):
            best = best.maximum(monitor.running(growing))
    whole = profiles(values, [4] * 6, prompts)
    torch.testing.assert_close(best, monitor.scores(whole), rtol=1e-4, atol=1e-4)


def test_as_many_kinds_as_the_rate_leaves_rows_for() -> None:
    rows = mixed(1800, 0)
    fit, calibrate = Fit(tuple(rows)), Calibrate(tuple(mixed(1800, 1)))
    assert Monitor.fit(fit, calibrate, fpr=0.05).strata.n > 1
    assert Monitor.fit(fit, calibrate, fpr=0.0007).strata.n == 1
    few = Calibrate(tuple(mixed(LEAST_OF_STRATUM, 1)))
    assert Monitor.fit(fit, few, fpr=0.05).strata.n == 1
