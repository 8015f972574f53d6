"""Combinations of choices: all that make sense, each once."""

import pytest

from molehunt.dictionary.catalog import CATALOG
from molehunt.dictionary.grid import grid
from molehunt.dictionary.pairing import Pairing
from molehunt.dictionary.train import DictionarySpec
from molehunt.errors import UsageError
from molehunt.site import Site

HERE, THERE = Site(1), Site(2)


def made(**reported) -> list[DictionarySpec]:
    fixed = {"d_model": 8, "sites": [HERE], "architectures": ["topk"], "pairings": ["difference"]}
    return grid(**{**fixed, **reported})


def test_every_combination_once() -> None:
    specs = made(sites=[HERE, THERE], expansions=[2, 4], ks=[1, 2], seeds=[0, 1, 1])
    assert len(specs) == len({one.name for one in specs}) == 2 * 2 * 2 * 2
    assert {(one.site, one.expansion, one.settings["k"], one.seed) for one in specs} == {
        (site, expansion, k, seed) for site in (HERE, THERE) for expansion in (2, 4) for k in (1, 2) for seed in (0, 1)
    }


def test_a_choice_goes_to_what_it_says_something_to() -> None:
    specs = made(architectures=list(CATALOG), ks=[3, 4], l1s=[0.1])
    reported = {(one.architecture, *one.settings.items()) for one in specs}
    counted = {(name, ("k", k)) for name in ("topk", "batch-topk", "matryoshka") for k in (3, 4)}
    aimed = {("jumprelu", ("target_l0", float(k))) for k in (3, 4)}
    assert reported == counted | aimed | {("relu", ("l1", 0.1)), ("gated", ("l1", 0.1))}
    assert len(specs) == len(reported)


def test_what_is_not_told_is_the_architectures_own() -> None:
    assert [one.settings for one in made(architectures=["topk", "relu"])] == [{}, {}]


def test_joint_and_exclusive_are_of_crosscoders_alone() -> None:
    specs = made(pairings=["difference", "both"], joints=[0.0, -1.0], exclusives=[0.1])
    assert [one.pairing for one in specs] == [
        Pairing(kind="difference"),
        Pairing(kind="both", exclusive=0.1),
        Pairing(kind="both", joint=-1.0, exclusive=0.1),
    ]


@pytest.mark.parametrize(
    ("reported", "error"),
    [
        ({"joints": [-0.5]}, "joint belongs to crosscoders"),
        ({"exclusives": [0.1]}, "exclusive belongs to crosscoders"),
        ({"l1s": [0.1]}, "l1 does not apply to topk"),
        ({"architectures": ["relu", "gated"], "ks": [2]}, "k does not apply to relu, gated"),
        ({"ks": [17], "expansions": [2]}, "k = 17 latents cannot fire out of 16"),
        ({"ks": [17], "expansions": [2], "architectures": ["jumprelu"]}, "k = 17 latents cannot fire out of 16"),
        ({"architectures": ["tokp"]}, "Did you mean topk"),
        ({"expansions": [0]}, "expansion must be 1 or more"),
    ],
)
def test_choices_that_make_no_sense(reported: dict, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        made(**reported)
