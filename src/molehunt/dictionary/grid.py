"""From lists of choices to the dictionaries that one pass trains: every combination that makes sense, once."""

import inspect
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, cast

from molehunt.dictionary.catalog import CATALOG
from molehunt.dictionary.pairing import Kind, Pairing
from molehunt.dictionary.train import GROUP, DictionarySpec
from molehunt.errors import UsageError
from molehunt.run.catalog import load
from molehunt.site import Site


def grid(
    *,
    d_model: int,
    sites: Sequence[Site],
    architectures: Sequence[str],
    pairings: Sequence[Kind],
    joints: Sequence[float] = (),
    exclusives: Sequence[float] = (),
    expansions: Sequence[int] = (16,),
    ks: Sequence[int] = (),
    l1s: Sequence[float] = (),
    lr: float | None = None,
    seeds: Sequence[int] = (0,),
) -> list[DictionarySpec]:
    """Every combination. A choice is given to the architectures that take it: `ks` to those that count latents.

    Args:
        d_model: width of the model.
        sites: where.
        architectures: names of the catalogue.
        pairings: kinds of input.
        joints: λ of crosscoders; 0 where none is given.
        exclusives: share of latents of each model alone, of crosscoders; 0 where none is given.
        expansions: latents per dimension of the model.
        ks: latents a token, or the L0 that a penalty leads to; where none is given, the architecture's own.
        l1s: weights of L1 penalties, likewise.
        lr: peak learning rate of every dictionary.
        seeds: seeds of the initial weights.

    Raises:
        UsageError: a choice that no architecture or pairing takes, or more latents than there are.
    """
    if "both" not in pairings and (joints or exclusives):
        raise UsageError(f"{'joint' if joints else 'exclusive'} belongs to crosscoders, and none was requested.")
    takes = {name: _settings(name) for name in architectures}
    for given_values, wanted in ((ks, {"k", "target_l0"}), (l1s, {"l1"})):
        if given_values and not any(wanted & given for given in takes.values()):
            raise UsageError(f"{'k' if given_values is ks else 'l1'} does not apply to {', '.join(architectures)}.")
    specs: dict[str, DictionarySpec] = {}
    for site, name, kind, expansion in product(sites, architectures, pairings, expansions):
        for pairing, settings, seed in product(
            _pairings(kind, joints, exclusives), _all_settings(takes[name], ks, l1s), seeds
        ):
            k = settings.get("k", settings.get("target_l0", 0))
            if expansion > 0 and k > expansion * d_model:
                raise UsageError(
                    f"k = {k:g} latents cannot fire out of {expansion * d_model} ({expansion} for each of {d_model} "
                    "dimensions). Give a smaller -k or a larger --expansion."
                )
            one = DictionarySpec(
                site=site,
                architecture=name,
                pairing=pairing,
                expansion=expansion,
                settings=settings,
                lr=lr,
                seed=seed,
            )
            specs[one.name] = one
    return list(specs.values())


def _settings(name: str) -> set[str]:
    made = cast("Callable[..., Any]", load(CATALOG, name, GROUP))
    return {"k", "target_l0", "l1"} & inspect.signature(made).parameters.keys()


def _pairings(kind: Kind, joints: Sequence[float], exclusives: Sequence[float]) -> list[Pairing]:
    if kind != "both":
        return [Pairing(kind=kind)]
    return [Pairing(kind=kind, joint=j, exclusive=e) for j, e in product(joints or (0.0,), exclusives or (0.0,))]


def _all_settings(takes: set[str], ks: Sequence[int], l1s: Sequence[float]) -> list[dict[str, int | float]]:
    choices: list[list[tuple[str, int | float]]] = []
    if "k" in takes and ks:
        choices.append([("k", k) for k in ks])
    if "target_l0" in takes and ks:
        choices.append([("target_l0", float(k)) for k in ks])
    if "l1" in takes and l1s:
        choices.append([("l1", l1) for l1 in l1s])
    return [dict(chosen) for chosen in product(*choices)]
