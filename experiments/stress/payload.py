"""The measurements that all settings of the stress table share, as plain numbers for a JSON record."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from experiments.stress.attribution import Replay, attribute, geometry
from experiments.stress.choice_behaviour import ValidChoices, choice_case, spread, valid_choices
from experiments.stress.readout_behaviour import (
    ReadoutArm,
    ReadoutCase,
    ReadoutConfig,
    ReadoutStudy,
    clustered_share,
    stress_readout,
)
from molehunt.measure.interval import Interval
from molehunt.measure.paired import paired_difference
from molehunt.steer.clamp import Clamp
from molehunt.stress.attacks.attack import ForwardPass
from molehunt.stress.attacks.choice import Choice, ChoiceJudgements, judge_choices
from molehunt.stress.attacks.objective import Objective
from molehunt.stress.attacks.shortest import shortest_attack
from molehunt.stress.defences.defence import clamp_defence
from molehunt.stress.evaluation.drift import WatchedDrift
from molehunt.stress.evaluation.norms import epsilon50, recovery_lengths

AT = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Lengths at which the curves are read, in units of the median ‖h‖."""
TOP = 16
"""Latents of the part `top` of an attribution."""


def valid_of(
    model: nn.Module, rows: Sequence[Choice], clamp: Clamp, before: ChoiceJudgements, *, whole: bool
) -> ValidChoices:
    return valid_choices(rows, before, judge_choices(model, rows, clamp.site, defence=[clamp]), whole=whole)


def counted(rows: Sequence[Choice], valid: ValidChoices) -> dict[str, Any]:
    return {
        "rows": len(rows),
        "shown": int(valid.shown.sum()),
        "flipped": int(valid.flipped.sum()),
        "broken": int((valid.flipped & valid.broken).sum()),
        "valid": len(valid.rows),
        "clusters": len({rows[i].cluster for i in valid.rows}),
    }


def some(rows: Sequence[Choice], valid: ValidChoices, limit: int) -> list[Choice]:
    """At most so many of the valid rows, spread over their clusters."""
    kept = [rows[i] for i in valid.rows]
    return [kept[i] for i in spread([row.cluster for row in kept], limit)]


def stressed(model: nn.Module, rows: Sequence[Choice], clamp: Clamp, config: ReadoutConfig) -> dict[str, Any]:
    """The study of these rows, and which part of the perturbations does it."""
    case = choice_case(model, rows, clamp_defence(clamp))
    study = stress_readout(case, config)
    return {**study_fields(study), "attribution": attributed(case, study, clamp)}


def least(model: nn.Module, rows: Sequence[Choice], clamp: Clamp, config: ReadoutConfig) -> dict[str, Any]:
    """Only the shortest exact push: for curves over the number of latents."""
    if not rows:
        return {"epsilon50": None, "recovered": None}
    case = choice_case(model, rows, clamp_defence(clamp))
    radius = torch.full((len(rows),), config.max_norm * case.unit)
    exact = case.constraints[-1]
    found = shortest_attack(case.defended, case.wanted, exact, radius, config.search, levels=config.levels)
    return {
        "epsilon50": interval(epsilon50(recovery_lengths(found.norm / case.unit, found.recovered), case.clusters)),
        "recovered": asdict(clustered_share(found.recovered, case.clusters)),
    }


def by_size(
    model: nn.Module,
    rows: Sequence[Choice],
    before: ChoiceJudgements,
    clamps: Mapping[int, Clamp],
    config: ReadoutConfig,
    few: int,
    cost: Callable[[Clamp], dict[str, Any]],
    *,
    whole: bool,
) -> dict[str, Any]:
    """The curve over the number of latents: what each clamp flips, what it costs, the shortest exact push of `few` rows."""
    found: dict[str, Any] = {}
    for n, clamp in clamps.items():
        valid = valid_of(model, rows, clamp, before, whole=whole)
        found[str(n)] = {
            "latents": len(clamp.latents),
            **counted(rows, valid),
            **cost(clamp),
            "least": least(model, some(rows, valid, few), clamp, config),
        }
    return found


def interval(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def study_fields(study: ReadoutStudy) -> dict[str, Any]:
    """Arms, controls and ratios."""
    first, last = study.shortest[0], study.shortest[-1]
    middle = float(first.lengths.median())
    return {
        "n": study.n,
        "clusters": study.clusters,
        "unit": study.unit,
        "zero perturbation": asdict(study.nothing),
        "published": {arm.name: arm_fields(arm) for arm in study.published},
        "shortest": {arm.name: arm_fields(arm) for arm in study.shortest},
        "controls": {
            name: {"recovered": asdict(one.recovered), "epsilon50": interval(one.epsilon50)}
            for name, one in study.controls.items()
        },
        "gap": interval(study.gap),
        "gain": interval(study.gain),
        "held": interval(study.held),
        "at": middle,
        "free against exact": asdict(
            paired_difference((first.lengths <= middle).tolist(), (last.lengths <= middle).tolist())
        ),
        "verdict": study.verdict,
    }


def arm_fields(arm: ReadoutArm) -> dict[str, Any]:
    return {
        "recovered": asdict(arm.recovered),
        "epsilon50": interval(arm.epsilon50),
        "curve": arm.curve(AT),
        "length": float(arm.length.median()),
        "margin": float(arm.margin.median()),
        "drift": drift_fields(arm.drift),
    }


def drift_fields(drift: WatchedDrift) -> dict[str, Any]:
    fires = drift.reactivated[~drift.reactivated.isnan()]
    return {
        "pre": float(drift.pre.median()),
        "pre, largest": float(drift.pre.max()),
        "largest": float(drift.largest.max()),
        "codes": None if drift.silent.all() else float(drift.codes[~drift.silent].median()),
        "reactivated": float(fires.mean()) if len(fires) else None,
        "silent": float(drift.silent.float().mean()),
    }


def attributed(case: ReadoutCase, study: ReadoutStudy, clamp: Clamp) -> dict[str, Any] | None:
    """Attribution of the last published arm: of the shortest, every part would fall short alone. None for fewer than two recovered rows."""
    arm = study.published[-1]
    back = arm.is_recovered.nonzero()[:, 0]
    clusters = [case.clusters[i] for i in back.tolist()]
    return parts_of(case.defended.rows(back), case.wanted.rows(back), arm.delta[back], clusters, clamp)


def parts_of(
    runs: ForwardPass, wanted: Objective, delta: Tensor, clusters: Sequence[Hashable], clamp: Clamp
) -> dict[str, Any] | None:
    """Which part of the perturbations of rows that are back does it. None for fewer than two rows."""
    if len(delta) < 2:
        return None
    found = attribute(runs, wanted, delta, clamp.dictionary, clamp.latents, k=TOP)
    shape = geometry(delta, clamp.dictionary, clamp.latents, {})

    def replayed(one: Replay) -> dict[str, Any]:
        return {"recovered": asdict(clustered_share(one.margin > 0, clusters)), "norm": float(one.norm.median())}

    return {
        "rows": len(delta),
        "whole": replayed(found.whole),
        "parts": {
            name: {
                "alone": replayed(part.alone),
                "alone, at norm": replayed(part.alone_at_norm),
                "without": replayed(part.without),
                "without, at norm": replayed(part.without_at_norm),
            }
            for name, part in found.components.items()
        },
        "rank": shape.effective_rank,
        "first": float(shape.shares[0]),
        "first by chance": float(shape.chance[0]),
    }
