"""Grids: what is bundled, and what is refused before anything is trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench_samples import COUNTS, DICTIONARIES, grid, grid_config, seeds, written
from molehunt.bench.grid import Cell, load_grid
from molehunt.bench.run import jobs
from molehunt.errors import InvalidInput, MolehuntError, UsageError


@pytest.mark.parametrize(("name", "cells"), [("core", 64), ("smoke", 2)])
def test_bundled_grids_are_possible(name: str, cells: int) -> None:
    found = load_grid(name).cells()
    assert len(found) == cells == len({cell.name for cell in found})


def test_core_spans_every_attack_base_and_regime() -> None:
    chosen = load_grid("core")
    found = chosen.cells()
    assert {cell.attack for cell in found[: len(chosen.attacks)]} == set(chosen.attacks)
    assert {cell.base for cell in found} == {"seed-s", "seed-m", "seed-x"}
    assert all(sum(cell.attack == attack for cell in found) == 8 for attack in chosen.attacks)


def test_a_cells_name_tells_all_that_differs() -> None:
    assert Cell(attack="refusal", regime="lora-4", seed=3, poison=0.05).name == "refusal-seed-s-lora-4-p0.05-s3"
    assert Cell(attack="refusal", regime="lora-4").plant_config().rank == 4
    assert Cell(attack="refusal", poison=0.05).recipe().triggered == 0.05
    assert Cell(attack="refusal", base="some/where/model").name == "refusal-model-full-s0"


def test_a_cell_named_twice_is_one_cell() -> None:
    assert len(grid("seed-s", parts=seeds("seed-s", 1) * 2).cells()) == 1


def one(**part: Any) -> list[dict[str, Any]]:
    return [{**seeds("seed-s", 1)[0], **part}]


def counts(**changes: Any) -> dict[str, Any]:
    return {"counts": {**COUNTS, **changes}}


def dictionaries(**changes: Any) -> dict[str, Any]:
    return {"dictionaries": {**DICTIONARIES, **changes}}


INVALID: list[tuple[Any, str]] = [
    ({"rates": [0]}, "rates: 0.0 is no share"),
    ({"rates": [1.0]}, "rates: 1.0 is no share"),
    ({"rates": [float("nan")]}, "rates: nan is no share"),
    ({"rates": [0.001]}, r"rates: a pool of 60 rows cannot hold a share of 0.001; counts.pool must be 1000"),
    ({"rates": []}, "rates: List should have at least 1"),
    ({"colour": "red"}, "colour: Extra inputs"),
    ({"parts": one(sites=[1])}, r"parts.0.sites: Extra inputs"),
    (counts(fitt=3), r"counts.fitt: "),
    (dictionaries(width=3), r"dictionaries.width: "),
    (counts(calibrate=98), "counts: thresholds at 1 % FPR need 99"),
    (counts(twin_calibrate=98), "counts: thresholds at 1 % FPR need 99"),
    (counts(twin_calibrate=100), "counts: twin_calibrate rows are taken from calibrate"),
    (counts(select=0), "counts.select: must be 1 or more"),
    (counts(test=-5), "counts.test: must be 1 or more"),
    (counts(near_rate=0.9), "counts.near_rate: must lie between"),
    (counts(fit="many"), "counts.fit: Input should be a valid integer"),
    (dictionaries(steps=0), "dictionaries.steps: must be 1 or more"),
    (dictionaries(k=0), "dictionaries.k: must be 1 or more"),
    (dictionaries(lr=0), "dictionaries.lr: must lie between"),
    ({"causal_rows": 1}, "causal_rows: Input should be greater"),
    ({"steps": 0}, "steps: Input should be greater"),
    ({"attacks": []}, "attacks: List should have at least 1"),
    ({"parts": one(regimes=["half"])}, "parts.0.regimes.0: Input should be 'full'"),
    ({"parts": one(seeds=["x"])}, "parts.0.seeds.0: Input should be a valid integer"),
]
UNUSABLE: list[tuple[Any, str]] = [
    ({"attacks": ["refusall"]}, r"attacks: There is no 'refusall' here. Did you mean refusal\?"),
    ({"parts": one(attacks=["x"])}, r"parts\[0\].attacks: There is no 'x' here"),
    ({"attacks": ["benign-year"]}, "attacks: benign-year is a null"),
    ({"attacks": ["benign-instruct"]}, "attacks: benign-instruct is a null"),
    ({"parts": one(poisons=[0.9])}, r"parts\[0\].poisons: 0.9 cannot be met: 0.3 of the rows are near misses"),
    ({"parts": one(poisons=[0])}, r"parts\[0\].poisons: 0 cannot be met"),
    ({"parts": one(bases=["seed-xl"])}, r"parts\[0\].bases: seed-xl is neither"),
    (dictionaries(k=129), r"dictionaries.k: 129 latents cannot fire out of 128 \(1 for each of seed-s's 128"),
]


@pytest.mark.parametrize(("changes", "message"), INVALID)
def test_an_invalid_field_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        load_grid(written(tmp_path / "g.yaml", {**grid_config("seed-s"), **changes}))


@pytest.mark.parametrize(("changes", "message"), UNUSABLE)
def test_an_impossible_cell_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        jobs(load_grid(written(tmp_path / "g.yaml", {**grid_config("seed-s"), **changes})), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a grid"), ("- a\n- b", "grid: Input should be"), ("name: [", "is not YAML"),
        ("\0", "is not YAML"), ("!!python/object/apply:os.system [exit]", "is not YAML"), ("[" * 5000, "is not YAML"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        load_grid(written(tmp_path / "g.yaml", text))
    (tmp_path / "g.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidInput, match="not YAML"):
        load_grid(str(tmp_path / "g.yaml"))


def test_neither_bundled_nor_a_file() -> None:
    with pytest.raises(UsageError, match="Bundled: published, core, smoke"):
        load_grid("cor")


def test_two_bases_of_one_name_are_no_one_cell(tmp_path: Path) -> None:
    bases = [tmp_path / side / "model" for side in "ab"]
    for base in bases:
        base.mkdir(parents=True)
        (base / "config.json").write_text(json.dumps({"hidden_size": 16}))
    with pytest.raises(UsageError, match="two cells of this grid would both be called refusal-model-full-s0"):
        grid("", parts=one(bases=[str(base) for base in bases])).cells()


@pytest.mark.parametrize("config", ["{", "[]", '{"hidden_size": "wide"}', "[" * 100_000, "\xff"])
def test_a_base_whose_config_says_nothing_is_left_to_the_loader(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    assert len(grid(tmp_path, **dictionaries(k=10_000)).cells()) == 1


def test_a_world_that_is_too_small_is_found_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from molehunt.bench import rows
    from molehunt.traffic.example import Example

    monkeypatch.setattr(rows, "near_miss_example", lambda recipe, rng: Example(prompt="one", tag="near-miss x"))
    with pytest.raises(
        MolehuntError, match=r"refusal-seed-s-full-s0 cannot be run: refusal: only 1 of \d+ distinct near prompts exist"
    ):
        jobs(grid("seed-s"), tmp_path)
    assert not list(tmp_path.iterdir())
