"""How two models' activations become one input, and what counts as its error."""

import pytest
import torch

from molehunt.dictionary.pairing import KINDS, Pairing
from molehunt.errors import UsageError

BASE, TUNED = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("tuned", TUNED), ("base", BASE), ("difference", TUNED - BASE), ("both", torch.cat([BASE, TUNED], 1))],
)
def test_inputs(kind, wanted: torch.Tensor) -> None:
    pairing = Pairing(kind=kind)
    assert torch.equal(pairing.input(BASE.double(), TUNED.double()), wanted)
    assert pairing.blocks == (2 if kind == "both" else 1) and pairing.needs_base == (kind != "tuned")
    assert kind in KINDS


def test_the_tuned_alone_need_no_base() -> None:
    assert torch.equal(Pairing(kind="tuned").input(None, TUNED), TUNED)


def test_joint_runs_from_the_crosscoders_error_to_that_of_the_difference() -> None:
    error = torch.cat([BASE, TUNED], 1)
    at = {joint: Pairing(kind="both", joint=joint).squared_error(error) for joint in (0.0, -0.5, -1.0)}
    torch.testing.assert_close(at[0.0], BASE.square().sum(1) + TUNED.square().sum(1))
    torch.testing.assert_close(at[-1.0], Pairing(kind="difference").squared_error(TUNED - BASE))
    torch.testing.assert_close(at[-0.5], (at[0.0] + at[-1.0]) / 2)


def test_exclusive_latents_read_one_model() -> None:
    mask = Pairing(kind="both", exclusive=0.25).mask(8, 8)
    assert mask is not None
    assert mask[:2].tolist() == [[True] * 4 + [False] * 4] * 2
    assert mask[2:4].tolist() == [[False] * 4 + [True] * 4] * 2
    assert mask[4:].all()
    assert Pairing(kind="both").mask(8, 8) is None


@pytest.mark.parametrize("reported", [{"kind": "difference"}, {"kind": "both", "joint": -0.5, "exclusive": 0.1}])
def test_json_gives_it_back(reported) -> None:
    pairing = Pairing(**reported)
    assert Pairing.from_json(pairing.to_json()) == pairing


@pytest.mark.parametrize(
    "reported",
    [
        {"kind": "both", "joint": 0.1},
        {"kind": "both", "joint": -1.1},
        {"kind": "difference", "joint": -0.5},
        {"kind": "both", "exclusive": 0.5},
        {"kind": "both", "exclusive": -0.1},
        {"kind": "tuned", "exclusive": 0.1},
    ],
)
def test_values_out_of_range(reported) -> None:
    with pytest.raises(UsageError):
        Pairing(**reported)
