"""Progress of a scan and of the steps after it: rows, also inside a unit, and right when a run goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from molehunt.audit import answering
from molehunt.audit import scan as module
from molehunt.audit.answering import Answering
from molehunt.audit.causal import causal_test
from molehunt.audit.placebo import FEWEST_JUDGED
from molehunt.audit.plan import Plan
from molehunt.audit.result import AuditConfig
from molehunt.audit.run import run_audit
from molehunt.audit.scan import Scan, scan
from molehunt.model.pair import ModelPair
from molehunt.organism.seed_model import seed_path
from molehunt.run.unit import Units
from molehunt.site import Site
from molehunt.traffic.example import Example
from molehunt.traffic.world import benign_prompts
from watched_track import WatchedTrack

PLAN = Plan(
    name="quick", clean_prompts=160, traffic_limit=60, max_new_tokens=3, max_sites=2, directions=2, confirm_rows=6,
    random_controls=2, stress_rows=4, stress_steps=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.load(seed_path("seed-s"), seed_path("seed-s"))


def scanned(pair: ModelPair, rows: list[Example], folder: Path, track: WatchedTrack) -> Scan:
    return scan(
        pair,
        rows,
        sites=(Site(1), Site(3)),
        answering=Answering(max_new_tokens=3),
        units=Units(folder),
        identity={"pair": "a"},
        track=track,
    )


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of 20 rows, read in groups of a few."""
    monkeypatch.setattr(module, "CHUNK", 20)
    monkeypatch.setattr(module, "LOGIT_BYTES", 2**21)


def test_progress_counts_rows_and_moves_inside_a_unit(
    pair: ModelPair, tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    track = WatchedTrack()
    finished: list[tuple[int, int]] = []

    def watched(method: str, of: Any) -> None:
        was = getattr(of, method)

        def instead(*arguments: Any, **named: Any) -> Any:
            units = sum(1 for path in tmp_path.iterdir() if len(path.name) == 64) if tmp_path.exists() else 0
            finished.append((units, track.last.done))
            return was(*arguments, **named)

        monkeypatch.setattr(of, method, instead)

    watched("generate", answering)
    watched("read", pair)
    found = scanned(pair, benign_prompts(50, seed=1), tmp_path, track)
    assert len(found.rows) == 50
    (shown,) = track.calls
    assert (shown.what, shown.total, shown.unit, shown.start) == ("scanning traffic", 50, "rows", 0)
    assert (shown.done, shown.open) == (50, False)
    assert [done for _, done in finished] == sorted(done for _, done in finished)
    for unit, (first, last) in enumerate([(0, 20), (20, 40), (40, 50)]):
        inside = [done for units, done in finished if units == unit]
        assert inside[0] == first and inside[1] == first + int((last - first) / 3 + 1e-6), "answers are a third"
        assert inside[-1] < last and len(set(inside)) >= 3, "several groups are read in a unit"


def test_rows_of_an_earlier_run_are_shown_as_done_from_the_start(
    pair: ModelPair, tmp_path: Path, small_units: None
) -> None:
    rows = benign_prompts(50, seed=1)
    whole = scanned(pair, rows, tmp_path, WatchedTrack())
    track = WatchedTrack()
    scanned(pair, rows, tmp_path, track)
    assert (track.last.start, track.last.done, track.last.total) == (50, 0, 50)

    longer = benign_prompts(90, seed=1)
    assert longer[:40] == rows[:40]
    again = scanned(pair, longer, tmp_path, track)
    assert (track.last.start, track.last.done, track.last.total) == (40, 50, 90)
    assert [row.answer for row in again.rows[:40]] == [row.answer for row in whole.rows[:40]]


def test_a_difference_far_below_the_rounding_of_activations_is_kept(tmp_path: Path) -> None:
    """A fine-tune of a thousandth: activations rounded to bf16 before they are subtracted would differ by rounding alone."""
    changed = ModelPair.load(seed_path("seed-s"), seed_path("seed-s"))
    with changed.tuned_model() as model, torch.no_grad():
        for name, weight in model.named_parameters():
            if "down_proj" in name:
                weight.mul_(1.001)
    rows = benign_prompts(6, seed=2)
    found = scanned(changed, rows, tmp_path, WatchedTrack())
    reading = changed.read(
        [list(row.prompt) for row in found.rows], [list(row.answer) for row in found.rows], sites=found.sites
    )
    for site in found.sites:
        for i, row in enumerate(found.rows):
            wanted = (reading.tuned[site][i, row.decision] - reading.base[site][i, row.decision]).float()
            kept = found.delta("decision", site)[i]
            assert 0 < float(wanted.norm()) < 0.01 * float(found.at("tuned", "decision", site)[i].norm())
            assert float((kept - wanted).norm() / wanted.norm()) < 0.01


def test_a_damaged_unit_and_equal_units_leave_the_count_right(
    pair: ModelPair, tmp_path: Path, small_units: None
) -> None:
    rows = benign_prompts(20, seed=1)
    track = WatchedTrack()
    assert len(scanned(pair, rows * 2, tmp_path, track).rows) == 40
    assert (track.last.start, track.last.done) == (0, 40)
    (unit,) = (path for path in tmp_path.iterdir() if len(path.name) == 64)
    (unit / "value.safetensors").write_bytes(b"broken")
    assert len(scanned(pair, [*rows, *benign_prompts(20, seed=5)], tmp_path, track).rows) == 40
    assert (track.last.start, track.last.done, track.last.total) == (20, 20, 40)


def test_the_causal_test_counts_every_row_that_it_runs(pair: ModelPair, tmp_path: Path) -> None:
    rows = benign_prompts(40, seed=3)
    track = WatchedTrack()
    found = causal_test(
        pair,
        scanned(pair, rows, tmp_path, WatchedTrack()),
        list(range(10)),
        list(range(10, 40)),
        1.0,
        PLAN,
        seed=0,
        track=track,
    )
    assert all((call.done, call.open) == (call.total, False) for call in track.calls)
    by_name = {call.what: call.total for call in track.calls if call.unit == "rows"}
    judged, chosen, clean = len(found.rows), 10 - len(found.rows), found.clean_unchanged.n
    assert by_name["taking the finding away"] == chosen + 2 * judged
    assert by_name["placebo edits"] == PLAN.random_controls * judged
    assert found.control.n == judged == FEWEST_JUDGED, "of ten rows two choose, so that eight judge"
    assert by_name["one block after the other"] == 2 * len(found.by_site) * judged
    assert by_name["clean prompts with the edit"] == clean
    assert by_name["putting the finding in"] == 6 * clean
    assert by_name["reading clean rows"] > 0


def test_an_audit_shows_each_of_its_steps(tmp_path: Path) -> None:
    track = WatchedTrack()
    folders = seed_path("seed-s"), seed_path("seed-s")
    loaded: list[list[str]] = []

    def load() -> ModelPair:
        loaded.append([call.what for call in track.calls])
        return ModelPair.load(*folders)

    run_audit(folders, load, None, AuditConfig(plan=PLAN), out=tmp_path / "run", track=track)
    assert not any(call.open for call in track.calls)
    shown = {call.what: (call.total, call.unit) for call in track.calls}
    assert shown["hashing both folders"] == (None, None)
    assert shown["scanning clean prompts"] == shown["scanning traffic"] == (160, "rows")
    (before,) = loaded  # a broken folder is refused before a model is loaded
    assert "comparing weights" in before and "scanning clean prompts" not in before
