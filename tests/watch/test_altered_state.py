"""A saved state that was altered is refused: a watch never goes on with its eyes shut."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from molehunt.errors import InvalidInput, NotTestable
from molehunt.model.pair import ModelPair
from molehunt.watch.bank import Bank
from molehunt.watch.calibration import calibrate
from molehunt.watch.state import RATE, WatchState
from watched_logs import rows

FPR = 0.05
IDENTITY = {"tuned model": "a", RATE: f"{FPR:g}"}


@pytest.fixture(scope="module")
def saved(pair: ModelPair, bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = calibrate(pair, bank, rows(400, 0), fpr=FPR, identity=IDENTITY, max_new_tokens=4, seed=0)
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    state.save(path)
    return path


def altered(
    saved: Path, into: Path, fields: Callable[[dict], object], tensors: Callable[[dict[str, Tensor]], object]
) -> Path:
    from safetensors import safe_open

    with safe_open(saved, "pt") as file:
        header = json.loads(file.metadata()["molehunt_watch"])
    held = load_file(saved)
    fields(header)
    tensors(held)
    save_file(held, into / "state.safetensors", {"molehunt_watch": json.dumps(header)})
    return into / "state.safetensors"


def nothing(value: object) -> None:
    """Leaves it as it is."""


def filled(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    def change(held: dict[str, Tensor]) -> None:
        held[name] = torch.full_like(held[name], value)

    return change


def test_an_unaltered_state_is_read(saved: Path, tmp_path: Path) -> None:
    assert math.isfinite(WatchState.load(altered(saved, tmp_path, nothing, nothing), IDENTITY).monitor.threshold)


@pytest.mark.parametrize("threshold", [math.nan, math.inf, 1e308, 1e6, -1e6, "1", None, [1.0], 10**400])
def test_a_threshold_that_clean_scores_do_not_give_is_refused(threshold: object, saved: Path, tmp_path: Path) -> None:
    path = altered(saved, tmp_path, lambda fields: fields.update(threshold=threshold), nothing)
    with pytest.raises(InvalidInput, match="is no state of a watch"):
        WatchState.load(path, IDENTITY)


def test_the_highest_clean_score_is_no_threshold_either(saved: Path, tmp_path: Path) -> None:
    highest = load_file(saved)["0.calibration"].max().item()
    path = altered(saved, tmp_path, lambda fields: fields.update(threshold=highest), nothing)
    with pytest.raises(InvalidInput, match="is not the one that its clean scores give"):
        WatchState.load(path, IDENTITY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("0.start", math.nan), ("0.start", math.inf), ("0.scale", math.inf), ("0.scale", 0.0), ("0.scale", -1.0),
        ("0.own", math.nan), ("0.own", -1.0), ("0.calibration", math.nan), ("0.calibration", 1e30),
        ("strata.center", math.nan), ("strata.scale", 0.0), ("strata.centroids", math.inf),
    ],
)  # fmt: skip
def test_numbers_that_would_flag_nothing_are_refused(name: str, value: float, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is no state of a watch"):
        WatchState.load(altered(saved, tmp_path, nothing, filled(name, value)), IDENTITY)


@pytest.mark.parametrize(
    "changed",
    [
        {"seen": -1}, {"flagged": "3"}, {"written": 2**70}, {"place": [1]}, {"place": [0, -1]}, {"extremes": [["a", 1]]},
        {"rng": {}}, {"rng": None}, {"suspects": {}}, {"stratum_of": []}, {"stratum_of": [7]}, {"identity": []}, {"drift": {}},
        {"identity": {**IDENTITY, RATE: "nan"}},
    ],
    ids=str,
)  # fmt: skip
def test_every_other_field_is_checked(changed: dict[str, object], saved: Path, tmp_path: Path) -> None:
    path = altered(saved, tmp_path, lambda fields: fields.update(changed), nothing)
    with pytest.raises((InvalidInput, NotTestable), match="is no state of a watch"):
        WatchState.load(path, {"tuned model": "a"})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InvalidInput, match="Remove it to calibrate again"):
        WatchState.load(path, IDENTITY)
