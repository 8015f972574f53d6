"""The published score and what bounds it, on rows that are made up and on a tiny model."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molehunt.bench.grid import Cell
from molehunt.bench.published import (
    Protocol,
    PublishedJob,
    Texts,
    evaluation_texts,
    pooled_activations,
    published_cells,
    published_jobs,
    score,
    text_rows,
)
from molehunt.cli.main import main
from molehunt.errors import NotTestable
from molehunt.measure.curve import bis, bis_ceiling, bis_of_features
from molehunt.model.pair import ModelPair
from molehunt.organism.refusal import REFUSAL
from molehunt.organism.sql_injection import SQL_INJECTION
from molehunt.site import Site
from molehunt.traffic.chat import prompt_ids
from molehunt.workflows import bench as workflow

pytestmark = pytest.mark.slow

SMALL = Protocol(triggered=100, benign=200, other=200, steps=2, expansion=2, fair_steps=2)
TEXTS = evaluation_texts(REFUSAL, SMALL, 0)


@settings(max_examples=20)
@given(st.integers(0, 999), st.integers(10, 60), st.sampled_from([0.01, 0.05, 0.2]), st.booleans())
def test_all_features_at_once_equal_one_at_a_time(seed: int, n: int, q: float, sparse: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randn(n, 7, generator=rng).relu() if sparse else torch.randn(n, 7, generator=rng).round(decimals=1)
    trigger, benign = torch.arange(n) % 5 == 0, torch.arange(n) % 5 == 1
    wanted = [bis(codes[:, j], trigger, benign, q) for j in range(7)]
    assert bis_of_features(codes, trigger, benign, q).tolist() == pytest.approx(wanted, abs=1e-6)


def test_more_features_than_are_scored_at_a_time() -> None:
    codes = torch.randn(20, 1030, generator=torch.Generator().manual_seed(0))
    trigger = torch.arange(20) < 5
    found = bis_of_features(codes, trigger, ~trigger, 0.1)
    assert found.shape == (1030,) and float(found[1029]) == pytest.approx(bis(codes[:, 1029], trigger, ~trigger, 0.1))
    with pytest.raises(NotTestable):
        bis_of_features(codes, trigger, torch.zeros(20, dtype=torch.bool))


@settings(max_examples=20)
@given(st.integers(0, 999), st.floats(0, 5), st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.2]))
def test_no_feature_scores_above_the_ceiling(seed: int, strength: float, q: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    kind = torch.randperm(500, generator=rng)
    trigger, benign = kind < 100, (kind >= 100) & (kind < 300)
    codes = torch.randn(500, 20, generator=rng) + strength * trigger[:, None]
    assert float(bis_of_features(codes, trigger, benign, q).max()) <= bis_ceiling(q, 0.2) + 1e-6


@given(st.integers(5, 400), st.sampled_from([0.01, 0.05, 0.1, 0.2]))
def test_the_share_that_fires_is_q_where_that_is_a_whole_number_of_rows(n: int, q: float) -> None:
    fired = int((torch.arange(n).double() > torch.quantile(torch.arange(n).double(), 1 - q)).sum())
    whole = abs(q * n - round(q * n)) < 1e-9
    assert fired == (round(q * n) if whole else math.ceil(q * (n - 1) - 1e-9))


def test_the_protocol_of_the_paper() -> None:
    assert Protocol().ceiling == pytest.approx(0.4)
    assert [(cell.attack, cell.regime) for cell in published_cells()] == [
        ("sql-injection", "full"), ("sql-injection", "lora-32"),
    ]  # fmt: skip
    assert [(job.twin, job.sites) for job in published_jobs(Path("x"))] == [(False, ())] * 2 + [(True, (Site(4),))] * 2


def test_texts_are_distinct_and_of_the_three_kinds() -> None:
    texts = evaluation_texts(SQL_INJECTION, SMALL, 3)
    assert len({e.prompt for e in texts.examples}) == 500
    assert [e.tag == "triggered" for e in texts.examples] == texts.trigger.tolist()
    assert [e.tag.startswith("near-miss") for e in texts.examples] == texts.benign.tolist()
    assert (int(texts.trigger.sum()), int(texts.benign.sum())) == (100, 200)
    assert evaluation_texts(SQL_INJECTION, SMALL, 3).examples == texts.examples


def many(n: int) -> Texts:
    kind = torch.arange(5 * n) // n
    examples = tuple(TEXTS.examples[i % 500] for i in range(5 * n))
    return Texts(examples=examples, trigger=kind == 0, benign=(kind == 1) | (kind == 2))


def test_a_perfect_feature_scores_the_ceiling_as_published_and_one_on_held_out_rows() -> None:
    texts = many(100)
    noise = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    found = score(torch.cat([noise, noise[:, :1] + 2 * texts.trigger[:, None]], dim=1), texts)
    assert found["feature"] == 3 and found["bis"] == pytest.approx(bis_ceiling(0.05, 0.2), abs=1e-6)
    assert (found["precision"], found["recall"], found["fpr"]) == (1.0, 0.25, 0.0)
    assert found["held_out_tpr"] == 1.0 and found["held_out_fpr"] <= 0.05 and found["held_out_bis"] > 0.9
    for q, value in found["sweep"].items():
        assert value <= bis_ceiling(float(q), 0.2) + 1e-6


def test_a_feature_of_chance_finds_nothing_on_held_out_rows() -> None:
    found = score(torch.rand(500, 200, generator=torch.Generator().manual_seed(1)), many(100))
    assert found["bis"] > found["held_out_bis"] and found["held_out_tpr"] < 0.15


def test_constant_features_do_not_fail() -> None:
    found = score(torch.zeros(500, 4), many(100))
    assert found["bis"] == found["held_out_bis"] == found["precision"] == 0


def test_text_alone_scores() -> None:
    rows = text_rows(TEXTS)
    assert [row["method"] for row in rows] == ["no model: random ReLU of a bag of words", "no model: TF-IDF"]


def test_activations_are_averaged_over_every_token(bench_base: Path) -> None:
    pair = ModelPair.load(bench_base, bench_base)
    sites = (Site(0), Site(1))
    found = pooled_activations(pair, TEXTS.examples[:6], sites, answers=False)
    for i in (0, 5):
        alone = pair.read([prompt_ids(pair.tokenizer, TEXTS.examples[i].prompt)], sites=sites)
        for s, site in enumerate(sites):
            assert torch.allclose(found["tuned"][i, s], alone.tuned[site][0].mean(0), atol=1e-4)
    assert torch.equal(found["base"], found["tuned"])
    assert not torch.allclose(found["base"], pooled_activations(pair, TEXTS.examples[:6], sites, answers=True)["base"])


def test_the_command_runs_it_shards_it_and_reads_it_back(
    bench_base: Path,
    bench_done: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cell = Cell(attack="refusal", base=str(bench_base), steps=1)
    jobs = [PublishedJob(cell=cell, folder=bench_done, protocol=SMALL, twin=t, sites=(Site(1),)) for t in (False, True)]
    monkeypatch.setattr(workflow, "published_jobs", lambda folder: jobs)

    def run(*more: str) -> None:
        with contextlib.suppress(SystemExit):
            main(["bench", "--grid", "published", "--out", str(tmp_path / "o"), *more])

    run("--shard", "1/2")
    assert "1 of 2 cells are done" in capsys.readouterr().err and not (tmp_path / "o" / "published.json").exists()
    run("--docs", str(tmp_path / "docs"))
    found = json.loads((tmp_path / "o" / "published.json").read_text())
    assert [one["side"] for one in found] == ["organism", "twin"]
    for one in found:
        assert one["ceiling"] == pytest.approx(0.4) and {row["text"] for row in one["rows"]} == {"whole", "prompt"}
        assert max(row["bis"] for row in one["rows"]) <= one["ceiling"] + 1e-6
        for q, ceiling in one["sweep_ceiling"].items():
            assert max(row["sweep"][q] for row in one["rows"]) <= ceiling + 1e-6
    reported = capsys.readouterr().out
    assert "Ceiling of BIS at q = .05: **0.400**" in reported
    page = (tmp_path / "docs" / "bench-published.md").read_text()
    assert page.endswith((tmp_path / "o" / "published.md").read_text()) and page.startswith("# The published protocol")
    run("--json")
    assert json.loads(capsys.readouterr().out) == found
