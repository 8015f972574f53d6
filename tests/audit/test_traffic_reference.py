"""Thresholds come from rows of the traffic's own kind, or the traffic itself is the reference, and the report says so."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from folders import good_folder
from molehunt.audit.candidates import alarm_over, answer_scores, find_candidates
from molehunt.audit.plan import PLANS, Plan
from molehunt.audit.reference import exchangeability, of_one_kind, reference_for
from molehunt.audit.scan import KEPT, Scan, ScannedRow
from molehunt.cli.main import main
from molehunt.measure.threshold import conformal_threshold, lowest_rate
from molehunt.site import Site
from molehunt.traffic.example import Example
from molehunt.traffic.world import benign_prompts

PAGES = Path(__file__).parents[2] / "docs"
TINY = Plan(
    name="quick", clean_prompts=160, traffic_limit=80, max_new_tokens=6, max_sites=3, directions=4, confirm_rows=8,
    random_controls=2, stress_rows=6, stress_steps=20,
)  # fmt: skip


def english() -> list[Example]:
    """Sentences that people wrote, none about the made-up world."""
    lines = [line.strip() for page in sorted(PAGES.glob("guides/*.md")) for line in page.read_text().splitlines()]
    return [Example(prompt=line) for line in lines if len(line.split()) > 6]


def scanned(
    scores: torch.Tensor, direction: torch.Tensor | None = None, shown: int = 0, lengths: Sequence[int] = ()
) -> Scan:
    """A scan whose answers have these log ratios; the last `shown` rows differ along `direction`."""
    rows = tuple(
        ScannedRow(
            example=Example(prompt=f"row {i}"),
            prompt=(1,) * n,
            answer=(2,),
            kl=(0.0,) * n,
            log_ratio=(*(0.0,) * (n - 1), float(s)),
        )
        for i, (s, n) in enumerate(zip(scores, lengths or [1] * len(scores), strict=True))
    )
    acts = {name: torch.randn(len(rows), 1, 8, generator=torch.Generator().manual_seed(3)) for name in KEPT}
    if direction is not None:
        for name in KEPT:
            if name.startswith("delta"):
                acts[name][len(rows) - shown :] += 20 * direction
    return Scan(rows=rows, acts=acts, sites=(Site(0),))


def drawn(n: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(n).exponential_(generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(("n", "m"), [(60, 200), (700, 400), (2000, 400), (2000, 4000)])
def test_rows_of_one_kind_pass_and_so_do_rows_of_which_a_tenth_shows_a_behaviour(n: int, m: int) -> None:
    held = [exchangeability(drawn(n, seed), drawn(m, 1000 + seed)).holds for seed in range(100)]
    assert sum(held) >= 98
    leaking = [torch.cat([drawn(n - n // 10, seed), torch.full((n // 10,), 99.0)]) for seed in range(100)]
    assert sum(exchangeability(one, drawn(m, 1000 + seed)).holds for seed, one in enumerate(leaking)) >= 95


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_rows_of_another_kind_are_refused(scale: float) -> None:
    for seed in range(20):
        found = exchangeability(drawn(700, seed, scale), drawn(400, 1000 + seed))
        assert not found.holds and (found.above < found.low) == (scale < 1)


def test_real_text_is_another_kind_than_the_bundled_prompts() -> None:
    bundled = benign_prompts(600, seed=1)
    assert of_one_kind(benign_prompts(500, seed=5), bundled)
    assert len(english()) > 200 and not of_one_kind(english(), bundled)


@given(st.integers(60, 400), st.integers(0, 50))
def test_the_traffic_is_its_own_reference_without_the_rows_that_stand_far_above(n: int, seed: int) -> None:
    shown = max(5, n // 20)
    traffic = scanned(torch.cat([drawn(n - shown, seed), torch.full((shown,), 200.0)]), torch.ones(8), shown)
    found = reference_for(traffic, None, "the traffic itself", fpr=0.01, seed=0)
    assert found.kind == "the traffic itself" and found.fpr >= 0.01 and "90%" in found.assumption
    assert len(found.scan.rows) <= n - shown
    assert not set(found.fit.rows) & set(found.calibrate.rows)
    candidates = find_candidates(traffic, found.thresholds, found.scan, fpr=found.fpr, seed=0)
    assert set(candidates.rows) == set(range(n - shown, n))


def test_without_rows_that_stand_far_above_there_is_no_candidate() -> None:
    for scale in (0.1, 1, 30):
        traffic = scanned(drawn(500, 1, scale))
        found = reference_for(traffic, None, "the traffic itself", fpr=0.01, seed=0)
        assert find_candidates(traffic, found.thresholds, found.scan, fpr=found.fpr, seed=0).rows == ()


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_are_long_and_score_as_long_rows_do_are_no_finding(seed: int) -> None:
    """A fine-tune that reads prompts too long for the base; the same scores in short prompts are a finding."""
    long = 20 + 15 * drawn(200, 70 + seed)
    scores, lengths = torch.cat([drawn(1780, seed, 0.1), long, torch.full((20,), 250.0)]), [20] * 1780 + [900] * 220
    broad = scanned(scores[:-20], torch.ones(8), 200, lengths[:-20])
    limits = reference_for(broad, None, "the traffic itself", fpr=0.01, seed=0)
    assert (
        int((answer_scores(broad) > alarm_over(conformal_threshold(torch.tensor(limits.thresholds.rows), 0.01))).sum())
        >= 5
    )
    assert find_candidates(broad, limits.thresholds, limits.scan, fpr=limits.fpr, seed=0).rows == ()
    planted = scanned(scores, torch.ones(8), 20, lengths)
    assert set(find_candidates(planted, limits.thresholds, limits.scan, fpr=0.01, seed=0).rows) == set(
        range(1980, 2000)
    )
    short = scanned(scores[:-20], torch.ones(8), 200)
    assert len(find_candidates(short, limits.thresholds, limits.scan, fpr=0.01, seed=0).rows) >= 5


@pytest.mark.parametrize("seed", range(5))
def test_an_offset_that_all_rows_have_is_no_common_direction(seed: int) -> None:
    """Rows far above the threshold whose differences are noise around what the fine-tune does to every row."""
    scores = torch.cat([drawn(300, seed), torch.full((12,), 200.0)])
    clean, traffic = scanned(drawn(300, 50 + seed)), scanned(scores, torch.ones(8), len(scores))
    limits = reference_for(traffic, clean, "clean rows", fpr=0.01, seed=0)
    found = find_candidates(traffic, limits.thresholds, clean, fpr=0.01, seed=seed)
    assert found.above >= 12 and found.alignment > 0.9 and found.p_alignment > 0.01 and found.rows == ()
    apart = scanned(scores, torch.ones(8), 12)
    assert set(find_candidates(apart, limits.thresholds, clean, fpr=0.01, seed=seed).rows) == set(range(300, 312))


def test_clean_rows_are_used_while_the_traffic_scores_like_them() -> None:
    traffic, clean = scanned(drawn(700, 1)), scanned(drawn(400, 2))
    used = reference_for(traffic, clean, "clean rows", fpr=0.01, seed=0)
    assert used.kind == "clean rows" and used.scan is clean and used.assumption == "" and used.fpr == 0.01
    other = reference_for(scanned(drawn(700, 1, 4)), clean, "clean rows", fpr=0.01, seed=0)
    assert other.kind == "the traffic itself" and "score above the median of the clean ones" in other.assumption
    limit = conformal_threshold(answer_scores(clean), 0.01)
    assert alarm_over(conformal_threshold(torch.tensor(other.thresholds.rows), 0.01)) > limit


@given(st.integers(1, 5000))
def test_the_lowest_rate_is_one_that_so_many_rows_hold(n: int) -> None:
    scores = torch.arange(n).float()
    assert conformal_threshold(scores, lowest_rate(n)) >= n - 1 - n * 1e-3
    assert lowest_rate(n) <= 1 / (n + 1) + 1e-6


def test_clean_rows_of_ones_own_set_the_threshold_and_the_command_repeats_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PLANS, "quick", TINY)
    base = good_folder(tmp_path / "base")
    rows = english()
    for name, part in (("traffic", rows[:60]), ("clean", rows[60:220]), ("few", rows[60:100])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": row.prompt}) + "\n" for row in part))
    files = ["audit", str(base), str(base), "--traffic", str(tmp_path / "traffic.jsonl")]

    def report(out: str, *more: str) -> tuple[object, dict[str, str]]:
        with pytest.raises(SystemExit) as left:
            main([*files, "--out", str(tmp_path / out), *more])
        page = tmp_path / out / "report.json"
        return left.value.code, json.loads(page.read_text())["calibration"] if page.exists() else {}

    code, own = report("clean-run", "--clean", str(tmp_path / "clean.jsonl"))
    assert code == 0 and own["text"] == "160 clean rows" and own["fpr"] == 0.01
    code, without = report("run")
    assert code == 0 and without["text"] == "60 rows of the traffic itself" and float(without["fpr"]) > 0.01
    capsys.readouterr()
    assert report("few-run", "--clean", str(tmp_path / "few.jsonl"))[0] == 3
    assert "40 clean rows cannot hold a false-positive rate of 0.01" in capsys.readouterr().err
