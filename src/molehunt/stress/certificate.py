"""A stress test as one record that can be kept, compared and checked: two radii, the controls, the cost, and what was attacked.

The upper radius is attacked: a push that short brought the behaviour back. The lower one is proved, for the decision
under noise (`smoothing`). A fix with a large upper radius has withstood these attacks and no others.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from molehunt.measure.interval import Interval
from molehunt.stress.drift import Drift
from molehunt.stress.study import AT, Arm, Control, InputArm, StressConfig, Study

SCHEMA = 1


def certificate(study: Study, config: StressConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-ready. Lengths are in units of the median ‖h‖ at the site; None stands for a median that is infinite.

    Args:
        study: what was measured.
        config: how.
        about: what was attacked: hashes of model, dictionary and prompts, latents, mode, command.
    """
    valid = study.valid
    told = {
        "schema": SCHEMA,
        "verdict": study.verdict,
        **about,
        "config": asdict(config),
        "prompts": {
            "given": len(valid.prompts),
            "show_it": sum(valid.shown),
            "flipped": valid.flipped,
            "broken": sum(valid.broken),
            "attacked": len(study.rows),
        },
        "unit": study.unit,
        "nothing": asdict(study.nothing),
        "arms": [_arm(arm) for arm in study.arms],
        "controls": {name: _control(one) for name, one in study.controls.items()},
        "inputs": [_input(arm) for arm in study.inputs],
        "specificity_gap": _interval(study.gap),
        "upper": {"epsilon50": _interval(study.arms[-1].epsilon50), "shortest": _finite(study.arms[-1].lengths.min())},
        "lower": {
            "for": "the first token of the answer, decided under noise",
            "median": float(study.lower.median()),
            "most": study.lower_most,
            "certified": float((study.lower > 0).float().mean()),
            "alpha": 0.001,
        },
        "cost": {**asdict(study.cost), "clean_changed": asdict(study.clean_changed)},
    }
    return {**told, "sha256": digest(told)}


def digest(told: Mapping[str, Any]) -> str:
    """Of everything but the digest itself: a certificate that was changed by hand does not keep it."""
    rest = {key: value for key, value in told.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _arm(arm: Arm) -> dict[str, Any]:
    return {
        "name": arm.name,
        "recovered": asdict(arm.recovered),
        "epsilon50": _interval(arm.epsilon50),
        "curve": {str(at): share for at, share in zip(AT, arm.curve(), strict=True)},
        "length": _spread(arm.length),
        "drift": _drift(arm.drift),
    }


def _input(arm: InputArm) -> dict[str, Any]:
    return {
        "name": arm.name,
        "recovered": asdict(arm.recovered),
        "random_target": asdict(arm.elicited),
        "beyond_random_target": asdict(arm.beyond),
        "drift": _drift(arm.drift),
    }


def _drift(drift: Drift) -> dict[str, Any]:
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
    return {"least": low, "median": middle, "most": high}


def _finite(value: Tensor | float) -> float | None:
    number = float(value)
    return number if number < float("inf") else None
