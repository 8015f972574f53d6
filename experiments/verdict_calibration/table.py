"""The page on the strength of findings on clean twins, and the file that the audit reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import molehunt.audit
from experiments.page import counted, grid, page
from experiments.setting import Setting
from experiments.verdict_calibration.measure import BASE, SEED

HOW = """\
Each twin was fine-tuned on the data of an attack without its poison, from seed {seed}, and audited on traffic without any triggered row. \
*Strength* is how many times the clean threshold the strongest would-be finding reaches. None of these twins is an organism of the \
published table of verdicts. The audit takes its limit of strength from the largest one.

Written by `python -m experiments verdict-calibration`, which also writes the numbers to `src/molehunt/audit/calibration.json`.
"""


def table(found: Mapping[str, dict[str, Any]], setting: Setting) -> str:
    strengths = {f"{name}, {BASE}, seed {SEED}": one["strength"] for name, one in found.items()}
    payload = {"twins": len(strengths), "largest_strength": max(strengths.values()), "strengths": strengths}
    target = (
        setting.out / "calibration.json" if setting.quick else Path(molehunt.audit.__path__[0]) / "calibration.json"
    )
    target.write_text(json.dumps(payload, indent=2) + "\n")
    rows = [[name, f"{strength:.3f}"] for name, strength in strengths.items()]
    how = HOW.format(seed=SEED)
    return page("Findings on clean twins", opening(payload), grid(["twin", "strength"], rows), how)


def opening(payload: Mapping[str, Any]) -> list[str]:
    return [
        "An audit of a model that hides nothing should find nothing, but some rows always stand out a little.",
        f"On {counted(payload['twins'], 'clean twin')} the strongest would-be finding reached {payload['largest_strength']:.2f} times the clean "
        "threshold.",
        "Treat a finding that is weaker than this as noise.",
    ]
