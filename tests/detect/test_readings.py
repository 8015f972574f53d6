"""What is kept of two models' passes equals a slow pass, row by row."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench_samples import tiny_base
from molehunt.contracts import Reading
from molehunt.detect import readings as module
from molehunt.detect.delta_norm import DeltaNorm
from molehunt.detect.mean_difference import MeanDifference
from molehunt.detect.pooling import How, Where
from molehunt.detect.readings import Readings, read_rows
from molehunt.detect.reads import Reads
from molehunt.detect.recipe import logit_detectors
from molehunt.model.pair import ModelPair
from molehunt.organism.poison import clean_example
from molehunt.organism.refusal import REFUSAL
from molehunt.site import Site
from molehunt.traffic.example import Example
from watched_track import WatchedTrack

SITE, D = Site(0), 5
LOGIT_DETECTORS = logit_detectors()
NORM = DeltaNorm(SITE)
SHIFT = MeanDifference(SITE, torch.zeros(D), torch.arange(D) / D - 0.3)


@dataclass(frozen=True, eq=False)
class Row:
    """One row alone, without padding."""

    decision: int
    tuned: torch.Tensor
    base: torch.Tensor
    logit_score: torch.Tensor


def drawn(seed: int, n: int) -> list[Row]:
    rng = torch.Generator().manual_seed(seed)

    def row() -> Row:
        prompt, answer = (int(torch.randint(1, 7, (), generator=rng)) for _ in range(2))
        tuned, base = (torch.randn(prompt + answer, D, generator=rng).bfloat16() for _ in range(2))
        return Row(prompt - 1, tuned, base, torch.randn(prompt + answer, generator=rng))

    return [row() for _ in range(n)]


def kept(rows: list[Row], order: list[int], size: int, more: int) -> Readings:
    """Rows in batches of `size` in any order; padding, `more` than needed, holds large nonsense."""
    batches: list[Reading] = []
    scores: list[torch.Tensor] = []
    for start in range(0, len(rows), size):
        group = [rows[i] for i in order[start : start + size]]
        width = max(len(r.tuned) for r in group) + more
        tuned, base = torch.full((2, len(group), width, D), 1e4).bfloat16()
        score, mask = torch.full((len(group), width), 1e4), torch.zeros(len(group), width, dtype=torch.bool)
        for i, r in enumerate(group):
            n = len(r.tuned)
            tuned[i, :n], base[i, :n], score[i, :n], mask[i, :n] = r.tuned, r.base, r.logit_score, True
        batches.append(
            Reading(
                tokens=torch.zeros(mask.shape, dtype=torch.long), mask=mask, tuned={SITE: tuned}, base={SITE: base},
                decision=torch.tensor([r.decision for r in group]),
            )
        )  # fmt: skip
        scores.append(score)
    return Readings(
        examples=tuple(Example(prompt=str(i)) for i in range(len(rows))),
        prompts=tuple((i,) for i in range(len(rows))), answers=tuple((i,) for i in range(len(rows))),
        batches=tuple(batches), scores={"token KL": tuple(scores)}, order=torch.tensor(order),
    )  # fmt: skip


def span(row: Row, where: str) -> range:
    """Positions by their definition: a generated token is put out one position earlier."""
    n = len(row.tuned)
    return {
        "decision": range(row.decision, row.decision + 1),
        "prompt": range(row.decision + 1),
        "all": range(n),
        "generated": range(row.decision, n - 1),
    }[where]


def slow(row: Row, detector: object, where: str, how: str) -> float:
    tuned, base = row.tuned.float(), row.base.float()
    per_token = {
        NORM: [float((t - b).norm() / b.norm()) for t, b in zip(tuned, base, strict=True)],
        SHIFT: [float(t @ SHIFT.direction) for t in tuned],
    }.get(detector, row.logit_score.tolist())  # pyright: ignore[reportArgumentType, reportCallIssue]
    values = [per_token[i] for i in span(row, where)]
    return max(values) if how == "max" else sum(values) / (len(values) if how == "mean" else 1)


BATCHED = st.tuples(st.integers(0, 999), st.integers(1, 9), st.integers(1, 9), st.integers(0, 6), st.randoms())


@settings(max_examples=12)
@given(BATCHED)
def test_pooled_scores_and_activations_equal_a_slow_pass_however_rows_are_batched(batched) -> None:
    seed, n, size, more, random = batched
    rows, order = drawn(seed, n), random.sample(range(n), n)
    found = kept(rows, order, size, more)
    for detector in (NORM, SHIFT, LOGIT_DETECTORS[0]):
        for where in get_args(Where):
            for how in get_args(How):
                wanted = torch.tensor([slow(row, detector, where, how) for row in rows])
                assert torch.allclose(found.pooled(detector, where, how), wanted, atol=1e-4), (where, how)
    for reads in get_args(Reads):
        for where in get_args(Where):
            acts = [
                {"tuned": r.tuned.float(), "base": r.base.float(), "difference": r.tuned.float() - r.base.float()}
                for r in rows
            ]
            wanted = torch.stack([a[reads][list(span(r, where))].mean(0) for a, r in zip(acts, rows, strict=True)])
            assert torch.allclose(found.acts(SITE, reads, where), wanted, atol=1e-4)


@settings(max_examples=12)
@given(BATCHED)
def test_tokens_leave_out_the_first_of_each_row_and_all_padding(batched) -> None:
    seed, n, size, more, random = batched
    rows, order = drawn(seed, n), random.sample(range(n), n)
    found = kept(rows, order, size, more).tokens(SITE)
    assert torch.equal(found.tuned, torch.cat([rows[i].tuned[1:] for i in order]))
    assert torch.equal(found.base, torch.cat([rows[i].base[1:] for i in order]))


@settings(max_examples=12)
@given(BATCHED, st.integers(1, 9))
def test_the_first_rows_alone(batched, few: int) -> None:
    seed, n, size, more, random = batched
    few = min(few, n)
    rows = drawn(seed, n)
    found = kept(rows, random.sample(range(n), n), size, more).first(few)
    assert len(found) == few and found.prompts == tuple((i,) for i in range(few)) == found.answers
    for detector in (NORM, LOGIT_DETECTORS[0]):
        wanted = torch.tensor([slow(row, detector, "generated", "mean") for row in rows[:few]])
        assert torch.allclose(found.pooled(detector, "generated", "mean"), wanted, atol=1e-4)


def test_read_rows_reads_each_row_as_if_it_were_alone(
    bench_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from random import Random

    monkeypatch.setattr(module, "BATCH", 5)
    pair = ModelPair.load(bench_base, tiny_base(tmp_path / "tuned"))
    with pair.tuned_model() as model, torch.no_grad():
        rng = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    examples = [clean_example(REFUSAL, Random(i)) for i in range(12)]
    sites = (Site(0), Site(1))
    track = WatchedTrack()
    together = read_rows(pair, examples, sites=sites, max_new_tokens=6, track=track, what="the twin")
    (shown,) = track.calls
    assert (shown.what, shown.total, shown.done, shown.unit) == ("the twin", 12, 12, "rows")
    assert len(together.batches) == 3 and together.examples == tuple(examples)
    for i in (0, 7, 11):
        alone = read_rows(pair, [examples[i]], sites=sites, max_new_tokens=6)
        assert (alone.prompts[0], alone.answers[0]) == (together.prompts[i], together.answers[i])
        for detector in LOGIT_DETECTORS:
            one, among = (r.pooled(detector, "generated", "mean") for r in (alone, together))
            assert torch.allclose(one[0], among[i], atol=1e-4)
        one, among = (r.acts(Site(1), "tuned", "all") for r in (alone, together))
        assert torch.allclose(one[0], among[i], rtol=0.02, atol=0.02)
