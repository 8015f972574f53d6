"""Cells as units: addressed by all that they depend on, made once, the same in any folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_samples import grid, seeds
from molehunt.bench import run as module
from molehunt.bench.cell import on_track
from molehunt.bench.grid import Cell, load_grid
from molehunt.bench.rows import Counts
from molehunt.bench.run import Job, cell_key, finished_cell, jobs, plant_cell, planted_cell, run_cell
from molehunt.organism.manifest import Organism
from molehunt.organism.plant import PlantConfig


@pytest.fixture
def done(bench_base: Path, bench_done: Path) -> list[Job]:
    return jobs(grid(bench_base, parts=seeds(bench_base, 2)), bench_done)


def test_a_finished_cell_is_read_and_not_measured_again(done: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "_measure", never)
    monkeypatch.setattr("molehunt.organism.manifest.plant", never)
    threads = torch.get_num_threads()
    reported = [run_cell(job) for job in done]
    assert torch.get_num_threads() == threads
    assert [one["cell"]["name"] for one in reported] == [job.cell.name for job in done]
    for one in reported:
        assert (done[0].folder / one["unit"] / "value.json").is_file()


def test_a_cell_holds_every_method_on_its_tracks(done: list[Job]) -> None:
    reported = run_cell(done[0])
    for track in ("R0", "R1", "R2"):
        wanted = {recipe.name for recipe, _ in on_track(track)}
        found = {row["method"] for row in reported["rows"] if row["track"] == track and row["where"] != "text"}
        assert found == wanted, track
    assert {row["rate"] for row in reported["rows"] if row["track"] == "R1"} == {0.05}
    assert all(row["twin"] is not None and row["clean"] is not None for row in reported["rows"])
    assert "as many random directions" in {row["method"] for row in reported["causal"]}
    json.dumps(reported, allow_nan=False)


def test_the_address_changes_with_each_setting_and_not_with_the_folder(done: list[Job], tmp_path: Path) -> None:
    job, other = done
    organism = plant_cell(job.cell, job.folder)
    changed = [
        job, other, replace(job, counts=Counts()), replace(job, rates=(0.1,)), replace(job, causal_rows=9),
        replace(job, dictionaries=load_grid("core").dictionaries), replace(job, cell=replace(job.cell, poison=0.1)),
    ]  # fmt: skip
    assert len({cell_key(one, organism) for one in changed}) == len(changed)
    assert cell_key(replace(job, folder=tmp_path), organism) == cell_key(job, organism)
    assert cell_key(job, organism) != cell_key(job, plant_cell(other.cell, other.folder))


def test_jobs_follow_the_grid(done: list[Job], bench_base: Path) -> None:
    assert [job.cell for job in done] == grid(bench_base, parts=seeds(bench_base, 2)).cells()


def test_tables_of_what_is_finished_run_nothing(bench_done: Path, tmp_path: Path) -> None:
    grid = load_grid(str(bench_done / "grid.yaml"))
    found = [finished_cell(job) for job in jobs(grid, bench_done)]
    assert [reported["cell"]["name"] for reported in found if reported] == [cell.name for cell in grid.cells()]
    assert [finished_cell(job) for job in jobs(grid, tmp_path)] == [None, None]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("shown", "trainings"), [([0.2, 0.95], 2), ([0.9], 1), ([0.1, 0.3], 2), ([None], 1)])
def test_a_behaviour_that_did_not_take_is_trained_once_more_for_twice_as_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shown: list[float | None], trainings: int
) -> None:
    requested: list[PlantConfig] = []

    def planted(recipe, base, root, config, *, base_label, track):
        rate = shown[len(requested)]
        requested.append(config)
        reported = {"organism": {"shown": {} if rate is None else {"triggered": {"estimate": rate}}}}
        root.mkdir(parents=True)
        (root / "manifest.json").write_text(json.dumps(reported))
        return Organism(root=root, manifest=reported)

    monkeypatch.setattr(module, "make_organism", planted)
    cell = Cell(attack="refusal")
    assert planted_cell(cell, tmp_path) is None
    found = plant_cell(cell, tmp_path)
    assert len(requested) == trainings
    assert requested[-1].steps_of(cell.recipe()) == trainings * requested[0].steps_of(cell.recipe())
    again = planted_cell(cell, tmp_path)
    assert again is not None and again.root == found.root
    assert len({config.seed for config in requested}) == 1


def test_a_number_of_steps_that_was_asked_for_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reported = {"organism": {"shown": {"triggered": {"estimate": 0.0}}}}
    steps: list[int | None] = []

    def planted(recipe, base, root, config, *, base_label, track):
        steps.append(config.steps)
        return Organism(root=root, manifest=reported)

    monkeypatch.setattr(module, "make_organism", planted)
    plant_cell(Cell(attack="refusal", steps=7), tmp_path)
    assert steps == [7]
