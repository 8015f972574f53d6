"""A stress test as one record that can be kept, compared and checked.

The record holds two radii, the controls, the cost, and what was attacked. The upper radius comes from the attacks: a
perturbation of that length made the behaviour recover. The lower one is proved, for the decision under noise
(`smoothing`). A fix with a large upper radius has withstood these attacks and no others.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from molehunt.measure.interval import Interval
from molehunt.stress.evaluation.arms import CURVE_LENGTHS, Arm, Control, InputArm
from molehunt.stress.evaluation.config import StressConfig
from molehunt.stress.evaluation.drift import WatchedDrift
from molehunt.stress.study import Study

SCHEMA = 2
"""Version of the record. docs/guides/stress.md lists the keys that schema 1 named otherwise."""


def certificate(study: Study, config: StressConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    """The record, ready for JSON. Lengths are in units of the median ‖h‖ at the site; None is an infinite median.

    Args:
        study: what was measured.
        config: settings of the attacks.
        about: what was attacked: hashes of model, dictionary and prompts, latents, mode, command.
    """
    valid = study.valid
    payload = {
        "schema": SCHEMA,
        "verdict": study.verdict,
        **about,
        "config": asdict(config),
        "prompts": {
            "given": len(valid.prompts),
            "with_behaviour": sum(valid.shown),
            "flipped": valid.flipped,
            "broken": sum(valid.broken),
            "attacked": len(study.rows),
        },
        "unit": study.unit,
        "zero_perturbation": asdict(study.zero_perturbation),
        "arms": [_arm(arm) for arm in study.arms],
        "controls": {name: _control(one) for name, one in study.controls.items()},
        "inputs": [_input(arm) for arm in study.inputs],
        "specificity_gap": _interval(study.specificity_gap),
        "upper": {"epsilon50": _interval(study.arms[-1].epsilon50), "shortest": _finite(study.arms[-1].lengths.min())},
        "lower": {
            "for": "the first token of the answer, decided under noise",
            "median": float(study.lower_radii.median()),
            "largest_provable": study.largest_provable,
            "certified": float((study.lower_radii > 0).float().mean()),
            "alpha": 0.001,
        },
        "cost": {**asdict(study.cost), "clean_changed": asdict(study.clean_changed)},
    }
    return {**payload, "sha256": digest(payload)}


def digest(payload: Mapping[str, Any]) -> str:
    """Hash of everything except the digest itself. A certificate that was changed by hand no longer matches it."""
    rest = {key: value for key, value in payload.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _arm(arm: Arm) -> dict[str, Any]:
    return {
        "name": arm.name,
        "recovered": asdict(arm.recovered),
        "epsilon50": _interval(arm.epsilon50),
        "curve": {str(at): share for at, share in zip(CURVE_LENGTHS, arm.curve(), strict=True)},
        "length": _spread(arm.length),
        "drift": _drift(arm.drift),
    }


def _input(arm: InputArm) -> dict[str, Any]:
    return {
        "name": arm.name,
        "recovered": asdict(arm.recovered),
        "random_target": asdict(arm.random_target),
        "beyond_random_target": asdict(arm.beyond_random_target),
        "drift": _drift(arm.drift),
    }


def _drift(drift: WatchedDrift) -> dict[str, Any]:
    return {
        "pre_activation": _spread(drift.pre),
        "largest": _spread(drift.largest),
        "published": _spread(drift.codes),
        "floor_violation": _spread(drift.floor),
        "reactivated": _spread(drift.reactivated[~drift.reactivated.isnan()]),
        "silent_rows": int(drift.silent.sum()),
    }


def _control(control: Control) -> dict[str, Any]:
    return {"recovered": asdict(control.recovered), "epsilon50": _interval(control.epsilon50)}


def _interval(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else {**asdict(found), "high": _finite(found.high)}


def _spread(values: Tensor) -> dict[str, float] | None:
    if not len(values):
        return None
    low, middle, high = values.double().quantile(torch.tensor([0.0, 0.5, 1.0], dtype=torch.double)).tolist()
    return {"min": low, "median": middle, "max": high}


def _finite(value: Tensor | float) -> float | None:
    number = float(value)
    return number if number < float("inf") else None
